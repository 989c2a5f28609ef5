"""Fills the pages of a run from a commit.

A page that the commit has exactly as this run wants it, on the same slot files, is adopted: its slot becomes the page's
own, and nothing is read. Any other page is put together from whichever pages of the commit hold its elements, so a
commit can be resumed with another page size, another split over the tiers and another division into units. Parameters
are formed anew from their masters.
"""

from __future__ import annotations

from dataclasses import dataclass

import angelptm_native as native
import numpy as np
import torch

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import layouts_from_units
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import NONE, Kind
from angelptm.device import Device
from angelptm.engine.values import Values
from angelptm.errors import CheckpointError
from angelptm.pages import Catalogue, CataloguedPage
from angelptm.plan import Plan
from angelptm.units import ParamLayout
from angelptm.units.layout import segments_of

_Key = tuple[str, tuple[tuple[str, int, int, int], ...]]


@dataclass
class Restored:
    """How the pages came back: ``adopted`` in place, ``read`` and written anew, ``cleared`` to zeros."""

    adopted: int = 0
    read: int = 0
    cleared: int = 0


class Restorer:
    """One resume. ``reader`` gives the commit's content, verified; ``same_files`` says that the run's store is on the
    slot files that the manifest names, with the commit's slots claimed."""

    def __init__(
        self,
        manifest: Manifest,
        reader: CommitReader,
        *,
        same_files: bool,
        weights_only: bool,
        store: native.Store,
        plan: Plan,
        catalogue: Catalogue,
        values: Values,
        device: Device,
        dtype: torch.dtype,
        path: str,
    ) -> None:
        self._manifest = manifest
        self._reader = reader
        self._store = store
        self._plan = plan
        self._catalogue = catalogue
        self._values = values
        self._device = device
        self._dtype = dtype
        self._path = path
        self._weights_only = weights_only
        self._params = {
            param.name: param for unit in layouts_from_units(manifest.header.units) for param in unit.params
        }
        self._expect_parameters()
        self._exact = self._index() if same_files else {}
        self.restored = Restored()

    def _refuse(self, found: str, expected: str, remedy: str = "") -> CheckpointError:
        return CheckpointError(self._path, found, expected, remedy)

    def _expect_parameters(self) -> None:
        """Refuses a commit of another model, before anything is changed."""
        mine: dict[str, ParamLayout] = {param.name: param for unit in self._plan.units for param in unit.layout.params}
        for name, param in mine.items():
            saved = self._params.get(name)
            if saved is None:
                raise self._refuse(
                    f"no parameter {name}", "every parameter of the model", "It is a commit of another model."
                )
            if tuple(saved.shape) != tuple(param.shape):
                raise self._refuse(f"{name} of shape {tuple(saved.shape)}", f"shape {tuple(param.shape)}")
            if saved.trainable != param.trainable and not self._weights_only:
                words = {True: "trainable", False: "frozen"}
                raise self._refuse(
                    f"{name} {words[saved.trainable]}",
                    f"{words[param.trainable]}, as the model has it",
                    "Load the weights only to go on with other parameters trained.",
                )
        extra = sorted(self._params.keys() - mine.keys())
        if extra and not self._weights_only:
            raise self._refuse(f"a parameter {extra[0]}", "only parameters that the model has")

    def _index(self) -> dict[_Key, int]:
        """Records by what they hold."""
        if self._manifest.header.page_bytes != self._plan.page_bytes:
            return {}
        layouts = layouts_from_units(self._manifest.header.units)
        found: dict[_Key, int] = {}
        for index, record in enumerate(self._manifest.pages):
            unit = int(record["unit"])
            if unit >= len(layouts):
                continue  # a buffer
            segments = segments_of(layouts[unit], int(record["start"]), int(record["count"]))
            key = tuple((one.param.name, one.start, one.count, one.at) for one in segments)
            found[(Kind(int(record["kind"])).name, (*key, ("", int(record["count"]), 0, 0)))] = index
        return found

    def pages(self) -> Restored:
        """States and frozen parameters of every unit, then the trainable parameters; returns how."""
        for unit in range(len(self._plan.units)):
            for page in self._catalogue.committed(unit):
                self._page(page)
            self._values.settle()
            self._values.rebuild(unit)
        return self.restored

    def weights(self) -> Restored:
        """Masters and parameters alone: the optimizer's moments start anew, as zeros."""
        for unit in range(len(self._plan.units)):
            for page in self._catalogue.committed(unit):
                if page.kind in ("MASTER", "PARAM"):
                    self._assemble(page)
                    self.restored.read += 1
                elif page.page is not None:
                    self._values.clear_page(page.page)
                    self.restored.cleared += 1
            self._values.settle()
            self._values.rebuild(unit)
        return self.restored

    def _page(self, page: CataloguedPage) -> None:
        layout = self._plan.units[page.unit].layout
        segments = segments_of(layout, page.start, page.count)
        key = tuple((one.param.name, one.start, one.count, one.at) for one in segments)
        index = self._exact.get((page.kind, (*key, ("", page.count, 0, 0))))
        if index is None or page.page is None or (page.kind == "PARAM" and not self._same_precision):
            self._assemble(page)
            self.restored.read += 1
            return
        record = self._manifest.pages[index]
        if int(record["file"]) == NONE:
            self._values.clear_page(page.page)
            self.restored.cleared += 1
            return
        if self._store.page_home(page.page) == native.Home.HOST:
            self._assemble(page)  # into its frame; the slot is its saved copy from here on
        self._store.adopt(
            page.page, int(record["file"]), int(record["slot"]), int(record["crc"]), int(record["version"])
        )
        self.restored.adopted += 1

    @property
    def _same_precision(self) -> bool:
        return self._manifest.header.precision == {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._dtype]

    def _assemble(self, page: CataloguedPage) -> None:
        """Puts a page together from the commit's elements; gaps between parameters are zeros."""
        dtype = torch.float32 if page.kind != "PARAM" else self._dtype
        content = torch.zeros(page.count, dtype=dtype)
        for one in segments_of(self._plan.units[page.unit].layout, page.start, page.count):
            content[one.at : one.at + one.count] = self._read(one.param.name, page.kind, one.start, one.count)
        raw = content.view(torch.uint8)
        if page.page is None:
            address = self._device.address(page.frame * self._plan.page_bytes)
            native.copy_bytes(address, raw.data_ptr(), raw.numel())
        else:
            self._values.replace_page(page.page, raw)

    def _read(self, name: str, kind: str, start: int, count: int) -> torch.Tensor:
        if self._weights_only:
            kind = "MASTER" if self._params[name].trainable else "PARAM"
        found: np.ndarray = self._reader.read(name, Kind[kind], start, count)
        values = torch.from_numpy(found)
        return values.view(torch.bfloat16) if found.dtype == np.uint16 else values
