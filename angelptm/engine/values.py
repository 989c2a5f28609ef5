"""Whole parameters, read from and written to their pages: for initialization, inspection and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import angelptm_native as native
import torch

from angelptm.device import Device
from angelptm.engine.dtypes import rounded
from angelptm.engine.loading import loading
from angelptm.engine.updates import Updates
from angelptm.pages import NOT_MINE, PageIds
from angelptm.plan import Plan
from angelptm.ranks import Ranks
from angelptm.states.codec import decode, encode
from angelptm.states.layout import Piece, StatePage, pieces_on
from angelptm.units import ParamLayout, UnitLayout


@dataclass(frozen=True)
class _Run:
    """Elements [start, end) of a unit in one page, or at ``device_address`` for parameters that live on the device."""

    page: int
    device_address: int | None
    start: int
    end: int


class Values:
    """Reads and writes parameters in compute precision (PARAM) and in fp32 (MASTER).

    Waits for a unit's update by itself; that no module computes with a unit while it is written is the caller's care.
    """

    def __init__(
        self,
        plan: Plan,
        pages: PageIds,
        store: native.Store,
        device: Device,
        dtype: torch.dtype,
        updates: Updates,
        fetcher: native.Fetcher,
        name_page: Callable[[int], str],
        ranks: Ranks,
    ) -> None:
        self._plan = plan
        self._name_page = name_page
        self._pages = pages
        self._store = store
        self._mover = store.mover
        self._device = device
        self._dtype = dtype
        self._updates = updates
        self._fetcher = fetcher
        self._ranks = ranks

    def fill(self, unit: int, values: Mapping[str, torch.Tensor]) -> None:
        """Writes a unit's first content. ``values``: each parameter, of its own shape, in memory; fp32 keeps all bits.

        The moments start as zeros, which is what an unwritten page reads as.
        """
        layout = self._plan.units[unit].layout
        for first, page, states, pieces in self._state_pages(unit):
            masters = [piece for piece in pieces if piece.kind == "MASTER"]
            if masters:
                fill = partial(_fill_masters, page=states, pieces=masters, first=first, layout=layout, values=values)
                self._replace(page, fill)
        for run in self._param_runs(unit):
            fill = partial(_gather, layout=layout, values=values, start=run.start, end=run.end, dtype=self._dtype)
            self._replace_params(run, fill)
        self._mover.drain()

    def _state_pages(self, unit: int) -> Iterator[tuple[int, int, StatePage, list[Piece]]]:
        """First element of the span, page id, what the page is, and what lies on it."""
        plan = self._plan.units[unit]
        for index, (span, pages) in enumerate(zip(plan.spans, self._pages[unit].spans)):
            for number, (page, states) in enumerate(zip(pages.states if span.is_mine else (), span.states.pages)):
                yield index * self._plan.page_elements, page, states, pieces_on(span.states, number)

    def rebuild(self, unit: int) -> None:
        """Forms the trainable parameters from their masters, as an update would: rounded to compute precision. They are
        there already where masters are split."""
        if self._plan.splits_masters:
            return
        spans = self._plan.units[unit].spans
        contents = {n: torch.zeros(span.elements, dtype=self._dtype) for n, span in enumerate(spans) if span.is_mine}
        for first, page, _, pieces in self._state_pages(unit):
            for piece in pieces:
                if piece.kind != "MASTER":
                    continue
                content = contents[first // self._plan.page_elements]
                master = torch.empty(piece.count)
                self._look(page, partial(decode, piece=piece, at=0, count=piece.count, to=master.data_ptr()))
                content[piece.start : piece.start + piece.count] = rounded(master, self._dtype)
        for run, content in zip(self._param_runs(unit), contents.values()):
            size = content.numel() * content.itemsize
            self._replace_params(run, partial(native.copy_bytes, from_=content.data_ptr(), bytes=size))
        self._mover.drain()

    def replace_page(self, page: int, content: torch.Tensor) -> None:
        """Writes a page's whole content; ``content``: (used bytes,) uint8. Visible after ``settle``."""
        self._replace(page, lambda to: native.copy_bytes(to, content.data_ptr(), content.numel()))

    def clear_page(self, page: int) -> None:
        """Makes a page read as zeros, as if it had never been written."""
        if self._store.page_home(page) == native.Home.HOST:
            native.fill_zero(self._store.home_address(page), self._plan.page_bytes)
            self._store.publish_in_place(page)
        else:
            self._store.discard(page)

    def settle(self) -> None:
        """Returns when what was replaced is published."""
        self._mover.drain()

    def _replace_params(self, run: _Run, fill: Callable[[int], None]) -> None:
        if run.device_address is not None:
            fill(run.device_address)
        else:
            self._replace(run.page, fill)

    def _replace(self, page: int, fill: Callable[[int], None]) -> None:
        """Publishes the content of a page that ``fill`` writes to the address it gets."""
        if self._store.page_home(page) == native.Home.HOST:
            fill(self._store.home_address(page))
            self._store.publish_in_place(page)
        else:
            self._fetcher.let_go()
            frame = self._mover.staging_frame()
            fill(self._mover.address(frame))
            self._mover.write_behind(page, frame)

    def _look(self, page: int, take: Callable[[int], None]) -> None:
        """Calls ``take`` with the address of a page's content."""
        if self._store.page_home(page) == native.Home.HOST:
            take(self._store.home_address(page))
            return
        take(self._load(page))
        self._mover.next_loaded()  # lets the staging frame go

    def _edit(self, page: int, change: Callable[[int], None]) -> None:
        """Publishes a page's content after ``change`` has written to it at the address it gets."""
        if self._store.page_home(page) == native.Home.HOST:
            change(self._store.home_address(page))
            self._store.publish_in_place(page)
        else:
            self._load(page)
            frame = self._mover.take_loaded()
            change(self._mover.address(frame))
            self._mover.write_behind(page, frame)

    def read(self, unit: int, param: ParamLayout, *, master: bool = False) -> torch.Tensor:
        """A copy of a parameter in compute precision, or of its fp32 master, for which a frozen one has its value. On
        all ranks."""
        self._updates.wait_for(unit)
        if master:
            return self._read_master(unit, param) if param.trainable else self.read(unit, param).float()
        out = torch.empty(param.shape, dtype=self._dtype)
        for run in self._param_runs(unit):
            if run.end <= param.offset or param.end <= run.start:
                continue
            copy = partial(
                _copy, out.data_ptr(), param.offset, source_start=run.start, param=param, run=run, itemsize=out.itemsize
            )
            if run.device_address is not None:
                copy(run.device_address)
            else:
                self._look(run.page, copy)
        self._complete(unit, param, out)
        return out

    def _complete(self, unit: int, param: ParamLayout, values: torch.Tensor) -> None:
        """Adds what other ranks have to what this one has of a parameter."""
        if not self._plan.share.is_whole:
            self._ranks.complete(values.view(-1), self._plan.pieces_of(unit, param), f"reading {param.name}")

    def _read_master(self, unit: int, param: ParamLayout) -> torch.Tensor:
        out = torch.empty(param.numel)
        params = self.read(unit, param).reshape(-1) if param.states.master == "split" else None
        for page, piece, start, first, count in self._masters_of(unit, param):
            to = out.data_ptr() + first * 4
            own = params.data_ptr() + first * 2 if params is not None else 0
            self._look(page, partial(decode, piece=piece, at=start, count=count, to=to, params=own))
        self._complete(unit, param, out)
        return out.reshape(param.shape)

    def _masters_of(self, unit: int, param: ParamLayout) -> Iterator[tuple[int, Piece, int, int, int]]:
        """Where a parameter has its master: page id, piece, first element in the piece and in the parameter, count."""
        for span_first, page, _, pieces in self._state_pages(unit):
            for piece in pieces:
                begin = span_first + piece.start
                first, last = max(begin, param.offset), min(begin + piece.count, param.end)
                if piece.kind == "MASTER" and first < last:
                    yield page, piece, first - begin, first - param.offset, last - first

    def write(self, unit: int, param: ParamLayout, value: torch.Tensor) -> None:
        """Replaces a parameter: the fp32 master gets ``value``, the parameter the same in compute precision."""
        assert value.shape == param.shape, "a value has its parameter's shape"
        self._updates.wait_for(unit)
        self._updates.recall()
        if param.trainable:
            master = value.detach().to(torch.float32).contiguous().reshape(-1)
            for page, piece, start, first, count in self._masters_of(unit, param):
                own = master.data_ptr() + first * 4
                self._edit(page, partial(encode, piece=piece, at=start, count=count, values=own))
        source = rounded(value.detach(), self._dtype)
        for run in self._param_runs(unit):
            if run.end <= param.offset or param.end <= run.start:
                continue
            copy = partial(
                _copy,
                to_start=run.start,
                source=source.data_ptr(),
                source_start=param.offset,
                param=param,
                run=run,
                itemsize=source.itemsize,
            )
            if run.device_address is not None:
                copy(run.device_address)
            else:
                self._edit(run.page, copy)
        self._mover.drain()

    def _load(self, page: int) -> int:
        self._fetcher.let_go()
        with loading(self._mover, [page], self._name_page):
            loaded = self._mover.next_loaded()
        assert loaded is not None, "one page was asked for"
        return loaded[1]

    def _param_runs(self, unit: int) -> Iterator[_Run]:
        plan, pages = self._plan.units[unit], self._pages[unit]
        layout, step = plan.layout, self._plan.page_elements
        for index in range(plan.frame_count):
            start, section_end = index * step, layout.trainable_elements
            if index >= len(plan.spans):
                start = layout.frozen_offset + (index - len(plan.spans)) * step
                section_end = layout.frozen_offset + layout.frozen_elements
            address = self._device.address(self._plan.param_offset(unit, index))
            page = pages.params[index] if pages.params else NOT_MINE
            if pages.params and page == NOT_MINE:
                continue
            yield _Run(page, None if pages.params else address, start, min(start + step, section_end))


