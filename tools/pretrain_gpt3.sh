#!/usr/bin/env bash
# Pretrains a GPT-3 shape on this machine, with the recipe of its size.
#
#   tools/pretrain_gpt3.sh SIZE [OPTIONS OF angelptm launch]
#   tools/pretrain_gpt3.sh 13b --set tiers.ssd=[{path: /nvme/me}] --set data.path=data/mine --dry-run
#
# SIZE: 125m 350m 1.3b 6.7b 13b 30b 175b. --dry-run checks the machine and shows the plan; Ctrl-C ends after a commit.
set -eu
cd "$(dirname "$0")/.."
size="${1:-}"
recipe="configs/gpt3/$size.yaml"
if [ -z "$size" ] || [ ! -f "$recipe" ]; then
  echo "error: SIZE: found '$size', expected one of 125m 350m 1.3b 6.7b 13b 30b 175b" >&2
  exit 2
fi
shift
if command -v angelptm >/dev/null; then exec angelptm launch "$recipe" "$@"; fi
if [ -x .venv/bin/angelptm ]; then exec .venv/bin/angelptm launch "$recipe" "$@"; fi
echo "error: angelptm is not installed: pip install . (or make setup)" >&2
exit 2
