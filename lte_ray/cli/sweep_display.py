"""Shows a sweep while its trials train: a bar on a terminal, a line for each trial everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text

from lte_ray.ladder import Figure
from lte_ray.run.display import format_duration
from lte_ray.sweep.engine import Progress
from lte_ray.sweep.trials import Trial, TrialResult


class SweepDisplay:
    """Shows which trials train and which are done; a listener of the engine.

    Args:
        figure: that is compared.
        trials: how many there are.
    """

    def __init__(self, console: Console, figure: Figure, trials: int) -> None:
        self._console, self._figure, self._trials, self._done = console, figure, trials, 0
        self._training: dict[str, str] = {}
        self._noted: set[str] = set()
        columns = (TextColumn("trials"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, TextColumn("{task.description}"), console=console, transient=True)
        self._bar = self._bars.add_task("", total=trials)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows the bar within the block, if there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with self._bars:
            yield

    def expect(self, more: int) -> None:
        """Adds `more` trials to those that the bar counts."""
        self._trials += more
        self._bars.update(self._bar, total=self._trials)

    def begin(self, trial: Trial) -> None:
        """A trial begins."""
        self._training[trial.name] = trial.name
        self._show_training()

    def advance(self, trial: Trial, progress: Progress) -> None:
        """A trial goes on."""
        if progress.points:
            value = progress.points[-1].figures.get(self._figure.name, math.nan)
            self._training[trial.name] = f"{trial.name} {value:.4g}"
            self._show_training()

    def end(self, trial: Trial, result: TrialResult, earlier: bool) -> None:
        """A trial is done, or was in an earlier call."""
        self._done += 1
        self._training.pop(trial.name, None)
        self._bars.update(self._bar, completed=self._done)
        self._show_training()
        value = f"{self._figure.name} {result.last(self._figure.name):.4g}"
        if result.failed:
            value = f"failed: {result.failed}"
        elif result.stopped:
            value += f", stopped: {result.stopped}"
        when = "done earlier" if earlier else format_duration(result.seconds)
        line = f"{self._done}/{self._trials}  {trial.name}  {trial.label}: {value}  ({when})"
        self._console.print(Text(line), soft_wrap=True)

    def note(self, trial: Trial, text: str) -> None:
        """A trial warns. What several say is shown once."""
        if text not in self._noted:
            self._noted.add(text)
            self._console.print(Text(f"{trial.name}: {text}", style="yellow"), soft_wrap=True)

    def _show_training(self) -> None:
        self._bars.update(self._bar, description=", ".join(self._training.values()))
