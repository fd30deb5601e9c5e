"""The error tree: complete, documented, and able to cross a process."""

from __future__ import annotations

import pickle
import re

import pytest

from lte_ray import errors
from lte_ray.errors import RESUMABLE, ContributionRefused, LeaseLost, LTEError, PolicyError, RunError, UserError, WorkerFailed

TREE = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, LTEError)}


def make(kind: type[LTEError]) -> LTEError:
    return kind("head 3", 7, "Traceback: boom") if issubclass(kind, WorkerFailed) else kind("what to change")


@pytest.mark.parametrize("kind", TREE.values(), ids=TREE)
def test_every_error_survives_pickling(kind: type[LTEError]) -> None:
    """Type, message, arguments and attributes are the same behind the process border."""
    error = make(kind)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("kind", TREE.values(), ids=TREE)
def test_exit_codes_follow_the_tree(kind: type[LTEError]) -> None:
    """Bad input is 2, a run that ended early 1, or 75 if it can be resumed; every error but the root is one of both."""
    assert make(kind).exit_code == (2 if issubclass(kind, UserError) else 1)
    if issubclass(kind, RunError):
        error = make(kind)
        error.checkpoint = 3  # a worker or a policy that raised would raise again
        assert error.exit_code == (
            1 if issubclass(kind, WorkerFailed | PolicyError | ContributionRefused | LeaseLost) else RESUMABLE
        )
    assert kind is LTEError or issubclass(kind, UserError) != issubclass(kind, RunError)


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    """It names every class, each below its own parent."""
    drawn: dict[str, str] = {}
    above: list[str] = []
    for bars, name in re.findall(r"^    ([│├└─ ]*)(\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(bars) // 4
        above[depth:] = [name]
        drawn[name] = above[depth - 1] if depth else "Exception"
    assert drawn == {name: kind.__bases__[0].__name__ for name, kind in TREE.items()}


@pytest.mark.parametrize(("step", "at"), [(7, " at local step 7"), (None, "")])
def test_worker_failed_says_where_and_shows_the_traceback(step: int | None, at: str) -> None:
    """The message names the process, the step if there is one, and then the worker's own traceback."""
    error = WorkerFailed("head 3", step, "Traceback: boom\n")
    assert str(error) == f"The worker failed in head 3{at}:\n\nTraceback: boom"
    assert (error.where, error.step, error.traceback) == ("head 3", step, "Traceback: boom\n")
