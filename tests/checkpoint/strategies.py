"""Hypothesis strategies for valid commits."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.checkpoint.builder import Commit, Shapes, make_commit

_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_objects: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    _text,
    st.recursive(
        _scalars | _text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
        max_leaves=10,
    ),
    max_size=4,
)
_shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)


@st.composite
def _units(draw: st.DrawFn) -> dict[str, Shapes]:
    names = draw(st.lists(_text, max_size=4, unique=True))
    return {
        unit: {f"{unit}.p{index}": draw(st.tuples(_shapes, st.booleans())) for index in range(draw(st.integers(0, 4)))}
        for unit in names
    }


@st.composite
def commits(draw: st.DrawFn) -> Commit:
    """Commits of models with up to 16 parameters of up to 64000 elements."""
    units = draw(_units())
    prefixed = {f"u{index}{name}": params for index, (name, params) in enumerate(units.items())}
    unique: dict[str, Shapes] = {
        unit: {f"{unit}.{name}": place for name, place in params.items()} for unit, params in prefixed.items()
    }
    return make_commit(
        unique,
        step=draw(st.integers(0, 10**12 - 1)),
        seed=draw(st.integers(0, 2**32)),
        precision=draw(st.sampled_from(["fp32", "bf16"])),
        optimizer=draw(st.sampled_from(["adamw", "sgd", "lion"])),
        buffers=draw(
            st.dictionaries(
                _text.filter(bool), st.tuples(st.sampled_from(["int64", "bool", "bfloat16"]), _shapes), max_size=3
            )
        ),
        unwritten=draw(st.sampled_from([0.0, 0.5, 1.0])),
        trainable_params=draw(st.booleans()),
        scheduler=draw(st.none() | json_objects),
        client=draw(st.none() | json_objects),
        data=draw(st.none() | json_objects),
    )
