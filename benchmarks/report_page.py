"""`lte-ray report` of a run of 100,000 merges of 8 heads: time to write the page, its size, and time until a browser shows it.

Needs Chromium, as `tests.support.browser` finds it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.report import repeat, report, spread
from lte_ray.report import write_report
from tests.support.browser import Page, with_page
from tests.support.long_run import make_long_run

MERGES, HEADS, RUNS = 100_000, 8, 5

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
DRAW_ALL = "dispatchEvent(new Event('beforeprint'))"


def opened(file: Path) -> tuple[float, float]:
    """Seconds from the call of the page until its first curves are drawn; and seconds to draw all others."""

    async def use(page: Page) -> tuple[float, float]:
        await page.open(file)
        await page.evaluate(FRAMES)
        first = await page.evaluate("performance.now()")
        await page.evaluate(DRAW_ALL)
        await page.evaluate(FRAMES)
        return first / 1000, (await page.evaluate("performance.now()") - first) / 1000

    return with_page(use)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, out = Path(folder) / "long", Path(folder) / "report.html"
        make_long_run(run, MERGES, HEADS)
        begin = time.process_time()
        size = write_report(run, out).size
        written = time.process_time() - begin
        times = repeat(RUNS, lambda: opened(out), lambda pair: f"first curves after {pair[0]:.2f} s, all {pair[1]:.2f} s later")
    figures = {
        "write_processor_seconds": round(written, 2),
        "bytes": size,
        "open_seconds": spread([first for first, _ in times]),
        "draw_all_seconds": spread([rest for _, rest in times]),
    }
    limits = {"size": "at most 5 MB", "open": "median of 5 below 2 s until the first curves are drawn"}
    met = {"size": size <= 5e6, "open": figures["open_seconds"]["median"] < 2}  # type: ignore[index]
    report("report_page", limits=limits, met=met, figures=figures)


if __name__ == "__main__":
    main()
