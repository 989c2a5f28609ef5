"""Units: the parameters fetched together, and how they lie in pages."""

from angelptm.units.find import FoundUnit, Site, Structure, find_structure
from angelptm.units.layout import ALIGN_ELEMENTS, ParamLayout, UnitLayout, pack

__all__ = [
    "ALIGN_ELEMENTS",
    "FoundUnit",
    "ParamLayout",
    "Site",
    "Structure",
    "UnitLayout",
    "find_structure",
    "pack",
]
