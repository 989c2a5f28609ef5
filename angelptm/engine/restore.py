"""Fills the pages of a run from a commit.

A page that the commit has exactly as this run wants it, on the same slot files, is adopted: its slot becomes the page's
own, and nothing is read. Any other page is put together from whichever pages of the commit hold its elements, so a
commit can be resumed with another page size, another split over the tiers, another division into units and other
formats of states. Parameters are formed anew from their masters.
"""

from __future__ import annotations

from dataclasses import dataclass

import angelptm_native as native
import numpy as np
import torch

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import layouts_from_units
from angelptm.checkpoint.reader import CommitReader
from angelptm.checkpoint.records import NONE, Kind, moment_kinds
from angelptm.device import Device
from angelptm.engine.dtypes import rounded
from angelptm.engine.values import Values
from angelptm.errors import CheckpointError
from angelptm.pages import Catalogue, CataloguedPage
from angelptm.plan import Plan
from angelptm.states.codec import encode
from angelptm.states.formats import BLOCK8, StateFormats
from angelptm.states.layout import Piece, UnitFormats, record_bytes, record_pieces
from angelptm.units import ParamLayout, UnitLayout
from angelptm.units.layout import Segment, segments_of

_Key = tuple[str, int, tuple[tuple[str, int, int, int, StateFormats | None], ...]]


@dataclass
class Restored:
    """How the pages came back: ``adopted`` in place, ``read`` and written anew, ``cleared`` to zeros."""

    adopted: int = 0
    read: int = 0
    cleared: int = 0


class Restorer:
    """One resume. ``reader`` gives the commit's content, verified; ``own_files`` are those of the manifest's files that
    the run's store is on, with the commit's slots claimed."""

    def __init__(
        self,
        manifest: Manifest,
        reader: CommitReader,
        *,
        own_files: range,
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
        self._own_files = own_files
        self._exact = self._index() if own_files else {}
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
            kind = Kind(int(record["kind"])).name
            found[_key_of(kind, layouts[unit], int(record["start"]), int(record["count"]), self._saved_moments)] = index
        return found

    @property
    def _saved_moments(self) -> int:
        return len(moment_kinds(self._manifest.header.optimizer.type))

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
                if page.kind in ("MASTER", "PARAM", "STATES"):
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
        key = _key_of(page.kind, layout, page.start, page.count, self._plan.moment_count)
        index = self._exact.get(key)
        if index is None or page.page is None or (page.kind == "PARAM" and not self._same_precision):
            self._assemble(page)
            self.restored.read += 1
            return
        record = self._manifest.pages[index]
        file = int(record["file"])
        if file == NONE:
            self._values.clear_page(page.page)
            self.restored.cleared += 1
            return
        if file not in self._own_files:  # another rank had it
            self._assemble(page)
            self.restored.read += 1
            return
        if self._store.page_home(page.page) == native.Home.HOST:
            self._copy(page.page, index)  # into its frame; the slot is its saved copy from here on
        self._store.adopt(
            page.page, file - self._own_files.start, int(record["slot"]), int(record["crc"]), int(record["version"])
        )
        self.restored.adopted += 1

    @property
    def _same_precision(self) -> bool:
        return self._manifest.header.precision == {torch.float32: "fp32", torch.bfloat16: "bf16"}[self._dtype]

    def _copy(self, page: int, index: int) -> None:
        """Fills a page with the very content of a page of the commit."""
        for _, content in self._reader.pages([index]):
            self._values.replace_page(page, torch.from_numpy(content.copy()))

    def _assemble(self, page: CataloguedPage) -> None:
        """Puts a page together from the commit's elements; gaps between parameters are zeros."""
        if page.kind == "STATES":
            raw = self._assemble_record(page)
        else:
            content = torch.zeros(page.count, dtype=torch.float32 if page.kind != "PARAM" else self._dtype)
            for one in segments_of(self._plan.units[page.unit].layout, page.start, page.count):
                values = self._read(one.param, page.kind, one.start, one.count)
                content[one.at : one.at + one.count] = rounded(values, content.dtype)
            raw = content.view(torch.uint8)
        if page.page is None:
            native.copy_bytes(self._device.address(page.offset), raw.data_ptr(), raw.numel())
        else:
            self._values.replace_page(page.page, raw)

    def _assemble_record(self, page: CataloguedPage) -> torch.Tensor:
        """(bytes,) uint8: a page of STATES, in this run's formats."""
        layout = self._plan.units[page.unit].layout
        formats = UnitFormats(layout, self._plan.moment_count)
        runs = formats.runs(page.start, page.count)
        raw = torch.zeros(record_bytes(runs, self._plan.moment_count), dtype=torch.uint8)
        for piece in record_pieces(formats, page.start, page.count):
            if self._weights_only and piece.kind != "MASTER":
                continue
            segments = segments_of(layout, page.start + piece.start, piece.count)
            if piece.format == "int8" and all(self._is_saved_in_int8(one.param, piece.kind) for one in segments):
                for one in segments:
                    self._copy_blocks(raw.numpy(), piece, one)
                continue
            values = torch.zeros(piece.count)
            for one in segments:
                values[one.at : one.at + one.count] = self._read(one.param, piece.kind, one.start, one.count)
            encode(
                raw.data_ptr(),
                piece,
                0,
                piece.count,
                values.data_ptr(),
                unit=page.unit,
                first_element=page.start + piece.start,
            )
        return raw

    def _is_saved_in_int8(self, param: ParamLayout, kind: str) -> bool:
        saved = self._params[param.name].states.of_rule(self._saved_moments)
        return {"EXP_AVG": saved.exp_avg, "EXP_AVG_SQ": saved.exp_avg_sq}[kind] == "int8"

    def _copy_blocks(self, raw: np.ndarray, piece: Piece, segment: Segment) -> None:
        """As they are, since to decode and encode would round again."""
        codes, scales = self._reader.blocks8(segment.param.name, Kind[piece.kind], segment.start, segment.count)
        at = piece.offset + segment.at
        raw[at : at + len(codes)] = codes
        at = piece.scales + segment.at // BLOCK8 * 4
        raw[at : at + scales.nbytes] = scales.view(np.uint8)

    def _read(self, param: ParamLayout, kind: str, start: int, count: int) -> torch.Tensor:
        """Elements of a parameter; of a trainable one PARAM is its master, to be rounded."""
        if self._weights_only or kind == "PARAM":
            kind = "MASTER" if self._params[param.name].trainable else "PARAM"
        found: np.ndarray = self._reader.read(param.name, Kind[kind], start, count)
        values = torch.from_numpy(found)
        return values.view(torch.bfloat16) if found.dtype == np.uint16 else values


def _key_of(kind: str, layout: UnitLayout, start: int, count: int, moment_count: int) -> _Key:
    """What a page holds, by which pages of a commit and of a run are the same."""
    segments = segments_of(layout, start, count)
    formats = [one.param.states.of_rule(moment_count) if kind == "STATES" else None for one in segments]
    moments = moment_count if kind == "STATES" else 0
    names = [(one.param.name, one.start, one.count, one.at, form) for one, form in zip(segments, formats)]
    return kind, count, (*names, ("", moments, 0, 0, None))
