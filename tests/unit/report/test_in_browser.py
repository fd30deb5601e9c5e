"""Reports in headless Chromium: they draw all curves, fit a phone, ask for nothing, and open fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lte_ray.report import write_report
from tests.support.browser import Page, with_page
from tests.support.long_run import make_long_run

pytestmark = pytest.mark.slow

DRAW_ALL = "dispatchEvent(new Event('beforeprint'))"
NEXT_FRAME = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
FACTS = """({
    charts: document.querySelectorAll('.chart').length,
    drawn: document.querySelectorAll('.chart canvas').length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    back: getComputedStyle(document.body).backgroundColor,
    ready: document.documentElement.dataset.ready,
    red: [...document.querySelectorAll('canvas[data-timeline]')].filter(canvas => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < data.length; i += 4) if (data[i] > 180 && data[i + 1] < 120 && data[i + 3] > 200) return true;
    }).length,
})"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs, one of them with many merges, in which a head died."""
    folder = tmp_path_factory.mktemp("report")
    make_long_run(folder / "one", 200, heads=3)
    make_long_run(folder / "two", 1500, heads=2)
    return write_report([folder / "one", folder / "two"], folder / "out.html").path


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_a_report_draws_everything_and_fits(report: Path, width: int, dark: bool) -> None:
    """On a desktop and on a phone, light and dark, without errors and without the network."""

    async def use(page: Page) -> tuple[dict[str, Any], Page]:
        await page.open(report, width, dark=dark)
        await page.evaluate(DRAW_ALL)
        await page.evaluate(NEXT_FRAME)
        return await page.evaluate(FACTS), page

    facts, page = with_page(use)
    assert page.errors == []
    assert page.requests == [report.as_uri()]
    assert facts["ready"] == "yes"
    assert facts["drawn"] == facts["charts"] > 10
    assert facts["overflow"] <= 0
    assert facts["back"] == ("rgb(20, 24, 31)" if dark else "rgb(255, 255, 255)")
    assert facts["red"] == 2


def test_curves_can_be_drawn_against_time_and_logarithmically(report: Path) -> None:
    """They are drawn again as they come into view."""

    async def use(page: Page) -> tuple[list[str], list[str]]:
        await page.open(report)
        await page.evaluate(NEXT_FRAME)
        for axis in ("seconds", "bytes", "step"):
            change = f"const a = document.getElementById('axis'); a.value = '{axis}'; a.dispatchEvent(new Event('change'))"
            await page.evaluate(f"{{ {change} }}")
            await page.evaluate("document.getElementById('log').click()")
            await page.evaluate(DRAW_ALL)
            await page.evaluate(NEXT_FRAME)
        labels = "[...new Set([...document.querySelectorAll('.u-legend tr:first-child .u-label')].map(e => e.textContent))]"
        return await page.evaluate(labels), page.errors

    labels, errors = with_page(use)
    assert errors == []
    assert labels == ["local steps"]
