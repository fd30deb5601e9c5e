"""Results of arms, in a file that grows by an arm at a time, so that an interrupted comparison continues."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory

FORMAT = 1


@dataclass(frozen=True)
class Point:
    """An evaluation of the merged weights after so many steps and samples (of all heads together)."""

    step: int
    samples: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class ArmResult:
    """What one arm gave.

    Attributes:
        key: of the arm.
        rung, rate, seed: of the arm, for readers.
        points: evaluations in order; the last is at the end.
        seconds: that it took, evaluations included.
        sent: bytes that all heads together sent and received.
        ddp: bytes that data-parallel training in as many processes would have sent and received.
        failed: why it ended early, if it did.
    """

    key: str
    rung: str
    rate: float
    seed: int
    points: tuple[Point, ...]
    seconds: float
    sent: int = 0
    ddp: int = 0
    failed: str = ""

    @property
    def figures(self) -> Mapping[str, float]:
        """The evaluation at the end; empty if there is none."""
        return self.points[-1].figures if self.points and not self.failed else {}

    def final(self, figure: str) -> float:
        """A figure at the end; NaN if the arm failed or gave no number."""
        return self.figures.get(figure, math.nan)


class Keyed(Protocol):
    """What a training is known by: the key of its result."""

    @property
    def key(self) -> str: ...


class Result(Keyed, Protocol):
    """What one training gave: a dataclass of values for JSON, and of evaluations."""

    @property
    def points(self) -> tuple[Point, ...]: ...


R = TypeVar("R", bound=Result)


@dataclass
class ResultsFile(Generic[R]):
    """The results of a comparison, as JSON in its directory. It is written completely after each training.

    Args:
        directory: of the comparison.
        name: of the file.
        settings: what all trainings share, as JSON has it. A file with other settings is refused.
        kind: the class of a result.
    """

    directory: RunDirectory
    name: str
    settings: Mapping[str, Any]
    kind: type[R] = ArmResult  # type: ignore[assignment]
    _results: dict[str, R] = field(default_factory=dict, init=False)

    def load(self) -> None:
        """Reads what an earlier call has left, if there is anything.

        Raises:
            StorageError: the file is damaged, or its settings are others; the message lists them.
        """
        if not self.directory.exists(self.name):
            return
        where = self.directory.path_to(self.name)
        try:
            content = json.loads(self.directory.read(self.name))
            settings, results = content["settings"], [_from_json(row, self.kind) for row in content["arms"]]
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{where} is damaged, or of another release: {error}. Choose another --name.") from error
        if changes := list(_changes(settings, self.settings)):
            raise StorageError(
                f"{where} has results of other settings: {', '.join(changes)}. Give them as they were, or another --name."
            )
        self._results = {result.key: result for result in results}

    def get(self, training: Keyed) -> R | None:
        """The result of an arm or a trial, if it is done."""
        return self._results.get(training.key)

    def all(self) -> list[R]:
        """All results, in the order in which they came."""
        return list(self._results.values())

    def add(self, result: R, **more: Any) -> None:
        """Adds a result and writes the file.

        Args:
            more: other content of the file.

        Raises:
            StorageError: it can't be written.
        """
        self._results[result.key] = result
        self.write(**more)

    def write(self, **more: Any) -> None:
        """Writes the file. Raises StorageError if that fails."""
        rows = [_to_json(result) for result in self._results.values()]
        content = {"format": FORMAT, "settings": self.settings, **more, "arms": rows}
        self.directory.write(self.name, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def __len__(self) -> int:
        return len(self._results)


def _to_json(result: Result) -> dict[str, Any]:
    points = [{"step": p.step, "samples": p.samples, "figures": _numbers(p.figures)} for p in result.points]
    return {**vars(result), "points": points}


def _numbers(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures with None for what JSON lacks."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _from_json(row: Mapping[str, Any], kind: type[R]) -> R:
    points = tuple(
        Point(p["step"], p["samples"], {name: math.nan if v is None else float(v) for name, v in p["figures"].items()})
        for p in row["points"]
    )
    return kind(**{**row, "points": points})


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two settings: "steps was 700 and is 70"."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name}.{change}" for change in _changes(old, new))
        elif old != new:
            yield f"{name} was {old} and is {new}"
