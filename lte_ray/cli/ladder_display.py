"""Shows a ladder while it is climbed: bars on a terminal, a line for each training everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lte_ray.ladder.arms import Arm
from lte_ray.ladder.figures import Figure
from lte_ray.ladder.results import ArmResult, Point
from lte_ray.run.display import format_duration


class LadderDisplay:
    """Shows the training that is under way and those that are done.

    Args:
        figure: that is compared.
    """

    def __init__(self, console: Console, figure: Figure) -> None:
        self._console, self._figure, self._expected, self._done = console, figure, 0, 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._all = self._progress.add_task("trainings", total=1)
        self._current = self._progress.add_task("", total=1, visible=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the bars within the block, if there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with self._progress:
            yield

    def expect(self, trainings: int) -> None:
        """So many trainings are left, unless sweeps are extended."""
        self._expected = self._done + trainings

    def begin(self, arm: Arm) -> None:
        """A training begins."""
        self._expected = max(self._expected, self._done + 1)
        self._progress.update(self._all, total=self._expected)
        self._progress.reset(self._current, description=arm.label, total=arm.train.steps, visible=True)

    def advance(self, arm: Arm, step: int, point: Point | None) -> None:
        """The training has taken `step` steps; a `Listener`."""
        value = "" if point is None else f" {self._figure.name} {point.figures.get(self._figure.name, float('nan')):.4g}"
        self._progress.update(self._current, completed=step, **({"description": arm.label + value} if value else {}))  # type: ignore[arg-type]

    def end(self, result: ArmResult, label: str, earlier: bool) -> None:
        """A training is done, or was in an earlier call."""
        self._done += 1
        self._progress.update(self._all, completed=self._done, total=max(self._expected, self._done))
        self._progress.update(self._current, visible=False)
        value = result.failed or f"{self._figure.name} {result.final(self._figure.name):.4g}"
        when = "done earlier" if earlier else f"{format_duration(result.seconds)}"
        self._console.print(Text(f"{self._done}/{max(self._expected, self._done)}  {label}: {value}  ({when})"), soft_wrap=True)
