"""What the repository holds stays small: results of benchmarks are kilobytes, and nothing that is built is in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_MOST_BYTES = 256 * 2**10
_BUILT = {".so", ".o", ".pyc", ".whl", ".pages", ".bin", ".safetensors", ".trail"}


def _tracked() -> list[Path]:
    found = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in found.stdout.split("\0") if name]


def test_no_tracked_file_is_large_or_built() -> None:
    files = [path for path in _tracked() if path.is_file()]
    assert files
    assert [str(path) for path in files if path.stat().st_size > _MOST_BYTES] == []
    assert [str(path) for path in files if path.suffix in _BUILT] == []
