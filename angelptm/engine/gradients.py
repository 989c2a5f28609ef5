"""Gradients in pages: taken from autograd parameter by parameter, accumulated, summed for the norm."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import angelptm_native as native
import torch

from angelptm.device import Device
from angelptm.engine.dtypes import NATIVE_DTYPES
from angelptm.engine.loading import loading
from angelptm.engine.readout import ReadOut
from angelptm.errors import AngelPTMError
from angelptm.pages import PageIds
from angelptm.plan import PEER, Plan
from angelptm.ranks import Ranks, Reducer
from angelptm.ranks.reduce import LeafShape
from angelptm.units import ParamLayout, UnitLayout, leaves_of
from angelptm.units.layout import ALIGN_ELEMENTS

_Callback = Callable[[], None]


@dataclass
class _UnitGradient:
    """Since the last ``clear``. ``norms[name]``: the sums of squares of the parameter's part in leaves of the tree over
    the unit's elements (GRAD_BLOCK of them in each), by index of the leaf.
    ``earlier``: elements (start, end) that hold gradients of former steps, to which this one is added."""

    norms: dict[str, dict[int, float]] = field(default_factory=dict)
    earlier: list[tuple[int, int]] = field(default_factory=list)
    spilled: set[int] = field(default_factory=set)  # SSD pages whose slot holds gradients of this window


@dataclass
class _OpenPage:
    """An SSD page whose content is in a staging frame; ``waiting`` are the parameters still to come in this pass."""

    frame: int
    waiting: set[str]


@dataclass(frozen=True)
class _Piece:
    """Elements of a parameter on one page: from ``first`` of the unit, at byte ``offset`` of the gradient."""

    page: int
    first: int
    count: int
    offset: int
    covers_page: bool  # the parameter does
    ends_page: bool  # the parameter's part of it
    is_first: bool


class Gradients:
    """GRAD pages of all units.

    Pages that live on the host are added to where they are. Pages that live on the SSD are filled in a staging frame
    and written behind as soon as every parameter in them has come, or when frames run short.
    """

    def __init__(
        self,
        plan: Plan,
        pages: PageIds,
        store: native.Store,
        device: Device,
        grad_dtype: torch.dtype,
        name_page: Callable[[int], str],
        deadline_seconds: float,
        ranks: Ranks,
    ) -> None:
        self._plan = plan
        self._name_page = name_page
        self._store = store
        self._mover = store.mover
        self._device = device
        self._dtype = grad_dtype
        self._page_elements = plan.grad_page_elements
        # Where several steps are added up once their norm is known, a step's own are apart till then.
        self._pages = [[page for span in unit.spans for page in span.step_grad or span.grad] for unit in pages]
        self._pages_change_frames = plan.sweeps
        self._homes = [[home for span in unit.spans for home in span.grad_homes] for unit in plan.units]
        self._members = [_members(unit.layout, self._page_elements) for unit in plan.units]
        self._units = [_UnitGradient() for _ in plan.units]
        self._unit_of = {param.name: unit.layout.index for unit in plan.units for param in unit.layout.params}
        self._open: dict[tuple[int, int], _OpenPage] = {}
        # Units can be fetched all the same, as the fetcher's frames are not counted here.
        self._max_open = max(1, plan.staging_frames - plan.fetch_frames)
        self._finite = True
        self._adds = False  # to what the pages have, in the gradient that is being taken
        self.copy_seconds = 0.0
        self._under_way = Counter[str]()  # gradients that the device has, by parameter
        self._readout: ReadOut | None = None
        if device.copies_out is not None:
            frames = [self._mover.staging_frame() for _ in range(plan.readout_frames)]
            self._readout = ReadOut(device, device.copies_out, frames, self._mover.address, deadline_seconds)
        self._ranks = ranks
        self._reducer: Reducer | None = None
        self._own_elements = {
            param.name: _elements_of(plan, unit.layout.index, param)
            for unit in plan.units
            for param in unit.layout.params
            if param.trainable
        }

    def reduce(self, callbacks: Callable[[int, int, ParamLayout], tuple[_Callback, _Callback]]) -> None:
        """To be called first: where there are other ranks, their gradients are added to this one's from here on.
        ``callbacks`` makes ``before`` and ``done`` of accumulate for a unit's leaf of which they alone have one."""
        if self._ranks.is_alone:
            return

        def for_others(unit: int, leaf: int) -> Callable[[torch.Tensor], None]:
            param = leaves_of(self._plan.units[unit].layout)[leaf]
            before, done = callbacks(unit, leaf, param)
            self._under_way[param.name] += 1
            return lambda gradient: self._reduced(unit, param, gradient, before, done)

        shapes, device = _leaf_shapes(self._plan), self._device.torch_device
        self._reducer = Reducer(self._ranks, shapes, device, torch.float32, for_others)

    def accumulate(
        self, unit: int, leaf: int, param: ParamLayout, gradient: torch.Tensor, *, before: _Callback, done: _Callback
    ) -> None:
        """Adds the gradient of a parameter's leaf, of any float dtype. ``before`` is called before the unit's pages
        change, ``done`` when they have the gradient: both in this call where there is one rank and the device's tensors
        are the CPU's, else in this one or in a later one, of ``settle`` at the latest.

        Of several ranks' gradients it is the mean that is added, to the pages that this rank has.
        """
        if gradient.layout is not torch.strided:
            raise AngelPTMError(
                f"parameter {param.name}: its gradient is sparse; only dense gradients are supported. "
                "Use sparse=False in the embedding."
            )
        if self._reducer is None:
            self._add(unit, param, gradient, before, done)
            return
        self._under_way[param.name] += 1
        self._reducer.take(unit, leaf, gradient, lambda mean: self._reduced(unit, param, mean, before, done))

    def _reduced(
        self, unit: int, param: ParamLayout, gradient: torch.Tensor, before: _Callback, done: _Callback
    ) -> None:
        self._under_way[param.name] -= 1

        def taken() -> None:
            self._units[unit].norms.setdefault(param.name, {})  # whoever's its pages are, all ranks know of it
            done()

        self._add(unit, param, gradient, before, taken)
        if self._readout is not None:
            self._readout.wait()  # what follows from a gradient comes at the same place of the step on all ranks

    def _add(self, unit: int, param: ParamLayout, gradient: torch.Tensor, before: _Callback, done: _Callback) -> None:
        source = gradient.contiguous()
        if source.dtype not in NATIVE_DTYPES:
            source = source.float()
        pieces = self._pieces_of(param, source.itemsize)
        if self._readout is None:
            for piece in pieces:
                self._take(unit, param, piece, source.dtype, before, source.data_ptr() + piece.offset)
            done()
            return
        self._under_way[param.name] += 1
        self._readout.begin()
        for piece in pieces:
            take = partial(self._take, unit, param, piece, source.dtype, before)
            self._readout.read(source, piece.offset, piece.count * source.itemsize, take)

        def taken() -> None:
            self._under_way[param.name] -= 1
            done()

        self._readout.then(taken)

    def settle(self) -> None:
        """Returns when all gradients of a pass are in their pages. On all ranks, when the pass is over on each."""
        if self._reducer is not None:
            self._reducer.finish()
        self.look()

    def look(self) -> None:
        """Returns when all gradients that are on their way are in their pages."""
        if self._reducer is not None:
            self._reducer.land()
        if self._readout is not None:
            self._readout.wait()

    def own_elements(self, param: ParamLayout) -> int:
        """Of a trainable parameter: those of which this rank has the gradient."""
        return self._own_elements[param.name]

    def _pieces_of(self, param: ParamLayout, itemsize: int) -> list[_Piece]:
        """A parameter's elements by page, and no more at once than a frame holds. Each piece but the first begins with
        a leaf of the norm's tree."""
        found: list[_Piece] = []
        most = self._plan.page_bytes // itemsize // native.GRAD_BLOCK * native.GRAD_BLOCK
        homes = self._homes[self._unit_of[param.name]]
        for page in range(param.offset // self._page_elements, -(-param.end // self._page_elements)):
            if homes[page] == PEER:
                continue
            start, stop = page * self._page_elements, (page + 1) * self._page_elements
            first, end = max(param.offset, start), min(param.end, stop)
            covered = first == start and end == stop
            while first < end:
                until = min(end, first // native.GRAD_BLOCK * native.GRAD_BLOCK + most)
                offset = (first - param.offset) * itemsize
                found.append(_Piece(page, first, until - first, offset, covered, until == end, not found))
                first = until
        return found

    def _take(
        self, unit: int, param: ParamLayout, piece: _Piece, dtype: torch.dtype, before: _Callback, source: int
    ) -> None:
        """Adds a piece of a gradient that lies at the address ``source``."""
        start = time.perf_counter()
        if piece.is_first:
            before()
            self._adds = param.name in self._units[unit].norms
        sums = self._units[unit].norms.setdefault(param.name, {})
        first, end, page = piece.first, piece.first + piece.count, piece.page
        address = self._address(unit, page, fresh_is_covered=piece.covers_page)
        add = self._adds or any(begin <= first < stop for begin, stop in self._units[unit].earlier)
        leaves, finite = native.accumulate_leaves(
            address + (first - page * self._page_elements) * self._dtype.itemsize,
            NATIVE_DTYPES[self._dtype],
            source,
            NATIVE_DTYPES[dtype],
            piece.count,
            add,
            first,
        )
        # A page begins with a leaf, so none has parts of the parameter on two pages.
        sums.update(enumerate(leaves, first // native.GRAD_BLOCK))
        self._finite &= finite
        if piece.ends_page:
            if self._pages_change_frames and not add:
                self._clear_gap(address, end, page)
            self._contributed(unit, page, param.name)
        self._device.read_bytes += piece.count * dtype.itemsize
        self.copy_seconds += time.perf_counter() - start

    def _clear_gap(self, address: int, end: int, page: int) -> None:
        """After a parameter that ends there: runs of neighbouring ones reach over the gap, which must hold zeros."""
        stop = min(-(-end // ALIGN_ELEMENTS) * ALIGN_ELEMENTS, (page + 1) * self._page_elements)
        offset = (end - page * self._page_elements) * self._dtype.itemsize
        native.fill_zero(address + offset, (stop - end) * self._dtype.itemsize)

    def _address(self, unit: int, page: int, *, fresh_is_covered: bool) -> int:
        """Where the page's content is, in memory now."""
        page_id = self._pages[unit][page]
        if self._homes[unit][page] == "host":
            return self._store.home_address(page_id)
        opened = self._open.get((unit, page))
        if opened is None:
            if page in self._units[unit].spilled:
                frame = self._reload(page_id)
            else:
                frame = self._frame()
                if not fresh_is_covered:
                    native.fill_zero(self._mover.address(frame), self._plan.page_bytes)
            opened = self._open[(unit, page)] = _OpenPage(frame, set(self._members[unit][page]))
        return self._mover.address(opened.frame)

    def _frame(self) -> int:
        while len(self._open) >= self._max_open:
            self._spill(next(iter(self._open)))
        while (frame := self._mover.try_staging_frame()) is None:
            if not self._open:
                return self._mover.staging_frame()  # raises, and says what is missing
            self._spill(next(iter(self._open)))
        return frame

    def _reload(self, page_id: int) -> int:
        self._mover.release(self._frame())  # makes sure that the load below finds one
        with loading(self._mover, [page_id], self._name_page):
            self._mover.next_loaded()
        return self._mover.take_loaded()

    def _contributed(self, unit: int, page: int, name: str) -> None:
        opened = self._open.get((unit, page))
        if opened is not None:
            opened.waiting.discard(name)
            if not opened.waiting:
                self._spill((unit, page))

    def _spill(self, key: tuple[int, int]) -> None:
        unit, page = key
        opened = self._open.pop(key)
        self._mover.write_behind(self._pages[unit][page], opened.frame)
        self._units[unit].spilled.add(page)

    def flush(self) -> None:
        """Writes every open page and waits: all gradients are in their pages then."""
        for key in list(self._open):
            self._spill(key)
        self._mover.drain()

    def add_to(self, unit: int, earlier: list[tuple[int, int]]) -> None:
        """The unit's pages have gradients of former steps in these elements, (start, end)."""
        assert not self._units[unit].norms, "before the first gradient of this step"
        self._units[unit].earlier = earlier

    def uses_ssd(self, unit: int) -> bool:
        """Whether gradients of the unit live on the SSD."""
        return "ssd" in self._homes[unit]

    def has(self, name: str) -> bool:
        """Whether the parameter has a gradient since the last ``clear``."""
        return name in self._units[self._unit_of[name]].norms or self._under_way[name] > 0

    def params_with_gradient(self, unit: int) -> set[str]:
        return set(self._units[unit].norms)

    @property
    def finite(self) -> bool:
        """Of what this rank has."""
        return self._finite

    def norm(self) -> float:
        """The global L2 norm of the accumulated gradients; independent of pages, tiers and ranks. On all ranks."""
        found: list[tuple[int, list[float]]] = []  # of each parameter: its first leaf of the tree, and their sums
        for plan, unit in zip(self._plan.units, self._units):
            for param in plan.layout.params:
                if (sums := unit.norms.get(param.name)) is not None and param.numel:
                    first, end = param.offset // native.GRAD_BLOCK, -(-param.end // native.GRAD_BLOCK)
                    found.append((first, [sums.get(leaf, 0.0) for leaf in range(first, end)]))
        if not self._ranks.share.is_whole:
            flat = torch.tensor([one for _, sums in found for one in sums], dtype=torch.float64)
            self._ranks.add_up(flat, "the norm of the gradients")
            rest = iter(flat.tolist())
            found = [(first, [next(rest) for _ in sums]) for first, sums in found]
        return float(sum(native.tree_sum(sums, first) for first, sums in found) ** 0.5)

    def forget(self, unit: int) -> None:
        """The updater has the unit's gradients: the next one starts afresh."""
        self._units[unit] = _UnitGradient()

    def clear(self) -> None:
        """Drops all gradients, and the slots they hold."""
        if self._reducer is not None:
            self._reducer.drop()
        if self._readout is not None:
            self._readout.drop()
        self._under_way.clear()
        for opened in self._open.values():
            self._mover.release(opened.frame)
        self._open.clear()
        self._mover.drain()
        for unit, gradient in enumerate(self._units):
            for page in gradient.spilled:
                self._store.discard(self._pages[unit][page])
            self._units[unit] = _UnitGradient()
        self._finite = True

    def passed(self) -> None:
        """After a step: the finiteness of what comes next is unknown again."""
        self._finite = True


def _elements_of(plan: Plan, unit: int, param: ParamLayout) -> int:
    """How many of a parameter's elements this rank has."""
    return sum(end - start for start, end, owner in plan.pieces_of(unit, param) if owner == plan.share.index)


def _leaf_shapes(plan: Plan) -> dict[tuple[int, int], LeafShape]:
    """Of each (unit, leaf)."""
    found = {}
    for unit in plan.units:
        for leaf, param in enumerate(leaves_of(unit.layout)):
            if param.trainable:
                found[unit.layout.index, leaf] = LeafShape(
                    param.name, tuple(param.shape), plan.pieces_of(unit.layout.index, param)
                )
    return found


def _members(layout: UnitLayout, page_elements: int) -> list[set[str]]:
    """Names of the trainable parameters that have elements in each page."""
    count = -(-layout.trainable_elements // page_elements)
    members: list[set[str]] = [set() for _ in range(count)]
    trainable: Sequence[ParamLayout] = [param for param in layout.params if param.trainable]
    for param in trainable:
        for page in range(param.offset // page_elements, -(-param.end // page_elements)):
            members[page].add(param.name)
    return members
