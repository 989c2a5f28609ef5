"""Whole parameters, read from and written to their pages: for initialization, inspection and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import angelptm_native as native
import torch

from angelptm.device import Device
from angelptm.engine.loading import loading
from angelptm.engine.updates import Updates
from angelptm.pages import PageIds
from angelptm.plan import Plan
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

    def fill(self, unit: int, values: Mapping[str, torch.Tensor]) -> None:
        """Writes a unit's first content. ``values``: each parameter, of its own shape, in memory; fp32 keeps all bits.

        The moments start as zeros, which is what an unwritten page reads as.
        """
        layout = self._plan.units[unit].layout
        for runs, dtype in ((self._master_runs(unit), torch.float32), (self._param_runs(unit), self._dtype)):
            for run in runs:
                self._replace(run, partial(_gather, layout=layout, values=values, run=run, dtype=dtype))
        self._mover.drain()

    def rebuild(self, unit: int) -> None:
        """Forms the trainable parameters from their masters, as an update would: rounded to compute precision."""
        step = self._plan.page_bytes // 4
        for run, span in zip(self._param_runs(unit), self._pages[unit].spans):
            content = torch.empty(span.elements, dtype=self._dtype)
            for number, page in enumerate(span.master):
                part = torch.empty(min(step, span.elements - number * step))
                on_host = self._store.page_home(page) == native.Home.HOST
                address = self._store.home_address(page) if on_host else self._load(page)
                native.copy_bytes(part.data_ptr(), address, part.numel() * 4)
                if not on_host:
                    self._mover.next_loaded()  # lets the staging frame go
                content[number * step : number * step + part.numel()] = part
            size = content.numel() * content.itemsize
            self._replace(run, partial(native.copy_bytes, from_=content.data_ptr(), bytes=size))
        self._mover.drain()

    def replace_page(self, page: int, content: torch.Tensor) -> None:
        """Writes a page's whole content; ``content``: (used bytes,) uint8. Visible after ``settle``."""
        self._replace(_Run(page, None, 0, 0), lambda to: native.copy_bytes(to, content.data_ptr(), content.numel()))

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

    def _replace(self, run: _Run, fill: Callable[[int], None]) -> None:
        """Publishes the content of a page, or of a run on the device, that ``fill`` writes to the address it gets."""
        if run.device_address is not None:
            fill(run.device_address)
        elif self._store.page_home(run.page) == native.Home.HOST:
            fill(self._store.home_address(run.page))
            self._store.publish_in_place(run.page)
        else:
            self._fetcher.let_go()
            frame = self._mover.staging_frame()
            fill(self._mover.address(frame))
            self._mover.write_behind(run.page, frame)

    def read(self, unit: int, param: ParamLayout, *, master: bool = False) -> torch.Tensor:
        """A copy of a parameter in compute precision, or of its fp32 master, for which a frozen one has its value."""
        if master and not param.trainable:
            return self.read(unit, param).float()
        self._updates.wait_for(unit)
        dtype = torch.float32 if master else self._dtype
        out = torch.empty(param.shape, dtype=dtype)
        for run in self._runs_of(unit, param, master=master):
            address = run.device_address
            if address is None:
                address = self._load(run.page)
            _copy(out.data_ptr(), param.offset, address, run.start, param, run, dtype.itemsize)
            if run.device_address is None:
                self._mover.next_loaded()  # lets the staging frame go
        return out

    def write(self, unit: int, param: ParamLayout, value: torch.Tensor) -> None:
        """Replaces a parameter: the fp32 master gets ``value``, the parameter the same in compute precision."""
        assert value.shape == param.shape, "a value has its parameter's shape"
        self._updates.wait_for(unit)
        self._updates.recall()
        for master in (True, False) if param.trainable else (False,):
            source = value.detach().to(torch.float32 if master else self._dtype).contiguous()
            itemsize = source.dtype.itemsize
            for run in self._runs_of(unit, param, master=master):
                if run.device_address is not None:
                    _copy(run.device_address, run.start, source.data_ptr(), param.offset, param, run, itemsize)
                elif self._store.page_home(run.page) == native.Home.HOST:
                    home = self._store.home_address(run.page)
                    _copy(home, run.start, source.data_ptr(), param.offset, param, run, itemsize)
                    self._store.publish_in_place(run.page)
                else:
                    self._load(run.page)
                    frame = self._mover.take_loaded()
                    to = self._mover.address(frame)
                    _copy(to, run.start, source.data_ptr(), param.offset, param, run, itemsize)
                    self._mover.write_behind(run.page, frame)
        self._mover.drain()

    def _load(self, page: int) -> int:
        self._fetcher.let_go()
        with loading(self._mover, [page], self._name_page):
            loaded = self._mover.next_loaded()
        assert loaded is not None, "one page was asked for"
        return loaded[1]

    def _runs_of(self, unit: int, param: ParamLayout, *, master: bool) -> Iterator[_Run]:
        for run in self._master_runs(unit) if master else self._param_runs(unit):
            if run.start < param.end and param.offset < run.end:
                yield run

    def _param_runs(self, unit: int) -> Iterator[_Run]:
        plan, pages = self._plan.units[unit], self._pages[unit]
        layout, step = plan.layout, self._plan.page_elements
        for index in range(plan.frame_count):
            start, section_end = index * step, layout.trainable_elements
            if index >= len(plan.spans):
                start = layout.frozen_offset + (index - len(plan.spans)) * step
                section_end = layout.frozen_offset + layout.frozen_elements
            address = self._device.address((plan.frame_offset + index) * self._plan.page_bytes)
            page = pages.params[index] if pages.params else -1
            yield _Run(page, None if pages.params else address, start, min(start + step, section_end))

    def _master_runs(self, unit: int) -> Iterator[_Run]:
        step = self._plan.page_bytes // 4
        for index, span in enumerate(self._pages[unit].spans):
            first = index * self._plan.page_elements
            for number, page in enumerate(span.master):
                start = first + number * step
                yield _Run(page, None, start, min(start + step, first + span.elements))


def _gather(to: int, layout: UnitLayout, values: Mapping[str, torch.Tensor], run: _Run, dtype: torch.dtype) -> None:
    """Fills a buffer with a run's elements, converted; gaps between parameters become zeros."""
    native.fill_zero(to, (run.end - run.start) * dtype.itemsize)
    for param in layout.params:
        first, last = max(run.start, param.offset), min(run.end, param.end)
        if first < last:
            flat = values[param.name].detach().reshape(-1)[first - param.offset : last - param.offset]
            part = flat.to(dtype).contiguous()
            native.copy_bytes(to + (first - run.start) * dtype.itemsize, part.data_ptr(), part.numel() * dtype.itemsize)


def _copy(to: int, to_start: int, source: int, source_start: int, param: ParamLayout, run: _Run, itemsize: int) -> None:
    """Copies the elements that a parameter has in a run between two buffers, given the element each begins at."""
    first, last = max(run.start, param.offset), min(run.end, param.end)
    native.copy_bytes(
        to + (first - to_start) * itemsize, source + (first - source_start) * itemsize, (last - first) * itemsize
    )
