"""Packing of parameters into the element space of a unit."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.units import ALIGN_ELEMENTS, ParamSpec, UnitLayout, pack

shapes = st.lists(st.integers(1, 40), min_size=0, max_size=3).map(tuple)
page_elements = st.sampled_from([128, 1024, 16384, 32768])


@st.composite
def params(draw: st.DrawFn) -> list[ParamSpec]:
    found = draw(st.lists(st.tuples(shapes, st.booleans()), min_size=1, max_size=12))
    return [ParamSpec(f"p{i}", shape, trainable, ((f"m{i}", "weight"),)) for i, (shape, trainable) in enumerate(found)]


@settings(max_examples=200, deadline=None)
@given(params(), page_elements)
def test_parameters_are_aligned_disjoint_and_back_to_back(given: list[ParamSpec], page: int) -> None:
    layout = pack("unit", 3, given, page)
    assert (layout.name, layout.index) == ("unit", 3)
    end = 0
    for param in layout.params:
        assert param.offset % ALIGN_ELEMENTS == 0
        gap = param.offset - end
        assert 0 <= gap < (page + ALIGN_ELEMENTS if param.offset == layout.frozen_offset else ALIGN_ELEMENTS)
        end = param.end
    assert layout.numel == sum(math.prod(spec.shape) for spec in given)


@settings(max_examples=200, deadline=None)
@given(params(), page_elements)
def test_frozen_parameters_start_on_a_page_of_their_own(given: list[ParamSpec], page: int) -> None:
    layout = pack("unit", 0, given, page)
    assert layout.frozen_offset % page == 0
    assert layout.frozen_offset - layout.trainable_elements in range(page)
    for param in layout.params:
        if param.trainable:
            assert param.end <= layout.trainable_elements
        else:
            assert layout.frozen_offset <= param.offset
            assert param.end <= layout.frozen_offset + layout.frozen_elements
    trainable_pages = {p.offset // page for p in layout.params if p.trainable}
    assert not trainable_pages & {p.offset // page for p in layout.params if not p.trainable}


@settings(max_examples=100, deadline=None)
@given(params(), page_elements)
def test_every_parameter_keeps_its_name_shape_and_owners_in_order(given: list[ParamSpec], page: int) -> None:
    layout = pack("unit", 0, given, page)

    def facts(found: UnitLayout, trainable: bool) -> list[ParamSpec]:
        return [ParamSpec(p.name, p.shape, p.trainable, p.owners) for p in found.params if p.trainable is trainable]

    for trainable in (True, False):
        assert facts(layout, trainable) == [param for param in given if param.trainable is trainable]


def test_tied_parameter_has_one_place_and_all_its_owners() -> None:
    owners = (("embed", "weight"), ("head", "weight"))
    weight = ParamSpec("embed.weight", (4, 8), True, owners)
    bias = ParamSpec("embed.bias", (3,), True, (("embed", "bias"),))
    layout = pack("embed", 0, [weight, bias], 128)
    assert [(p.offset, p.numel, p.owners) for p in layout.params] == [
        (0, 32, owners),
        (128, 3, (("embed", "bias"),)),
    ]
    assert layout.trainable_elements == 256


def test_alignment_is_256_bytes_in_the_narrowest_precision() -> None:
    assert ALIGN_ELEMENTS * 2 == 256
