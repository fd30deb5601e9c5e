"""Traces of one process's work by torch's profiler, which Perfetto (https://ui.perfetto.dev) and Chrome show."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from torch.autograd import profiler as autograd_profiler
from torch.profiler import ProfilerActivity, profile

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

log = logging.getLogger("lte_ray")

FOLDER = "profile"
"""Folder of a run's traces."""


class Tracer:
    """Records what a process does while certain local steps are taken or merged, and writes it into the run's directory.

    All threads of the process are recorded. What fails here costs the trace, never the run.

    Args:
        directory: the run's.
        name: of the process, for the file ``profile/NAME.json.gz``.
        window: the first and the last local step; None: nothing is recorded.
    """

    def __init__(self, directory: RunDirectory, name: str, window: tuple[int, int] | None) -> None:
        self._directory, self._name, self._window = directory, name, window
        self._profiler: profile | None = None

    def before_step(self, taken: int) -> None:
        """Begins or ends where `taken` local steps have been taken and the next one comes."""
        self.end(taken)
        self.begin(taken + 1, taken + 1)

    def begin(self, first: int, last: int) -> None:
        """Begins to record, if any of these local steps is in the window. Must be called in the thread that calls `end`."""
        if self._window is None or self._profiler is not None or last < self._window[0] or first > self._window[1]:
            return
        if autograd_profiler._is_profiler_enabled:  # two at once would stop each other
            self._give_up(RuntimeError("the worker uses a profiler itself"))
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        profiler = profile(activities=activities, experimental_config=_all_threads())
        try:
            profiler.start()
        except RuntimeError as error:
            self._give_up(error)
            return
        self._profiler = profiler

    def end(self, step: int | None = None) -> None:
        """Writes the trace, if one is being recorded and `step` is the window's last or a later one (None: in any case)."""
        profiler, window = self._profiler, self._window
        if profiler is None or window is None or (step is not None and step < window[1]):
            return
        self._profiler = self._window = None
        try:
            profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json.gz"
                profiler.export_chrome_trace(str(path))
                self._directory.write(f"{FOLDER}/{self._name}.json.gz", path.read_bytes())
        except (RuntimeError, OSError, StorageError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._window = None
        log.warning("There is no trace of %s: %s", self._name, error)


def _all_threads() -> torch._C._profiler._ExperimentalConfig | None:
    """Merges are computed in another thread than the one that starts the profiler."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except TypeError:  # torch 2.7 and older record one thread
        return None
