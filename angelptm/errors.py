"""The errors that a user can meet. Each carries the facts; its text says what, where, what was expected, the remedy.

A command line prints the text alone and exits with code 2; programs read the attributes.
"""

from __future__ import annotations


class AngelPTMError(Exception):
    """Base of every operating error of this package. Programmer's errors are assertions instead."""


class ConfigError(AngelPTMError):
    """A configuration value cannot be used.

    ``key`` is the dotted path (``tiers.host``), ``value`` what was found there, ``expected`` a phrase that completes
    "expected ...", ``remedy`` an optional sentence, for example a near spelling.
    """

    def __init__(self, key: str, value: object, expected: str, remedy: str = "") -> None:
        self.key, self.value, self.expected, self.remedy = key, value, expected, remedy
        text = f"config: {key}: found {value!r}, expected {expected}."
        super().__init__(f"{text} {remedy}".rstrip())


class CapacityError(AngelPTMError):
    """A tier cannot hold what the run needs; raised before anything is allocated. Sizes are bytes."""

    def __init__(self, tier: str, needed_bytes: int, available_bytes: int, what: str, remedy: str) -> None:
        from angelptm.sizes import format_bytes

        self.tier, self.needed_bytes, self.available_bytes, self.what, self.remedy = (
            tier,
            needed_bytes,
            available_bytes,
            what,
            remedy,
        )
        super().__init__(
            f"tier {tier}: {what} needs {format_bytes(needed_bytes)} ({needed_bytes} bytes), "
            f"available {format_bytes(available_bytes)} ({available_bytes} bytes). {remedy}"
        )


class DataError(AngelPTMError):
    """A data file is missing, malformed or does not fit the model."""

    def __init__(self, path: str, found: str, expected: str, remedy: str = "") -> None:
        self.path, self.found, self.expected, self.remedy = path, found, expected, remedy
        super().__init__(f"data: {path}: found {found}, expected {expected}. {remedy}".rstrip())


class NonFiniteError(AngelPTMError):
    """A loss or gradient is inf or NaN. The step that met it changed no parameter and no state."""


class ParkedError(AngelPTMError):
    """A parameter's values were asked for while they are not on the device."""


class CheckpointError(AngelPTMError):
    """A checkpoint, or a part of it, cannot be used. Nothing was changed."""

    def __init__(self, path: str, found: str, expected: str, remedy: str = "") -> None:
        self.path, self.found, self.expected, self.remedy = path, found, expected, remedy
        super().__init__(f"checkpoint: {path}: found {found}, expected {expected}. {remedy}".rstrip())


class StoreLockedError(CheckpointError):
    """Another process uses the store."""


class CorruptPageError(CheckpointError):
    """What was read from the SSD is not what was written there. Training stops, and writes nothing further.

    ``page`` is the page's index (in the page table of a run, in the manifest's page records otherwise), ``parameter``
    what it holds ("EXP_AVG of h.0.mlp.c_fc.weight[0:1048576]"), ``offset`` its first byte in the file at ``path``;
    ``expected_crc`` and ``found_crc`` are the CRC32C of its content.
    """

    def __init__(
        self, page: int, parameter: str, path: str, offset: int, expected_crc: int, found_crc: int, remedy: str = ""
    ) -> None:
        self.page, self.parameter, self.offset = page, parameter, offset
        self.expected_crc, self.found_crc = expected_crc, found_crc
        super().__init__(
            path,
            f"page {page} ({parameter}) at offset {offset} with CRC32C {found_crc:08x}",
            f"{expected_crc:08x}, as it was written",
            remedy
            or "The drive returned other bytes than it was given: resume from the last commit that "
            "`angelptm checkpoint verify` finds intact.",
        )


class RankError(AngelPTMError):
    """Another rank of the run did not do its part. ``rank`` is the one to blame, None where nobody knows; ``operation``
    is what this rank was at, with the unit where it was about one."""

    def __init__(self, rank: int | None, operation: str, text: str) -> None:
        self.rank, self.operation = rank, operation
        super().__init__(text)

    def __reduce__(self) -> tuple[type[RankError], tuple[int | None, str, str]]:
        return RankError, (self.rank, self.operation, str(self))  # ranks send it to each other
