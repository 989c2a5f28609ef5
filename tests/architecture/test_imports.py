"""Imports point one way. The tables below are the layers, lowest first; a file may import its own layer and those it
lists, and nothing else of this project."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS: dict[str, str] = {
    # layer: what it may import of this project, itself and its own parts aside
    "angelptm.version": "",
    "angelptm.sizes": "",
    "angelptm.errors": "angelptm.sizes",
    "angelptm.foreign": "angelptm.errors",
    "angelptm.memory": "",
    "angelptm.model.presets": "",
    "angelptm.config": "angelptm.sizes angelptm.errors angelptm.memory angelptm.model.presets",
    "angelptm.states.formats": "",
    "angelptm.units.layout": "angelptm.states.formats",
    "angelptm.units": "angelptm.errors angelptm.units.layout",
    "angelptm.states.layout": "angelptm.states.formats angelptm.units.layout",
    "angelptm.states.codec": "angelptm.states.formats angelptm.states.layout angelptm_native",
    "angelptm.states": "",
    "angelptm.plan": "angelptm.sizes angelptm.errors angelptm.units.layout angelptm.states.formats "
    "angelptm.states.layout",
    "angelptm.kernels": "angelptm_native",
    "angelptm.heap": "angelptm_native",
    "angelptm.timeline": "angelptm.errors angelptm.foreign angelptm.sizes angelptm_native",
    "angelptm.pages": "angelptm.errors angelptm.plan angelptm.units.layout angelptm_native",
    "angelptm.checkpoint": "angelptm.errors angelptm.sizes angelptm.units.layout angelptm.states.formats "
    "angelptm.states.layout angelptm.states.codec angelptm_native io_engine",
    "angelptm.checkpoint.dcp": "angelptm.errors angelptm.checkpoint",  # the one that knows torch
    "angelptm.device": "angelptm.errors angelptm.heap angelptm_native",
    "angelptm.data": "angelptm.errors angelptm.foreign angelptm.sizes angelptm.config",
    "angelptm.model": "angelptm.errors angelptm.foreign angelptm.sizes angelptm.heap angelptm.config angelptm.units "
    "angelptm.model.presets",
    "angelptm.ranks": "angelptm.errors angelptm.memory angelptm.config angelptm.plan",
    "angelptm.engine": "angelptm.version angelptm.errors angelptm.sizes angelptm.config "
    "angelptm.checkpoint angelptm.units angelptm.states.formats angelptm.states.layout angelptm.states.codec "
    "angelptm.plan angelptm.kernels angelptm.timeline angelptm.pages angelptm.device angelptm.ranks angelptm.model "
    "angelptm_native io_engine",
    "angelptm.foresight": "angelptm.errors angelptm.sizes angelptm.memory angelptm.config angelptm.units "
    "angelptm.states.formats angelptm.plan angelptm.device angelptm.model angelptm.engine angelptm_native",
    "angelptm.train": "angelptm.errors angelptm.sizes angelptm.memory angelptm.config angelptm.checkpoint "
    "angelptm.units angelptm.plan angelptm.ranks angelptm.data angelptm.model angelptm.timeline angelptm.engine "
    "io_engine",
    # The public names.
    "angelptm": "angelptm.version angelptm.errors angelptm.config angelptm.engine angelptm.model.materialize",
    "angelptm.cli": "angelptm angelptm.errors angelptm.sizes angelptm.memory angelptm.config angelptm.checkpoint "
    "angelptm.units angelptm.plan angelptm.kernels angelptm.timeline angelptm.data angelptm.model angelptm.engine "
    "angelptm.foresight angelptm.train angelptm_native io_engine",
    "io_engine": "angelptm_native",  # files, offsets and bytes: it knows no page and no unit
}

# These must work on a machine without the native module, and without torch.
WITHOUT_TORCH = ["angelptm.sizes", "angelptm.errors", "angelptm.config", "angelptm.units.layout", "angelptm.plan"]
WITHOUT_TORCH += ["angelptm.states.formats", "angelptm.states.layout"]

# The engine is built in two tiers of its own: I/O below, kernels beside it, pages on I/O, the updater on all three.
INCLUDES: dict[str, str] = {
    "heap": "",
    "timeline": "",
    "io": "",
    "kernels": "",
    "device": "io",
    "pages": "timeline io device",
    "update": "timeline io kernels pages",
    "bind": "heap timeline io kernels device pages update",
}


def layer_of(module: str) -> str | None:
    """The most particular layer that a module of this project belongs to."""
    while module:
        if module in LAYERS or module == "angelptm_native":
            return module
        module = module.rpartition(".")[0]
    return None


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those in functions and for type checkers included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package]
            base = ".".join([*(above if node.level else []), *([node.module] if node.module else [])])
            for alias in node.names:
                file = ROOT / base.replace(".", "/") / alias.name
                inner = file.is_dir() or file.with_suffix(".py").is_file()
                yield node.lineno, f"{base}.{alias.name}" if inner else base


def allowed(importer: str, imported: str) -> bool:
    """Whether a file of layer ``importer`` may import a module, by the table."""
    layer = layer_of(imported)
    if layer is None or layer == importer:
        return True
    listed = LAYERS[importer].split()
    return layer in listed or imported in listed or any(imported.startswith(f"{name}.") for name in listed)


def offences(files: Iterator[Path]) -> list[str]:
    found = []
    for path in files:
        module = module_of(path)
        layer = layer_of(module)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, imported in imports_of(tree, module, package=path.name == "__init__.py"):
            where = f"{path.relative_to(ROOT)}:{line}"
            if layer is None:
                found.append(f"{where}: {module} is in no layer; add it to LAYERS")
                break
            if not allowed(layer, imported):
                found.append(f"{where}: {layer} may not import {imported}")
    return found


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_python_imports_follow_the_layers() -> None:
    assert not offences(python_files("angelptm", "io_engine"))


def test_planning_layers_import_neither_torch_nor_native_code() -> None:
    found = []
    for path in python_files("angelptm"):
        module = module_of(path)
        if layer_of(module) not in WITHOUT_TORCH:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, imported in imports_of(tree, module, package=path.name == "__init__.py"):
            if imported.split(".")[0] in ("torch", "angelptm_native", "transformers"):
                found.append(f"{path.relative_to(ROOT)}:{line}: {module} may not import {imported}")
    assert not found


def test_native_includes_follow_the_layers() -> None:
    found = []
    for path in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]):
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := re.match(r'\s*#\s*include\s*"([^"]+)"', line):
                included = match.group(1).split("/")[0]
                where = f"{path.relative_to(ROOT)}:{number}"
                if not (ROOT / "csrc" / match.group(1)).is_file():
                    found.append(f"{where}: {match.group(1)} is not a path below csrc")
                elif included != folder and included not in INCLUDES[folder].split():
                    found.append(f"{where}: {folder} may not include {match.group(1)}")
            elif folder != "bind" and re.match(r"\s*#\s*include\s*<(pybind11|Python\.h|torch)", line):
                found.append(f"{path.relative_to(ROOT)}:{number}: no Python and no torch below csrc/bind")
    assert not found


def reachable(layer: str, table: dict[str, str]) -> set[str]:
    seen: set[str] = set()
    left = [layer]
    while left:
        for name in table[left.pop()].split():
            below = layer_of(name) if table is LAYERS else name
            if below in table and below not in seen:
                seen.add(below)
                left.append(below)
    return seen


@pytest.mark.parametrize("table", [LAYERS, INCLUDES], ids=["python", "native"])
def test_layers_have_no_cycle(table: dict[str, str]) -> None:
    assert not [layer for layer in table if layer in reachable(layer, table)]


def test_offence_is_named_with_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, text in {
        "angelptm/plan/bad.py": '"""x"""\n\ndef f():\n    from angelptm.engine import Engine\n',
        "angelptm/plan/good.py": "import math\nfrom angelptm.units.layout import pack\nfrom . import bad\n",
        "angelptm/units/worse.py": "from ..plan import make_plan\nfrom angelptm import kernels\n",
        "angelptm/kernels.py": "import torch\n",
        "io_engine/bad.py": "import angelptm.sizes as sizes\n",
        "angelptm/engine/__init__.py": "",
        "angelptm/plan/__init__.py": "",
        "stray.py": "import math\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert sorted(offences(python_files("."))) == [
        "angelptm/plan/bad.py:4: angelptm.plan may not import angelptm.engine",
        "angelptm/units/worse.py:1: angelptm.units may not import angelptm.plan",
        "angelptm/units/worse.py:2: angelptm.units may not import angelptm.kernels",
        "io_engine/bad.py:1: io_engine may not import angelptm.sizes",
        "stray.py:1: stray is in no layer; add it to LAYERS",
    ]
