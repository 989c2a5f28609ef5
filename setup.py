"""Builds the one native module. Metadata lives in pyproject.toml.

The portable baseline is compiled for the plain architecture; the AVX2 and AVX-512 files choose their target themselves
(``#pragma GCC target``) and are entered only after a CPU check at run time. Nothing is linked but the C++ runtime.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))

# -ffp-contract=off: a fused multiply-add would round once where the reference rounds twice, and the instruction sets
# would no longer agree bit by bit.
compile_args = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror=return-type", "-pthread"]
link_args = ["-pthread"]
sanitizer = os.environ.get("ANGELPTM_SANITIZE")  # "thread" or "address"; `make sanitize` builds both
sanitizer_args = [f"-fsanitize={sanitizer}", "-g1", "-O1", "-fno-omit-frame-pointer"] if sanitizer else []
# Bindings take most of the time to compile and do little with memory or threads, so that their ordinary objects do. But
# the thread sanitizer has to see each release of what threads share.
UNSANITIZED = {
    "thread": {"bind_checksum", "bind_heap", "bind_io", "bind_kernels", "bind_timeline", "module"},
    "address": {path.stem for path in Path("csrc/bind").glob("*.cpp")},
}


def stale(object_file: str, source_file: str) -> bool:
    """Whether an object is older than its source or any header."""
    if not os.path.exists(object_file):
        return True
    built = os.stat(object_file).st_mtime
    return any(os.stat(path).st_mtime >= built for path in [source_file, *headers])


class KeptObjects(build_ext):
    """Objects stay in one folder, where pip would take another one each time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.ordinary = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        self.build_temp = f"build/sanitize-{sanitizer}/temp" if sanitizer else self.ordinary

    def build_extension(self, ext: Extension) -> None:
        if sanitizer:
            plain = [source for source in ext.sources if Path(source).stem in UNSANITIZED[sanitizer]]
            ext.extra_objects = self.compiler.compile(
                plain,
                output_dir=self.ordinary,
                include_dirs=ext.include_dirs,
                extra_postargs=list(ext.extra_compile_args),
            )
            ext.sources = [source for source in ext.sources if source not in plain]
            ext.extra_compile_args += sanitizer_args
            ext.extra_link_args += sanitizer_args
        super().build_extension(ext)


ParallelCompile("ANGELPTM_BUILD_JOBS", default=os.cpu_count() or 1, needs_recompile=stale).install()

setup(
    cmdclass={"build_ext": KeptObjects},
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
    ],
)
