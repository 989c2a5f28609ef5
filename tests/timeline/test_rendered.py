"""The report as Chromium shows it: every section, no error, no scrolling sideways, nothing from a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from angelptm.timeline.figures import figures_of
from angelptm.timeline.report import write_report
from angelptm.timeline.run_files import read_run

from .browser import Browser, find_chromium
from .runs import make_run, make_ugly_run

SECTIONS = [
    "summary", "timeline", "occupancy", "traffic", "roofline", "prediction", "stalls", "updates", "trace", "reading",
]  # fmt: skip
pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["good", "ugly"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / request.param
    run = read_run(make_run(folder) if request.param == "good" else make_ugly_run(folder))
    path = folder / "report.html"
    write_report(run, figures_of(run), path)
    return path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (800, False), (800, True)])
def test_report_renders(browser: Browser, report: Path, width: int, dark: bool, tmp_path: Path) -> None:
    page = browser.open(report, width, dark=dark)
    assert page.complaints == []
    assert page.requests == [report.as_uri()]
    sections = "[...document.querySelectorAll('section')].filter(s => s.getBoundingClientRect().height > 40)"
    assert page.evaluate(f"{sections}.map(s => s.id)") == SECTIONS
    assert page.evaluate("[...document.querySelectorAll('h2')].every(h => h.innerText.trim().length > 4)")
    assert page.evaluate("document.querySelectorAll('table:not(:has(caption)), svg:not([aria-label])').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # What is beyond the right edge must be inside something that scrolls by itself.
    beyond = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.scroll')).map(e => e.outerHTML.slice(0, 200))"
    )
    assert page.evaluate(beyond) == []
    page.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000  # a blank page of this size has some 5 kB


def test_lanes_have_bars_that_are_seen(browser: Browser, report: Path) -> None:
    page = browser.open(report, 800)
    bars = "[...document.querySelectorAll('#timeline rect')].map(r => r.getBoundingClientRect())"
    count = page.evaluate(f"{bars}.filter(r => r.width >= 0.3 && r.height >= 4).length")
    assert count == page.evaluate(f"{bars}.length")
    assert count > 50
    assert page.evaluate("getComputedStyle(document.querySelector('#timeline rect')).fill") != "rgb(0, 0, 0)"


def test_what_a_page_asks_for_and_complains_of_is_noticed(browser: Browser, tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    path = tmp_path / "bad.html"
    path.write_text("<p style='width:3000px'>x</p><img src='http://127.0.0.1:9/x.png'><script>throw 1</script>")
    page = browser.open(path, 800)
    assert "http://127.0.0.1:9/x.png" in page.requests
    assert page.complaints
    assert page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
