"""The findings of a check on a terminal, one a line."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from lte_ray.checking import CheckReport
from lte_ray.checking.words import plural

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red", "skipped": "dim"}


def show(report: CheckReport, program: str, quiet: bool = False) -> None:
    """Prints the findings, where time goes, and the result.

    Args:
        quiet: whether to leave out what is in order.
    """
    console = Console(highlight=False)
    for finding in report.findings:
        if quiet and finding.status in ("ok", "skipped"):
            continue
        line = Text(f"{finding.status:<8}", style=STYLES[finding.status]).append(f"{finding.part:<11}", style="bold")
        console.print(line.append(finding.text, style="default"), soft_wrap=True)
        for detail in finding.details.splitlines():
            console.print(Text(f"{'':19}{detail}", style="dim"), soft_wrap=True)
    if report.times and not quiet:
        console.print(Text(f"\nWhere time goes on {report.device}: {_times(report)}."), soft_wrap=True)
    wrong, maybe = len(report.errors), len(report.warnings)
    if wrong:
        result = (
            f"{plural(wrong, 'mistake')} and {plural(maybe, 'warning')}. Correct what is marked as an error, and check again."
        )
    else:
        result = f"Nothing is wrong ({plural(maybe, 'warning')}). To train: change check to train."
    console.print(Text(f"\n{program}: {result} ({report.seconds:.1f} s)", style="bold"), soft_wrap=True)


def _times(report: CheckReport) -> str:
    return ", ".join(f"{what} {_seconds(seconds)}" for what, seconds in report.times.items())


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
