"""States in their formats, at addresses in memory: from and to fp32."""

from __future__ import annotations

import angelptm_native as native

from angelptm.states.formats import BLOCK8, MASTER_ITEMSIZE, MOMENT_ITEMSIZE
from angelptm.states.layout import Piece, StateRun

assert BLOCK8 == native.BLOCK8

MASTER_FORMATS = {"fp32": native.MasterFormat.F32, "split": native.MasterFormat.SPLIT}
MOMENT_FORMATS = {
    "fp32": native.MomentFormat.F32,
    "bf16": native.MomentFormat.BF16,
    "int8": native.MomentFormat.INT8,
}
_MOMENTS = {"EXP_AVG": native.Moment.EXP_AVG, "EXP_AVG_SQ": native.Moment.EXP_AVG_SQ}


def encode(
    address: int, piece: Piece, at: int, count: int, values: int, *, unit: int = 0, first_element: int = 0
) -> None:
    """Writes (count,) fp32 at ``values`` to elements [at, at + count) of a piece, on the page at ``address``.

    ``first_element``: the first of them in its unit. Of int8 they begin with a block. What does not fit a format's
    steps is rounded at random, by what the elements are and nothing else.
    """
    if piece.kind == "MASTER":
        to = address + piece.offset + at * MASTER_ITEMSIZE[piece.format]
        if piece.format == "split":
            native.split_master(values, 0, to, count)
        else:
            native.copy_bytes(to, values, count * 4)
        return
    key = native.rounding_key(0, 0, unit + (first_element >> 32 << 32))
    native.encode(_MOMENTS[piece.kind], values, _codes(address, piece, at), count, key, first_element & 0xFFFFFFFF)


def decode(address: int, piece: Piece, at: int, count: int, to: int, *, params: int = 0) -> None:
    """Writes (count,) fp32 to the address ``to``: elements [at, at + count) of a piece, on the page at ``address``.
    ``params``: the same elements' bf16 parameters, for a split master. Of int8 ``at`` is a multiple of a block."""
    if piece.kind == "MASTER":
        source = address + piece.offset + at * MASTER_ITEMSIZE[piece.format]
        if piece.format == "split":
            assert params, "a split master is nothing without its parameter"
            native.join_master(params, source, to, count)
        else:
            native.copy_bytes(to, source, count * 4)
        return
    native.decode(_MOMENTS[piece.kind], _codes(address, piece, at), to, count)


def _codes(address: int, piece: Piece, at: int) -> native.MomentCodes:
    assert piece.format != "int8" or at % BLOCK8 == 0, "whole blocks"
    values = address + piece.offset + at * MOMENT_ITEMSIZE[piece.format]
    return native.MomentCodes(MOMENT_FORMATS[piece.format], values, address + piece.scales + at // BLOCK8 * 4)


def native_run(run: StateRun) -> native.StateRun:
    """For the native updater."""
    places = [native.StatePlace(one.page, one.offset, one.scales) for one in run.moments]
    return native.StateRun(
        start=run.start,
        count=run.count,
        master_format=MASTER_FORMATS[run.formats.master],
        exp_avg_format=MOMENT_FORMATS[run.formats.exp_avg],
        exp_avg_sq_format=MOMENT_FORMATS[run.formats.exp_avg_sq],
        master=native.StatePlace(run.master.page, run.master.offset),
        exp_avg=places[0] if places else None,
        exp_avg_sq=places[1] if len(places) > 1 else None,
    )
