"""``angelptm report``: what a bug report needs to say about this machine."""

from __future__ import annotations

import ctypes
import errno
import json as json_format
import mmap
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from angelptm.memory import host_memory, read_text
from angelptm.sizes import format_bytes

_PACKAGES = (
    "angelptm",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "liburing",
    "aiofiles",
)
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16", "asimd", "sve")
_SYS_IO_URING_SETUP = 425  # the same number on every architecture but Alpha
_IO_URING_PARAMS_BYTES = 120
_BLOCK_BYTES = 4096


def collect_report(paths: Sequence[Path] = ()) -> dict[str, Any]:
    """Facts by section; sizes in bytes, null where there is no limit or no answer.

    paths: folders whose file system matters; the working folder if there are none. They need not exist yet.
    """
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "memory": asdict(host_memory()),
        "io_uring": _io_uring(),
        "paths": [_path(Path(path)) for path in (paths or [Path.cwd()])],
        "gpu": _gpu(),
    }


def render_report(report: dict[str, Any], console: Console) -> None:
    """One table of (what, found), the sections in order."""
    table = Table("", "found", title="angelptm report", title_justify="left")
    for section in ("versions", "cpu", "memory", "io_uring", "gpu"):
        for name, value in report[section].items():
            table.add_row(f"{section}.{name}", _shown(name, value))
        table.add_section()
    for facts in report["paths"]:
        for name, value in facts.items():
            table.add_row("path" if name == "path" else f"path.{name}", _shown(name, value))
        table.add_section()
    console.print(table)


def report(
    path: Annotated[
        list[Path] | None, typer.Argument(help="Folders whose file system matters; default: this one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Versions, CPU features, memory limits, io_uring, O_DIRECT, disks and GPU: what a bug report needs."""
    with Console(stderr=True).status("looking at this machine"):
        found = collect_report(path or [])
    if json:
        print(json_format.dumps(found))
    else:
        render_report(found, Console())


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "no limit" if name.endswith("limit_bytes") else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes"):
        return format_bytes(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "os": platform.platform(),
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    try:
        found["angelptm_native"] = str(import_module("angelptm_native").__file__)
    except ImportError as error:
        found["angelptm_native"] = f"not importable: {error}"
    return found


def _cpu() -> dict[str, Any]:
    text = read_text(Path("/proc/cpuinfo"))
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "features": [name for name in _FEATURES if name in flags],
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
    }


def _io_uring() -> dict[str, Any]:
    """Asks the kernel for a ring of one entry, and gives it back."""
    if not sys.platform.startswith("linux"):
        return {"available": False, "why": "not Linux"}
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    handle = libc.syscall(_SYS_IO_URING_SETUP, 1, params)
    if handle >= 0:
        os.close(handle)
        return {"available": True, "why": "io_uring_setup works"}
    code = ctypes.get_errno()
    reasons = {
        errno.ENOSYS: "the kernel, or the sandbox, has no io_uring",
        errno.EPERM: "kernel.io_uring_disabled or a seccomp filter forbids it",
        errno.ENOMEM: "the locked-memory limit is too low",
    }
    return {"available": False, "why": f"io_uring_setup: {os.strerror(code)}; {reasons.get(code, 'unexpected')}"}


def _path(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"path": str(path)}
    folder = path.expanduser().absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    found |= {"file_system": _file_system(folder), "free_bytes": usage.free, "total_bytes": usage.total}
    works, why = _try_direct(folder)
    return {**found, "o_direct": works, "o_direct_why": why}


def _file_system(folder: Path) -> str:
    resolved = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _try_direct(folder: Path) -> tuple[bool, str]:
    """Writes one aligned block with O_DIRECT to a temporary file; (works, why)."""
    if not hasattr(os, "O_DIRECT"):
        return False, "this system has no O_DIRECT"
    try:
        with tempfile.NamedTemporaryFile(prefix=".angelptm-report-", dir=folder) as file:
            handle = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                with mmap.mmap(-1, _BLOCK_BYTES) as block:  # anonymous memory is page-aligned
                    written = os.write(handle, block)
            finally:
                os.close(handle)
    except OSError as error:
        return False, error.strerror or str(error)
    return written == _BLOCK_BYTES, f"{written} of {_BLOCK_BYTES} bytes written"


def _gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"available": False, "devices": [], "cuda": torch.version.cuda}
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"available": True, "devices": names, "cuda": torch.version.cuda}
