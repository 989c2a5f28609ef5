"""Pages of a plan: their ids in the native store, by unit and kind."""

from angelptm.pages.allocate import NOT_MINE, PageIds, SlotFiles, SpanPages, UnitPages, allocate_pages, open_store
from angelptm.pages.catalogue import Catalogue, CataloguedPage, naming

__all__ = [
    "NOT_MINE",
    "Catalogue",
    "CataloguedPage",
    "PageIds",
    "SlotFiles",
    "SpanPages",
    "UnitPages",
    "allocate_pages",
    "naming",
    "open_store",
]
