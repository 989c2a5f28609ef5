# The native module. All addresses are integers; whoever calls owns the memory and keeps it alive.

# ---- kernels (csrc/bind/bind_kernels.cpp) ----

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from typing_extensions import Buffer

from io_engine.errors import IoError

class DType(Enum):
    F32 = ...
    BF16 = ...

class Rule(Enum):
    ADAMW = ...
    SGD = ...
    LION = ...

class Isa(Enum):
    SCALAR = ...
    AVX2 = ...
    AVX512 = ...

class Hyper:
    rule: Rule
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    dampening: float
    nesterov: bool
    first_step: bool
    bias_correction1: float
    bias_correction2_sqrt: float
    grad_scale: float
    seed: int
    step: int
    def __init__(self) -> None: ...

class MasterFormat(Enum):
    F32 = ...
    SPLIT = ...

class MomentFormat(Enum):
    F32 = ...
    BF16 = ...
    INT8 = ...

class Moment(Enum):
    EXP_AVG = ...
    EXP_AVG_SQ = ...

class MomentCodes:
    def __init__(self, format: MomentFormat, values: int, scales: int = 0) -> None: ...

BLOCK8: int

def rounding_key(seed: int, step: int, unit: int) -> int: ...
def decode(moment: Moment, codes: MomentCodes, to: int, count: int) -> None: ...
def encode(moment: Moment, from_: int, codes: MomentCodes, count: int, key: int, first_element: int) -> None: ...
def join_master(param: int, remainder: int, master: int, count: int) -> None: ...
def split_master(master: int, param: int, remainder: int, count: int) -> None: ...
def step_compact(
    hyper: Hyper,
    master_format: MasterFormat,
    master: int,
    exp_avg: MomentCodes,
    exp_avg_sq: MomentCodes,
    grad: int,
    grad_dtype: DType,
    old_param: int,
    param: int,
    param_dtype: DType,
    count: int,
    key: int,
    first_element: int,
) -> None: ...

class GradStats:
    @property
    def sum_squares(self) -> float: ...
    @property
    def finite(self) -> bool: ...

GRAD_BLOCK: int

def moment_count(rule: Rule) -> int: ...
def step(
    hyper: Hyper,
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    grad_dtype: DType,
    param: int,
    param_dtype: DType,
    count: int,
) -> None: ...
def memory_ceiling(
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    grad_dtype: DType,
    param: int,
    param_dtype: DType,
    count: int,
    past_cache: bool,
) -> None: ...
def accumulate(
    dst: int, dst_dtype: DType, src: int, src_dtype: DType, count: int, add: bool, first_element: int
) -> GradStats: ...
def accumulate_leaves(
    dst: int, dst_dtype: DType, src: int, src_dtype: DType, count: int, add: bool, first_element: int
) -> tuple[list[float], bool]: ...
def tree_sum(values: Sequence[float], first_index: int = 0) -> float: ...
def isa_name(isa: Isa) -> str: ...
def isa_supported(isa: Isa) -> bool: ...
def isa_in_use() -> Isa: ...
def use_isa(isa: Isa) -> None: ...

# ---- end of kernels ----

# ---- bind_io.cpp: files and the I/O engine. Buffers travel as address and length; the caller keeps them alive. ----

class Backend:
    AUTO: Backend
    URING: Backend
    THREADS: Backend

