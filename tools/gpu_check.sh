#!/usr/bin/env bash
# The tests that need a GPU, and the GPU benchmark, on a machine that has torch with CUDA, transformers and pybind11, and
# perhaps no network. Tests and benchmark are cut off after 200 and 240 seconds.
#
#   tools/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [-- OPTIONS OF tools/bench/gpu.py]
#
# Whatever else the project imports comes from FOLDER (`pip download -r` fills one elsewhere), or from the network where
# there is no FOLDER. Results: FOLDER/gpu.json, FOLDER/gpu-tests.xml. Exits with 0 when all is as promised.
set -u
cd "$(dirname "$0")/.."
wheels="" out="runs/gpu-check"
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels="$2"; shift 2 ;;
    --out) out="$2"; shift 2 ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see the head of tools/gpu_check.sh" >&2; exit 2 ;;
  esac
done
started=$SECONDS
say() { echo "[$((SECONDS - started)) s] $*"; }

python=${PYTHON:-python3}
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
  echo "error: torch sees no GPU: $("$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>&1 | tail -1)" >&2
  exit 2
}
mkdir -p "$out"
say "environment"
"$python" -m venv --system-site-packages .gpu-venv || exit 2
source .gpu-venv/bin/activate
missing=$(python tools/missing.py) || exit 2
if [ -n "$missing" ]; then
  say "installing $(echo $missing | tr '\n' ' ')"
  # shellcheck disable=SC2086
  pip install --quiet --disable-pip-version-check ${wheels:+--no-index --find-links "$wheels"} $missing || exit 2
fi
say "native build"
ANGELPTM_BUILD_JOBS=$(nproc) python setup.py --quiet build_ext --inplace || exit 2
export PYTHONPATH="$PWD"
failed=0
say "tests"
timeout 200 python -m pytest -q -m gpu tests/device -p no:cacheprovider --junitxml "$out/gpu-tests.xml" || failed=1
say "benchmark"
timeout 240 python tools/bench/gpu.py --out "$out/gpu.json" "$@" || failed=1
say "done: $([ $failed = 0 ] && echo as promised || echo "not as promised")"
exit $failed
