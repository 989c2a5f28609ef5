"""Commits: durable states of the run, made on a thread of their own while training goes on.

A commit is a cut between two steps: every unit as its last update left it. Units whose update is done are captured at
once, the others as their update ends, and each one before its next update begins. To capture a page on the SSD is to
take a reference on its slot: no byte is copied, as an update writes to another slot. What lives in memory alone is
written to slots first, and its next update waits for that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import angelptm_native as native
import numpy as np
import torch

from angelptm.checkpoint.format import Manifest
from angelptm.checkpoint.header import BufferRecord, Header, units_from_layouts
from angelptm.checkpoint.records import NONE, PAGE_RECORD, Dtype, Kind, kind_dtype
from angelptm.device import Device
from angelptm.engine.kept import Durable, KeptCommits, Slot
from angelptm.engine.updates import Updates
from angelptm.errors import CheckpointError
from angelptm.pages import Catalogue
from angelptm.plan import Plan


@dataclass
class _Cut:
    """A commit in the making. ``records`` fill as units are captured; ``slots`` are the references it holds."""

    header: Header
    buffers: bytes
    records: np.ndarray
    tickets: Mapping[int, native.Ticket]
    copies: int  # slots that it still needs at most, for what is in no slot
    before_publish: Callable[[], None] | None
    captured: set[int] = field(default_factory=set)
    unsaved: dict[int, list[int]] = field(default_factory=dict)  # unit → positions among its pages
    slots: list[Slot] = field(default_factory=list)
    error: BaseException | None = None
    done: bool = False
    path: Path | None = None
    seconds: float = 0.0


class Commits:
    """Makes one commit at a time. The engine's thread calls everything here; the work is done on another one."""

    def __init__(
        self,
        durable: Durable,
        store: native.Store,
        plan: Plan,
        catalogue: Catalogue,
        updates: Updates,
        device: Device,
        *,
        keep: int,
        deadline_seconds: float,
    ) -> None:
        self.durable = durable
        self._store = store
        self._plan = plan
        self._updates = updates
        self._device = device
        self._deadline_seconds = deadline_seconds
        self._saver = store.make_saver()
        self._changed = threading.Condition()
        self._cut: _Cut | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self.kept = KeptCommits(durable, store, keep, deadline_seconds)
        # Pages on the device, by their first byte in the arena: frozen ones by the slot and CRC32C of their copy.
        self._fixed: dict[int, tuple[int, int, int]] = {}
        self.seconds = 0.0
        """Wall-clock seconds of the last commit, from the call to its manifest's being durable."""
        self._pages: list[list[int | None]] = []
        self._offsets: list[list[int]] = []
        self._frozen: list[list[bool]] = []
        self._first: list[int] = []
        rows: list[tuple[int, ...]] = []
        for unit in range(len(plan.units)):
            pages = catalogue.committed(unit)
            self._first.append(len(rows))
            self._pages.append([one.page for one in pages])
            self._offsets.append([one.offset for one in pages])
            self._frozen.append([one.frozen for one in pages])
            for one in pages:
                dtype = kind_dtype(Kind[one.kind], "bf16" if plan.param_itemsize == 2 else "fp32")
                size = one.bytes if one.kind == "STATES" else 0
                rows.append((unit, Kind[one.kind], dtype, 0, one.start, one.count, NONE, 0, 0, size, 0))
        self._template = np.array(rows, dtype=PAGE_RECORD)
        on_ssd = [
            page is not None and store.page_home(page) == native.Home.SSD for pages in self._pages for page in pages
        ]
        frozen = np.array([one for unit in self._frozen for one in unit], dtype=bool)
        self._changing_slots = int(np.count_nonzero(np.array(on_ssd, dtype=bool) & ~frozen))
        self._device_pages = [
            (offset, frozen)
            for pages, offsets, own in zip(self._pages, self._offsets, self._frozen)
            for page, offset, frozen in zip(pages, offsets, own)
            if page is None
        ]
        self._host_pages = sum(
            page is not None and store.page_home(page) == native.Home.HOST for pages in self._pages for page in pages
        )

    @property
    def folder(self) -> Path:
        return self.durable.path

    @property
    def written_bytes(self) -> int:
        """Bytes of host pages, buffers and the like that commits have written."""
        return self._saver.written_bytes

    def come_from(self, step: int) -> None:
        """The run goes on from the folder's commit of ``step``; later ones are of a history that it leaves.

        To be called when all of it was read. A run that was killed between a commit and the retirement of the one
        before has left one too many, which goes now: the newest is not damaged.
        """
        self.kept.come_from(step)
        self._recognise_device_pages(step)
        self.kept.retire()

    def begin(self, header: Header, buffers: bytes, before_publish: Callable[[], None] | None = None) -> None:
        """Starts a commit of the state after the last step; waits for the one before it, and raises its error.

        ``header`` lacks nothing but what the pages say; ``buffers`` is the content of its buffer space. On all ranks:
        each has its own pages written, and when the last of them are safe the first rank writes the manifest of all.
        ``before_publish`` runs on the commit's thread before the manifest appears: for records that must not be older.
        Raises CheckpointError for a folder of another history: the run does not come from its commits, or it has gone
        back to an earlier step by other means than loading the commit of it.
        """
        self.wait()
        if not self.durable.ranks.is_first:
            buffers = b""  # the first rank's are in the commit
        self.kept.require_own(header.step)
        self.kept.retire()
        on_device = sum(not frozen or offset not in self._fixed for offset, frozen in self._device_pages)
        copies = self._host_pages + on_device + -(-len(buffers) // self._plan.page_bytes)
        self.kept.make_room(copies)
        cut = _Cut(header, buffers, self._template.copy(), self._updates.pending(), copies, before_publish)
        with self._changed:
            self._cut = cut
            for unit in range(len(self._pages)):
                if unit not in cut.tickets:
                    self._capture(cut, unit)
        # No daemon: a commit that was begun completes also when the program ends without close().
        self._thread = threading.Thread(target=self._make, args=(cut,), name="angelptm-commit")
        self._thread.start()

    def lacks(self, unit: int) -> bool:
        """Whether a commit in the making is yet to capture the unit."""
        cut = self._cut
        return cut is not None and not cut.done and unit not in cut.captured

    def before_change(self, unit: int) -> None:
        """To be called when the unit's last update is waited for and its pages are about to be written to: sees to it
        that the commit in the making has them. One that has failed is passed over, since a step that has begun must
        not end half way: the next one raises its error."""
        cut = self._cut
        if cut is None or cut.done:
            return
        with self._changed:
            if cut.done or cut.error is not None:
                return
            self._capture(cut, unit)
            if not self._changed.wait_for(
                lambda: unit not in cut.unsaved or cut.error is not None, self._deadline_seconds
            ):
                raise native.DeadlineError(
                    f"waited {self._deadline_seconds} s for the commit of step {cut.header.step} to write unit "
                    f"{self._plan.units[unit].layout.name}"
                )

    def make_room(self) -> None:
        """To be called before updates: they have no room while the slots of the last commit are not yet free.

        Raises the error of a commit that failed; CheckpointError when readers hold commits that should be gone for
        longer than the deadline. Nothing was changed then.
        """
        cut, needed = self._cut, self._changing_slots + self._slots_in_flight
        if cut is not None and (cut.done or self._store.slot_free_count < needed + cut.copies):
            self.wait()
        if self._cut is None:
            self.kept.make_room(needed)

    @property
    def _slots_in_flight(self) -> int:
        return (
            self._plan.ssd_slots
            - self._plan.commit_slots
            - sum(tiers["ssd"] for tiers in self._plan.kind_bytes.values()) // self._plan.page_bytes
        )

    def wait(self) -> Path | None:
        """Returns when no commit is in the making: the path of the last one's manifest. Raises its error, once."""
        thread, cut = self._thread, self._cut
        if cut is None:
            return None
        if thread is not None:
            thread.join()  # its waits for pages have deadlines
        self._thread = self._cut = None
        self.seconds = cut.seconds
        if cut.error is not None:
            raise cut.error
        return cut.path

    def settle(self) -> None:
        """Returns when the commit in the making is over; its error stays for the next call that raises it."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Waits for the commit in the making, raises its error, and unlocks the folder. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            del self._saver
            self.durable.close()

    # On the commit's thread, but for _capture, which runs on either one with the lock held.

    def _capture(self, cut: _Cut, unit: int) -> None:
        if unit in cut.captured:
            return
        cut.captured.add(unit)
        positions = [position for position, page in enumerate(self._pages[unit]) if page is not None]
        unsaved = self._record(cut, unit, positions)
        unsaved += self._changing_on_device(unit)
        if unsaved:
            cut.unsaved[unit] = unsaved

    def _changing_on_device(self, unit: int) -> list[int]:
        """Trainable parameters on the device, which commits have where masters are made of them."""
        pages = zip(self._pages[unit], self._frozen[unit])
        return [position for position, (page, frozen) in enumerate(pages) if page is None and not frozen]

    def _record(self, cut: _Cut, unit: int, positions: Sequence[int]) -> list[int]:
        """Enters pages as they are now; returns those that are in no slot."""
        pages = [page for position in positions if (page := self._pages[unit][position]) is not None]
        unsaved = []
        for position, (state, file, slot, crc, version) in zip(positions, self._store.capture(pages)):
            record = cut.records[self._first[unit] + position]
            record["version"] = version
            if state == native.Captured.IN_SLOT:
                record["file"], record["slot"], record["crc"] = file, slot, crc
                cut.slots.append((file, slot))
            elif state == native.Captured.UNSAVED:
                unsaved.append(position)
        return unsaved

    def _make(self, cut: _Cut) -> None:
        native.Timeline.name_lane("commit")
        start = time.perf_counter()
        try:
            records = self.durable.ranks.gathered(lambda: self._prepare(cut), "making a commit")
            manifest = Manifest(cut.header, np.concatenate(records))
            slots, cut.slots = cut.slots, []
            cut.path = self.kept.publish(manifest, slots)
            self.kept.retire()
        except BaseException as error:
            with self._changed:  # from here on nobody captures for this commit
                cut.error = self._explained(error, cut)
                slots, cut.slots = cut.slots, []
            self._store.release_slots(slots)
        finally:
            cut.seconds = time.perf_counter() - start
            with self._changed:
                cut.done = True
                self._changed.notify_all()

    def _prepare(self, cut: _Cut) -> np.ndarray:
        """The records of this rank's pages, all of which are durable then."""
        for unit in range(len(self._pages)):
            if (ticket := cut.tickets.get(unit)) is not None:
                ticket.wait(self._deadline_seconds)
            with self._changed:
                self._capture(cut, unit)
                unsaved = cut.unsaved.get(unit)
            if unsaved:
                on_device = [one for one in unsaved if self._pages[unit][one] is None]
                in_memory = [one for one in unsaved if self._pages[unit][one] is not None]
                self._saver.save([page for one in in_memory if (page := self._pages[unit][one]) is not None])
                for position in on_device:
                    self._copy_from_device(cut, unit, position)
                with self._changed:
                    left = self._record(cut, unit, in_memory)
                    assert not left, "what was saved is in a slot"
                    del cut.unsaved[unit]
                    cut.copies -= len(unsaved)
                    self._changed.notify_all()
            self._record_frozen_device_pages(cut, unit)
        buffer_records = self._save_buffers(cut)
        if cut.before_publish is not None:
            cut.before_publish()
        self._saver.flush()
        records = np.concatenate([cut.records, buffer_records])
        records["file"][records["file"] != NONE] += self.durable.first_file
        return records

    def _explained(self, error: BaseException, cut: _Cut) -> BaseException:
        """Says what to do where the slots ran out."""
        if not isinstance(error, native.TierCapacityError):
            return error
        refused = CheckpointError(
            str(self.folder),
            f"no free slot for the commit of step {cut.header.step}",
            "room for what is in no slot yet",
            "The plan has one copy of frozen parameters: those that are changed between commits need more. Resume with "
            "a larger checkpoint.keep, which gives more slots, or change them less often.",
        )
        refused.__cause__ = error
        return refused

    def _record_frozen_device_pages(self, cut: _Cut, unit: int) -> None:
        """Frozen parameters that live on the device: written once, and again only when they were changed."""
        for position, (page, frozen) in enumerate(zip(self._pages[unit], self._frozen[unit])):
            if page is not None or not frozen:
                continue
            offset = self._offsets[unit][position]
            if offset not in self._fixed:
                self._fixed[offset] = self._save_from_device(unit, position)
            copy = self._fixed[offset]
            self._store.claim_slots([copy[:2]])
            self._enter_device_page(cut, unit, position, copy)

    def _copy_from_device(self, cut: _Cut, unit: int, position: int) -> None:
        """A page on the device that the next update changes."""
        self._enter_device_page(cut, unit, position, self._save_from_device(unit, position))

    def _save_from_device(self, unit: int, position: int) -> tuple[int, int, int]:
        size = int(self._template["count"][self._first[unit] + position]) * self._plan.param_itemsize
        return self._saver.save_bytes(self._device.address(self._offsets[unit][position]), size)

    def _enter_device_page(self, cut: _Cut, unit: int, position: int, copy: tuple[int, int, int]) -> None:
        record = cut.records[self._first[unit] + position]
        file, slot, crc = copy
        cut.slots.append((file, slot))
        record["file"], record["slot"], record["crc"], record["version"] = file, slot, crc, 1

    def _recognise_device_pages(self, step: int) -> None:
        """The copies that a commit has of frozen parameters on the device are used again, and not written anew."""
        missing = [
            (unit, position)
            for unit, pages in enumerate(self._pages)
            for position, page in enumerate(pages)
            if page is None and self._frozen[unit][position] and self._offsets[unit][position] not in self._fixed
        ]
        if not missing:
            return
        manifest = self.durable.owned_folder.load(step)
        header, mine = manifest.header, units_from_layouts([unit.layout for unit in self._plan.units])
        if (header.store_id, header.page_bytes, header.units) != (self.durable.store_id, self._plan.page_bytes, mine):
            return
        what = ["unit", "kind", "dtype", "start", "count"]
        copies = manifest.pages[(manifest.pages["kind"] == Kind.PARAM) & (manifest.pages["file"] != NONE)]
        found = {one[what].item(): (int(one["file"]), int(one["slot"]), int(one["crc"])) for one in copies}
        for unit, position in missing:
            copy = found.get(self._template[self._first[unit] + position][what].item())
            if copy is not None:
                self._store.claim_slots([copy[:2]])
                self._fixed[self._offsets[unit][position]] = copy

    def forget_device_pages(self) -> None:
        """To be called when frozen parameters on the device were changed: the next commit writes them again."""
        self._store.release_slots([(file, slot) for file, slot, _ in self._fixed.values()])
        self._fixed.clear()

    def _save_buffers(self, cut: _Cut) -> np.ndarray:
        content = torch.frombuffer(bytearray(cut.buffers), dtype=torch.uint8) if cut.buffers else torch.empty(0)
        step = self._plan.page_bytes
        rows = []
        for start in range(0, len(cut.buffers), step):
            size = min(step, len(cut.buffers) - start)
            file, slot, crc = self._saver.save_bytes(content.data_ptr() + start, size)
            cut.slots.append((file, slot))
            rows.append((NONE, Kind.BUFFER, Dtype.BYTES, 0, start, size, file, slot, crc, 0, 0))
        return np.array(rows, dtype=PAGE_RECORD)


def buffer_space(buffers: Mapping[str, torch.Tensor]) -> tuple[tuple[BufferRecord, ...], bytes]:
    """The records of a model's buffers, and their content one after the other."""
    records, content, offset = [], [], 0
    for name, value in buffers.items():
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = str(value.dtype).removeprefix("torch.")
        records.append(BufferRecord(name=name, dtype=dtype, shape=tuple(value.shape), offset=offset))  # type: ignore[arg-type]
        content.append(raw)
        offset += len(raw)
    return tuple(records), b"".join(content)
