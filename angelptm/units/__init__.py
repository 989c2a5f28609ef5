"""Units: the parameters fetched together, and how they lie in pages.

Layouts are pure data; what looks at modules needs torch and is imported on first use, so that plans do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from angelptm.units.layout import ALIGN_ELEMENTS, ParamLayout, ParamSpec, UnitLayout, leaves_of, pack

if TYPE_CHECKING:
    from angelptm.units.find import FoundUnit, Site, Structure, find_structure

__all__ = [
    "ALIGN_ELEMENTS",
    "FoundUnit",
    "ParamLayout",
    "ParamSpec",
    "Site",
    "Structure",
    "UnitLayout",
    "find_structure",
    "leaves_of",
    "pack",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from angelptm.units import find

    return getattr(find, name)
