"""Traces, rates and schedules as files; traces that nobody recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from angelptm.errors import AngelPTMError
from angelptm.plan import PlanFileError, Rates, Schedule, Trace, make_schedule, plan_from_trace, windows_of

from .cases import RATES, Case, blocks, models, planned

SETTINGS = settings(max_examples=60, deadline=None)


@SETTINGS
@given(planned())
def test_files_read_back_as_they_were_written(case: tuple[Case, Trace, Any]) -> None:
    _, trace, plan = case
    schedule = make_schedule(plan, trace)
    assert Trace.from_json(trace.to_json()) == trace
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Rates.from_json(RATES.to_json()) == RATES


def test_files_on_disk_are_replaced_whole(tmp_path: Path) -> None:
    trace = blocks(3).trace()
    for path, value in ((tmp_path / "new" / "trace.json", trace), (tmp_path / "rates.json", RATES)):
        value.save(path)
        value.save(path)
        assert type(value).load(path) == value
    assert sorted(path.name for path in tmp_path.rglob("*.json")) == ["rates.json", "trace.json"]
    assert not list(tmp_path.rglob(".*"))


def changed(edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(blocks(2).trace().to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda data: data.update(format="a letter"), "format"),
        (lambda data: data.update(version=2), "version"),
        (lambda data: data.pop("uses"), "uses"),
        (lambda data: data.update(uses={}), "uses"),
        (lambda data: data["uses"].append(3), "uses[4]"),
        (lambda data: data["uses"][1].update(seconds=-1), "uses[1].seconds"),
        (lambda data: data["uses"][1].update(seconds=float("nan")), "uses[1].seconds"),
        (lambda data: data["uses"][1].update(seconds=True), "uses[1].seconds"),
        (lambda data: data["uses"][1].update(phase="sideways"), "uses[1].phase"),
        (lambda data: data["uses"][1].update(units=[2]), "uses[1].units"),
        (lambda data: data["uses"][1].update(units=[-1]), "uses[1].units"),
        (lambda data: data["uses"][1].update(last=0), "uses[1].last"),
        (lambda data: data["uses"][1].update(last=4), "uses[1].last"),
        (lambda data: data["gradients"][0].update(use=4), "gradients[0].use"),
        (lambda data: data["gradients"][0].update(unit=2), "gradients[0].unit"),
        (lambda data: data["gradients"].append(data["gradients"][0]), "gradients"),
        (lambda data: data["layouts"][1].update(index=0), "layouts[1].index"),
        (lambda data: data["layouts"][0]["params"][0].update(owners=["m"]), "layouts[0].params[0].owners"),
        (lambda data: data["layouts"][0]["params"][0].update(shape="4"), "layouts[0].params[0].shape"),
        (lambda data: data["layouts"][0]["params"][0].pop("trainable"), "layouts[0].params[0].trainable"),
        (lambda data: data.update(param_itemsize=0), "param_itemsize"),
        (lambda data: data.update(facts=[]), "facts"),
    ],
)
def test_malformed_trace_names_file_field_expectation_and_remedy(
    edit: Callable[[dict[str, Any]], object], field: str
) -> None:
    with pytest.raises(PlanFileError) as refused:
        Trace.from_json(changed(edit), "some/trace.json")
    error = refused.value
    assert isinstance(error, AngelPTMError)
    assert error.field == field
    assert error.expected
    assert str(error).startswith(f"some/trace.json: {field}: found ")
    assert str(error).endswith(error.remedy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'"text"', b"null"])
def test_file_that_is_no_trace_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    for kind in (Trace, Rates, Schedule):
        with pytest.raises(PlanFileError, match=r"trace\.json"):
            kind.load(path)
    with pytest.raises(PlanFileError, match=r"missing\.json"):
        Trace.load(tmp_path / "missing.json")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=5))
def test_any_value_in_any_field_of_a_schedule_is_read_or_refused(value: object) -> None:
    case = blocks(2)
    text = make_schedule(case.plan(2, 60, param="host"), case.trace()).to_json()
    for field in json.loads(text):
        data = json.loads(text)
        data[field] = value
        try:
            Schedule.from_json(json.dumps(data))
        except PlanFileError as error:
            assert error.field.startswith(field)  # noqa: PT017


@SETTINGS
@given(models())
def test_synthetic_trace_runs_each_site_forward_and_back(case: Case) -> None:
    trace = case.trace()
    count = len(case.sites)
    assert [use.site for use in trace.uses[:count]] == list(range(count))
    assert sorted(use.site for use in trace.uses[count:]) == list(range(count))
    assert all(use.units == case.sites[use.site][0] for use in trace.uses)
    if all(depth == 0 for _, depth in case.sites):
        expected = windows_of(case.sites, len(case.layouts))
        assert trace.windows() == [sorted(own, key=lambda window: window.start) for own in expected]
    for done in trace.gradients:
        assert done.use == max(window.end for window in trace.windows()[done.unit])
        assert done.bytes == sum(p.numel for p in case.layouts[done.unit].params if p.trainable) * case.itemsize


@SETTINGS
@given(planned(), st.sampled_from([2 * 65536, 4 * 65536]))
def test_plan_from_a_trace_is_the_plan_of_its_model(case: tuple[Case, Trace, Any], page_bytes: int) -> None:
    model, trace, _ = case
    budgets = model.budgets(200, 2000)
    assert plan_from_trace(trace, budgets) == model.plan(200, 2000)
    large = plan_from_trace(trace, model.budgets(200, 2000, page_bytes=page_bytes))
    assert large.page_bytes == page_bytes
    assert all(unit.layout.frozen_offset % (page_bytes // model.itemsize) == 0 for unit in large.units)
