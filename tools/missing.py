"""Prints the requirements of this project, tests included, that the running Python does not have, one on a line."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11
    from pip._vendor import tomli as tomllib

_ROOT = Path(__file__).resolve().parents[1]
_TOOLS = {"mypy", "ruff", "clang-format"}  # that look at sources alone


def main() -> None:
    project: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], "setuptools"]
    for requirement in wanted:
        name = re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]
        if name in _TOOLS:
            continue
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            print(name)


if __name__ == "__main__":
    main()