def _fill_masters(
    to: int,
    page: StatePage,
    pieces: Sequence[Piece],
    first: int,
    layout: UnitLayout,
    values: Mapping[str, torch.Tensor],
) -> None:
    """Writes a state page whose moments, if it has them, are zeros. ``first``: of its span's elements in the unit."""
    native.fill_zero(to, page.bytes)
    for piece in pieces:
        start = first + piece.start
        master = torch.empty(piece.count)
        _gather(
            master.data_ptr(), layout=layout, values=values, start=start, end=start + piece.count, dtype=master.dtype
        )
        encode(to, piece, 0, piece.count, master.data_ptr())


def _gather(
    to: int, layout: UnitLayout, values: Mapping[str, torch.Tensor], start: int, end: int, dtype: torch.dtype
) -> None:
    """Fills a buffer with elements [start, end) of a unit, converted; gaps between parameters become zeros."""
    native.fill_zero(to, (end - start) * dtype.itemsize)
    for param in layout.params:
        first, last = max(start, param.offset), min(end, param.end)
        if first < last:
            flat = values[param.name].detach().reshape(-1)[first - param.offset : last - param.offset]
            part = rounded(flat, dtype)
            native.copy_bytes(to + (first - start) * dtype.itemsize, part.data_ptr(), part.numel() * dtype.itemsize)


def _copy(to: int, to_start: int, source: int, source_start: int, param: ParamLayout, run: _Run, itemsize: int) -> None:
    """Copies the elements that a parameter has in a run between two buffers, given the element each begins at."""
    first, last = max(run.start, param.offset), min(run.end, param.end)
    native.copy_bytes(
        to + (first - to_start) * itemsize, source + (first - source_start) * itemsize, (last - first) * itemsize
    )