class File:
    def __init__(
        self,
        path: str,
        *,
        create: bool = ...,
        read_only: bool = ...,
        direct: bool = ...,
        unlink: bool = ...,
        allocate_bytes: int = ...,
    ) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def direct(self) -> bool: ...
    @property
    def buffered_reason(self) -> str: ...
    @property
    def allocation_note(self) -> str: ...
    @property
    def memory_alignment(self) -> int: ...
    @property
    def offset_alignment(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...

class CrashPlan:
    """Shared by the engines whose FaultPlan names it. ``kill_at``: SIGKILL at that write or sync, counted from 1.
    ``journal``: where io_engine.power_cut finds what to undo; emptied now."""

    def __init__(self, *, seed: int = ..., kill_at: int = ..., journal: str = ...) -> None: ...
    @property
    def count(self) -> int:
        """Writes and syncs so far."""

class FaultPlan:
    def __init__(
        self,
        *,
        seed: int = ...,
        short_transfer: float = ...,
        eintr: float = ...,
        eagain: float = ...,
        eio: float = ...,
        enospc: float = ...,
        delay: float = ...,
        delay_seconds: float = ...,
        reorder: bool = ...,
        crash: CrashPlan | None = ...,
    ) -> None: ...

class Counters:
    @property
    def read_bytes(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...
    @property
    def read_count(self) -> int: ...
    @property
    def write_count(self) -> int: ...
    @property
    def resumed_count(self) -> int: ...
    @property
    def retried_count(self) -> int: ...
    @property
    def failed_count(self) -> int: ...
    @property
    def sync_count(self) -> int: ...

class Engine:
    def __init__(
        self,
        files: Sequence[File],
        depth: int,
        *,
        backend: Backend = ...,
        regions: Sequence[tuple[int, int]] = ...,
        faults: FaultPlan | None = ...,
        close_seconds: float = ...,
    ) -> None: ...
    def submit(self, transfers: Sequence[tuple[int, bool, int, int, int, int]]) -> None:
        """(tag, whether it writes, file index, offset, buffer address, bytes)"""

    def reap(self, at_least: int, seconds: float) -> list[tuple[int, IoError | None]]:
        """Raises IoError(ETIMEDOUT) naming the oldest transfer; what had finished comes with the next call."""

    def reap_some(self, at_least: int, seconds: float) -> list[tuple[int, IoError | None]]:
        """As reap, but returns fewer when the time is over."""

    def sync(self, seconds: float) -> None:
        """Flushes every file to stable storage. RuntimeError while anything is unfinished; IoError("sync", path, ...)
        of the first file that failed, after which what was written since its last sync may be lost for good."""

    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def unfinished(self) -> int: ...
    @property
    def counters(self) -> Counters: ...
    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def notes(self) -> str: ...
    @property
    def chosen_because(self) -> str: ...

# ---- pages (csrc/bind/bind_pages.cpp) ----

class TierCapacityError(RuntimeError): ...
class StoppedError(RuntimeError): ...
class DeadlineError(TimeoutError): ...

class Ticket:
    def done(self) -> bool: ...
    def wait(self, deadline_seconds: float) -> None: ...

class Home(Enum):
    HOST = ...
    SSD = ...

class Captured(Enum):
    ZEROS = ...
    IN_SLOT = ...
    UNSAVED = ...

class Store:
    """``files``: (path, slot count, weight) each; they have no names unless ``keep_files``. A slot is (file, index)."""

    def __init__(
        self,
        page_bytes: int,
        host_frames: int,
        files: Sequence[tuple[str, int, float]],
        *,
        backend: Backend = ...,
        queue_depth: int = ...,
        direct: bool = ...,
        deadline_seconds: float = ...,
        faults: FaultPlan | None = ...,
        keep_files: bool = ...,
    ) -> None: ...
    def add_page(self, home: Home, used_bytes: int) -> int: ...
    def add_page_at(self, address: int, used_bytes: int) -> int: ...
    def page_version(self, page: int) -> int: ...
    def page_home(self, page: int) -> Home: ...
    def home_address(self, page: int) -> int: ...
    def hold(self, pages: Sequence[int]) -> list[tuple[int, int]]:
        """(frame, version) of each host page: content that stays there until ``release_held``."""

    def release_held(self, frames: Sequence[int]) -> None: ...
    def publish_in_place(self, page: int) -> None: ...
    def discard(self, page: int) -> None: ...
    def page_written(self, page: int) -> bool: ...
    def claim_slots(self, slots: Sequence[tuple[int, int]]) -> None:
        """One reference for each entry, free or not."""

    def release_slots(self, slots: Sequence[tuple[int, int]]) -> None: ...
    def slot_reference_count(self, file: int, index: int) -> int: ...
    def capture(self, pages: Sequence[int]) -> list[tuple[Captured, int, int, int, int]]:
        """(state, file, index, CRC32C, version) each; a slot comes with a reference that is the caller's."""

    def adopt(self, page: int, file: int, index: int, crc: int, version: int) -> None: ...
    def make_saver(self) -> PageSaver: ...
    def drive_use(self) -> dict[str, tuple[int, float]]: ...
    def probe_drive(self, seconds: float) -> dict[str, float] | None:
        """Bytes per second: read_, write_, mixed_bytes_per_s; latency_seconds; and the slots borrowed, bytes moved."""

    @property
    def slot_counts(self) -> list[int]: ...
    @property
    def slot_free_count(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def page_count(self) -> int: ...
    @property
    def host_address(self) -> int: ...
    @property
    def host_frame_count(self) -> int: ...
    @property
    def host_used_count(self) -> int: ...
    @property
    def host_peak_count(self) -> int: ...
    @property
    def slot_count(self) -> int: ...
    @property
    def slot_used_count(self) -> int: ...
    @property
    def slot_peak_count(self) -> int: ...
    @property
    def ssd_page_peak_count(self) -> int: ...
    @property
    def notes(self) -> list[str]: ...
    @property
    def mover(self) -> PageMover: ...

class PageMover:
    def begin_load(self, pages: Sequence[int]) -> None: ...
    def next_loaded(self) -> tuple[int, int, int] | None:
        """(index in the load, address, content bytes); None when every page was handed out."""

    def take_loaded(self) -> int: ...
    def end_load(self) -> None: ...
    def staging_frame(self) -> int: ...
    def try_staging_frame(self) -> int | None: ...
    def release(self, frame: int) -> None: ...
    def write_behind(self, page: int, frame: int) -> None: ...
    def drain(self) -> None: ...
    def address(self, frame: int) -> int: ...
    @property
    def wait_seconds(self) -> float: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def written_bytes(self) -> int: ...

class Fetcher:
    def __init__(
        self, store: Store, most_frames: int, memory: object = None, stream: CopyStream | None = None
    ) -> None: ...
    def fetch(
        self,
        what: str,
        items: Sequence[tuple[int, int]],
        *,
        after: Ticket | None = None,
        urgent: bool = False,
        computed: int = 0,
    ) -> Ticket:
        """``items``: (page, address that gets its content) each. ``computed``: see CopyStream."""

    def fetch_held(
        self,
        what: str,
        items: Sequence[tuple[int, int, int]],
        *,
        release: bool,
        urgent: bool = False,
        computed: int = 0,
    ) -> Ticket:
        """``items``: (page, address that gets its content, frame that is held) each; with ``release`` the holds become
        the fetcher's."""

    def read_ahead(self, pages: Sequence[int]) -> None: ...
    def let_go(self) -> None: ...
    @property
    def totals(self) -> dict[str, float]: ...

class PageSaver:
    def save(self, pages: Sequence[int]) -> None: ...
    def save_bytes(self, address: int, bytes: int) -> tuple[int, int, int]:
        """(file, index, CRC32C); the slot is the caller's."""

    def flush(self) -> None: ...
    @property
    def written_bytes(self) -> int: ...

def copy_bytes(to: int, from_: int, bytes: int) -> None: ...
def fill_zero(address: int, bytes: int) -> None: ...

# ---- device (csrc/bind/bind_device.cpp) ----

class DeviceError(RuntimeError): ...

class CopyStream:
    """Copies between host memory and a device that works on its own time, one after the other."""

    def computed(self, stream: int = 0) -> int:
        """A mark of all work that the computing stream (its runtime's handle) has been given so far."""

    def wait_for(self, computed: int) -> None:
        """Copies from here on run when that work is done. Uses the mark up."""

    def copy(self, to: int, from_: int, bytes: int) -> None:
        """By address; from 0: zeros. Neither side is touched by others until a later mark has passed."""

    def mark(self) -> int: ...
    def passed(self, mark: int) -> bool: ...

class CudaStream(CopyStream):
    """``runtime``: addresses of libcudart's functions by name."""

    def __init__(self, runtime: Mapping[str, int], device: int) -> None: ...

class LateDevice:
    """For tests: runs copies late and in any order that is allowed, and finds what is not."""

    def __init__(self, seed: int, most_delay_us: int) -> None: ...
    def add_stream(self, name: str) -> CopyStream: ...
    def begin_use(self, start: int, bytes: int, what: str) -> None: ...
    def end_use(self, start: int, bytes: int) -> None: ...

# ---- heap (csrc/bind/bind_heap.cpp) ----

def return_freed_blocks(at_least_bytes: int) -> bool: ...

class KeptMemory:
    """Freed memory that stays for who allocates next, up to an allowance. One thread uses it."""

    def __init__(self, allowance_bytes: int) -> None: ...
    def look(self) -> bool:
        """Gives everything free back if that is more than the allowance; says whether it did."""

    def trim(self) -> None: ...
    @property
    def trims(self) -> int: ...

# ---- timeline (csrc/bind/bind_timeline.cpp) ----

class Timeline:
    """One recorder for the process; lanes are threads, times are those of time.perf_counter_ns."""

    @staticmethod
    def start(capacity: int) -> None: ...
    @staticmethod
    def stop() -> None: ...
    @staticmethod
    def recording() -> bool: ...
    @staticmethod
    def name_lane(name: str) -> None: ...
    @staticmethod
    def now_ns() -> int: ...
    @staticmethod
    def what_names() -> list[str]: ...
    @staticmethod
    def record(what: int, start_ns: int, end_ns: int, id: int = 0, bytes: int = 0) -> None: ...
    @staticmethod
    def take() -> tuple[list[dict[str, Any]], int]: ...

# ---- updater (csrc/bind/bind_updater.cpp) ----

class StatePlace:
    def __init__(self, page: int, offset: int = 0, scales: int = 0) -> None: ...

class StateRun:
    def __init__(
        self,
        *,
        start: int,
        count: int,
        master_format: MasterFormat = ...,
        exp_avg_format: MomentFormat = ...,
        exp_avg_sq_format: MomentFormat = ...,
        master: StatePlace,
        exp_avg: StatePlace | None,
        exp_avg_sq: StatePlace | None,
    ) -> None: ...

class Span:
    def __init__(
        self,
        *,
        elements: int,
        states: Sequence[int],
        runs: Sequence[StateRun],
        grad: Sequence[int],
        param: int | None,
        device_param: int | None,
        step_grad: Sequence[int] = (),
        unit: int = 0,
        first_element: int = 0,
    ) -> None: ...

class SweepOrder:
    ROUND_ROBIN: SweepOrder
    MOST_GRADIENTS: SweepOrder
    NEXT_NEEDED: SweepOrder

class Combine:
    MEAN: Combine
    SUM: Combine

class SweepOptions:
    def __init__(
        self,
        *,
        order: SweepOrder = ...,
        combine: Combine = ...,
        spare_frames: int,
        ranks: Sequence[int],
        niceness: int = 0,
    ) -> None:
        """``ranks``: of each span. ``niceness``: of the updating threads, above the process's."""

class Updater:
    def __init__(
        self,
        store: Store,
        *,
        threads: int,
        spans: Sequence[Span],
        ring_depth: int,
        rule: Rule,
        grad_dtype: DType,
        param_dtype: DType,
        write_depth: int = 3,
        fetcher: Fetcher | None = None,
        memory: object = None,
        sweep: SweepOptions | None = None,
        grad_page_elements: int = 0,
    ) -> None: ...
    def submit(
        self,
        what: str,
        work: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
        hypers: Sequence[Hyper],
        rank: int = 0,
    ) -> tuple[Ticket, Ticket]:
        """(done, published). ``work``: (span index, [(start, count, hyper index), ...]) each."""

    def expect(self, spans: Sequence[int]) -> None: ...
    def recall(self) -> None: ...

    # With ``sweep`` alone, and then instead of ``submit``.

    def open(self, spans: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The elements, (start, count), of each span that hold gradients."""

    def open_empty(self, spans: Sequence[int], what: str) -> None: ...
    def put_back(self, spans: Sequence[int]) -> None: ...
    def hand_over(
        self,
        work: Sequence[tuple[int, Sequence[tuple[int, int, int]]]],
        hypers: Sequence[Hyper],
        from_step: bool,
    ) -> None:
        """``work`` as for submit. ``from_step``: the gradients are in the spans' ``step_grad`` pages."""

    def wait_published(self, spans: Sequence[int], most_behind: int, what: str) -> None: ...
    def wait_all_published(self, spans: Sequence[int], seconds: float) -> bool: ...
    def wait_applied(self, spans: Sequence[int], counts: Sequence[int], what: str) -> None: ...
    def are_applied(self, spans: Sequence[int], counts: Sequence[int]) -> bool: ...
    def produced(self, spans: Sequence[int]) -> list[int]: ...
    def published(self, spans: Sequence[int]) -> list[int]: ...
    def record(self) -> None: ...
    def recorded(self) -> tuple[list[list[int]], list[list[int]]]:
        """(takes, uses): of each span, the gradients of each update, and the updates published before each use."""

    def replay(self, takes: Sequence[Sequence[int]], uses: Sequence[Sequence[int]]) -> None: ...
    def end_replay(self) -> None: ...
    def used(self, spans: Sequence[int], publishes: Sequence[int]) -> None: ...
    def await_use(self, spans: Sequence[int], what: str) -> None: ...
    def set_position(self, rank: int) -> None: ...
    def utilisation(self) -> dict[str, float]: ...

# ---- checksum (csrc/bind/bind_checksum.cpp) ----

def crc32c(data: Buffer, seed: int = 0) -> int:
    """CRC32C of the bytes of ``data`` (C-contiguous, else BufferError); ``seed``: the checksum of what came before."""

def crc32c_at(address: int, bytes: int, seed: int = 0) -> int: ...
def crc32c_with(kind: str, data: Buffer, seed: int = 0) -> int:
    """By one of ``crc32c_kinds()``; ValueError for any other."""

def crc32c_kinds() -> list[str]:
    """What this CPU can run, slowest first: of "table", "sse4.2", "avx512", "armv8"."""

def crc32c_implementation() -> str:
    """The kind that ``crc32c`` uses here."""
