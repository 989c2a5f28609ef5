"""Builds the one native module. Metadata lives in pyproject.toml.

The portable baseline is compiled for the plain architecture; the AVX2 and AVX-512 files choose their target themselves
(``#pragma GCC target``) and are entered only after a CPU check at run time. Nothing is linked but the C++ runtime.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))

# -ffp-contract=off: a fused multiply-add would round once where the reference rounds twice, and the instruction sets
# would no longer agree bit by bit.
compile_args = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror=return-type", "-pthread"]
link_args = ["-pthread"]
if sanitizer := os.environ.get("ANGELPTM_SANITIZE"):  # "thread" or "address"
    compile_args += [f"-fsanitize={sanitizer}", "-g", "-O1", "-fno-omit-frame-pointer"]
    link_args += [f"-fsanitize={sanitizer}"]


def stale(object_file: str, source_file: str) -> bool:
    """Whether an object is older than its source or any header."""
    if not os.path.exists(object_file):
        return True
    built = os.stat(object_file).st_mtime
    return any(os.stat(path).st_mtime >= built for path in [source_file, *headers])


ParallelCompile("ANGELPTM_BUILD_JOBS", default=os.cpu_count() or 1, needs_recompile=stale).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "angelptm_native",
            sources,
            include_dirs=["csrc"],
            depends=headers,
            cxx_std=20,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ]
)
