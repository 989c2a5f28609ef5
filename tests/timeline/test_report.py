"""The figures of a step are what its events add up to; what is missing is said, and nothing is believed."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from angelptm.errors import DataError
from angelptm.timeline import Counter, Event, Lane, Step, Timeline, save
from angelptm.timeline.data import covered_seconds, started_bytes
from angelptm.timeline.figures import figures_of, occupancy, seconds_text
from angelptm.timeline.report import render_report
from angelptm.timeline.run_files import read_run

from .runs import EVIL, STEP_S, make_run, make_ugly_run

MIB = 2**20


def rendered(folder: Path, step: int | None = None) -> str:
    run = read_run(folder)
    return render_report(run, figures_of(run, step))


class Outline(HTMLParser):
    """Tags, visible text, and unbalanced ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "link", "rect", "path", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("rect", "path", "line"):
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_figures_are_sums_of_the_events(tmp_path: Path) -> None:
    found = figures_of(read_run(make_run(tmp_path / "run")), 2)
    assert found.step.seconds == pytest.approx(STEP_S * 1.004)
    assert found.tokens_per_s == pytest.approx(1024 / found.step.seconds)
    assert found.stalls_by_cause == pytest.approx({"waits for the update": 0.066, "waits for the SSD to read": 0.033})
    assert [stall.name for stall in found.stalls[:1]] == ["waits for the update of h.0"]
    assert found.phase_seconds["forward"] == pytest.approx(12 * 0.038)
    assert found.busy_seconds["updater 0"] == pytest.approx(6 * 0.07)  # its waits for I/O are no work
    assert found.busy_seconds["ssd write"] == pytest.approx(12 * 0.045)  # what overlaps counts once
    assert found.traffic_bytes["PARAM"] == {"ssd→host": 24 * 4 * MIB, "host→device": 24 * 4 * MIB}
    assert found.tier_bytes["ssd"] == {"read": 20 * MIB, "written": 10 * MIB}
    assert found.peak_bytes["device"] == 14 * MIB
    assert found.bottleneck.startswith("Busiest is compute, ")
    assert "longest for: waits for the update (66 ms)" in found.bottleneck
    assert found.predicted_bottleneck == "Predicted: compute, then update."


def test_predicted_stands_beside_measured(tmp_path: Path) -> None:
    found = figures_of(read_run(make_run(tmp_path / "run")), 2)
    rows = {(row.group, row.name): row for row in found.compared}
    assert rows["step", "a step"].ratio == pytest.approx(STEP_S * 1.004 / 1.9)
    assert rows["busy", "ssd_read"].measured == found.busy_seconds["ssd read"]
    assert rows["busy", "update"].measured is not None
    assert rows["traffic", "PARAM, ssd→host"].ratio == 1
    assert rows["peak", "host"].ratio == pytest.approx(71 / 70)
    assert rows["stall", "waits for a free frame"].measured == 0
    lines = {line.phase: line for line in found.rooflines}
    assert lines["whole step"].ceiling == "compute at 90 GFLOP/s"
    assert lines["forward"].share == pytest.approx(0.42 / 0.456)
    assert lines["ssd_read"].ceiling == "ssd_read at 1.3 GB/s"
    assert lines["gradient"].share is None


def test_typical_step_is_the_median_without_the_first(tmp_path: Path) -> None:
    found = Timeline(steps=[Step(1, 0, 9), Step(2, 9, 10), Step(3, 10, 13), Step(4, 13, 15)])
    assert found.typical_step() == Step(4, 13, 15)
    assert Timeline(steps=[Step(5, 0, 1)]).typical_step() == Step(5, 0, 1)
    assert Timeline().typical_step() is None
    save(Timeline(), tmp_path / "timeline.json.gz")
    with pytest.raises(DataError, match="found no step, expected at least one whole step"):
        figures_of(read_run(tmp_path))


def test_step_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"found no step 9, expected one of the recorded steps: 1, 2, 3, 4"):
        figures_of(read_run(make_run(tmp_path / "run")), 9)


def test_times_are_cut_at_the_step_and_bytes_counted_in_the_step_they_begin_in() -> None:
    step = Step(1, 10, 20)
    events = [Event("a", "x", 5, 12, 1), Event("a", "y", 11, 13, 2), Event("a", "z", 19, 30, 4)]
    assert covered_seconds(events, step) == 4
    assert started_bytes(events, step) == 6
    assert occupancy(((0, 1), (9, 7), (15, 3), (25, 9)), step) == [(10, 7), (15, 3)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (2.314, "2.31 s"), (0.0482, "48.2 ms"), (9.5e-4, "950 µs"), (3e-9, "0.003 µs"), (1e300, "1e+300 s")],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_missing_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    found = Timeline(steps=[Step(1, 0, 1)], lanes=[Lane("engine", "compute")])
    found.events, found.counters = [Event("engine", "forward", 0, 1)], [Counter("host", "bytes", ((0.0, 5.0),))]
    save(found, tmp_path / "timeline.json.gz")
    content = rendered(tmp_path)
    for name in ("config.yaml", "result.json", "prediction.json", "trace.json", "schedule.json", "metrics.jsonl"):
        assert f"{name}" in content
    assert "There is no prediction to compare with" in content
    assert "Not recorded in this step: device, ssd" in content


def test_missing_timeline_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"timeline.json.gz: found no such file, expected the timeline of a run\. .*train"
    ):
        read_run(tmp_path)
    with pytest.raises(DataError, match="found no such folder, expected the folder of a run"):
        read_run(tmp_path / "none")


def test_no_name_of_a_run_becomes_markup(tmp_path: Path) -> None:
    content = rendered(make_ugly_run(tmp_path / "run"))
    outline = Outline()
    outline.feed(content)
    assert outline.open == []
    assert not outline.tags & {"script", "img", "iframe", "object", "a:href"}
    assert EVIL not in content
    assert any("<script>alert(" in text for text in outline.texts)  # as text, it is there
    assert "\u202e" not in content
    assert "\x1b" not in content
    assert len(content) < 4 * MIB  # whatever the number of events


def test_own_texts_need_no_escapes(tmp_path: Path) -> None:
    content = rendered(make_run(tmp_path / "run"))
    body = content[content.index("<body>") :]
    assert "\\" not in body  # what is not printable would be shown as one
    assert "median of 4 steps" in body


@pytest.mark.parametrize("make", [make_run, make_ugly_run])
def test_document_is_balanced_and_refers_to_nothing_outside(tmp_path: Path, make) -> None:
    content = rendered(make(tmp_path / "run"))
    outline = Outline()
    outline.feed(content)
    assert outline.open == []
    assert "default-src 'none'" in content
    assert " src=" not in content.replace("&lt;img src=", "")
    assert "url(" not in content
