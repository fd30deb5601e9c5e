"""The errors that lte-ray raises.

The tree::

    LTEError
    ├── UserError                 bad input, found before any actor starts (exit code 2)
    │   ├── ConfigError           a setting, flag or TOML key
    │   ├── WorkerError           the worker: not found, incomplete, or with nothing to train
    │   ├── DataError             a data set: missing, damaged, or of another kind than the worker expects
    │   ├── ResourceError         the cluster lacks the requested resources
    │   └── StorageError          the run directory: taken, missing, or not writable
    └── RunError                  something broke while the run was on (exit code 1, or 75 if it can be resumed)
        ├── WorkerFailed          the worker's own code raised inside a head or the evaluator
        ├── HeadLost              a head's process died
        ├── CoordinatorLost       the coordinator's process died
        ├── LeaseLost             another driver trains the run now
        ├── ContributionRefused   a head's contributions were refused again and again
        └── PolicyError           a merge policy raised, or decided something impossible

Each can be pickled, so it can cross processes. The text of each hides credentials in URIs that it quotes.
"""

from __future__ import annotations

import traceback as tracebacks
from collections.abc import Iterator
from contextlib import contextmanager

from lte_ray.redaction import redact

RESUMABLE = 75
"""Exit code of a run that ended early and can be resumed: EX_TEMPFAIL of sysexits.h."""


class LTEError(Exception):
    """Root of all errors that lte-ray raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        return redact(super().__str__())


class UserError(LTEError):
    """Bad input. The message says what was asked, what was found, and what to change."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class WorkerError(UserError):
    """The worker can't be found, lacks a method, or has nothing to train."""


class DataError(UserError):
    """A data set is missing or damaged, or isn't what the worker's settings say."""


class ResourceError(UserError):
    """The cluster lacks the CPUs or GPUs that the heads request."""


class StorageError(UserError):
    """The run directory is taken, missing, unreadable or not writable."""


class RunError(LTEError):
    """A run that had started ended early.

    Attributes:
        checkpoint: the version of its newest complete checkpoint, from which ``--resume`` continues; None if there is none.
    """

    checkpoint: int | None = None

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """75 if the same command with ``--resume`` may continue the run. 1 if nothing is kept, if another driver continues it,
        or if a worker or policy raised or all heads diverged, which would happen again."""
        lasting = isinstance(self, WorkerFailed | PolicyError | ContributionRefused | LeaseLost)
        return 1 if self.checkpoint is None or lasting else RESUMABLE


class WorkerFailed(RunError):
    """The worker's own code raised.

    Attributes:
        where: the process, e.g. ``head 3`` or ``the evaluator``.
        step: the local step (counted from 1) that failed; None outside a step.
        traceback: the formatted traceback of the worker's error.
    """

    def __init__(self, where: str, step: int | None, traceback: str) -> None:
        super().__init__(where, step, traceback)
        self.where, self.step, self.traceback = where, step, traceback

    def __str__(self) -> str:
        at = "" if self.step is None else f" at local step {self.step}"
        return redact(f"The worker failed in {self.where}{at}:\n\n{self.traceback.rstrip()}")


class Interrupted(KeyboardInterrupt):
    """An interrupted run. Its text says what is kept.

    Attributes:
        checkpoint: as of `RunError`.
    """

    def __init__(self, text: str, checkpoint: int | None) -> None:
        super().__init__(text)
        self.checkpoint = checkpoint


class HeadLost(RunError):
    """A head's process ended without an answer (killed, out of memory, node lost)."""


class CoordinatorLost(RunError):
    """The coordinator's process ended without an answer."""


class LeaseLost(RunError):
    """Another driver has taken the run over, so this one must not write any more."""


class ContributionRefused(RunError):
    """The coordinator refused several contributions of one head in a row."""


class PolicyError(RunError):
    """A merge policy raised, or returned a decision that can't be executed."""


@contextmanager
def worker_errors(where: str, step: int | None) -> Iterator[None]:
    """Turns what the worker's code raises in the block into a WorkerFailed.

    Args:
        where, step: as in `WorkerFailed`.
    """
    try:
        yield
    except WorkerFailed:
        raise
    except LTEError as error:
        raise WorkerFailed(where, step, str(error)) from error
    except Exception as error:
        raise WorkerFailed(where, step, tracebacks.format_exc()) from error
