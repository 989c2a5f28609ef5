"""Pages of a plan: their ids in the native store, by unit and kind."""

from angelptm.pages.allocate import PageIds, SpanPages, UnitPages, allocate_pages, open_store

__all__ = ["PageIds", "SpanPages", "UnitPages", "allocate_pages", "open_store"]
