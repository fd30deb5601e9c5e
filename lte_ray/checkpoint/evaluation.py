"""The worker's judgement of a checkpoint's base, beside it as ``evaluation.json``, and which are the best by it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping

from lte_ray.checkpoint.manifest import Damaged, folder, read_file, short
from lte_ray.storage import RunDirectory

EVALUATION = "evaluation.json"
LARGEST = 2**20
"""Bytes that an evaluation can have."""


def write_evaluation(directory: RunDirectory, version: int, values: Mapping[str, float]) -> None:
    """Writes the figures of a version, before or after its checkpoint is complete. Figures that aren't finite become null."""
    finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    data = json.dumps({"version": version, "values": finite}, indent=1).encode()
    directory.write(f"{folder(version)}/{EVALUATION}", data)


def read_evaluation(directory: RunDirectory, version: int) -> dict[str, float]:
    """The finite figures of a version, in the order in which the worker gave them.

    Raises:
        Damaged: there is no evaluation, or it isn't one.
        StorageError: storage fails.
    """
    path = f"{folder(version)}/{EVALUATION}"
    data = read_file(directory, path, LARGEST)
    try:
        content = json.loads(data)
        values = content["values"].items()
        if content["version"] != version:
            raise ValueError("it is of another version")
        return {
            name: float(value)
            for name, value in values
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{directory.at(path)} is damaged: {short(error)}.") from error


def best(directory: RunDirectory, versions: Iterable[int], count: int, by: str = "") -> list[int]:
    """The `count` best of the versions, best first; of equals the newest. Those without a readable figure don't count.

    Args:
        by: name of the figure, of which the lowest is best; the highest if a dash stands before it. Without a name the first
            figure of the newest evaluation.
    """
    name, sign = by.removeprefix("-"), -1.0 if by.startswith("-") else 1.0
    found: list[tuple[float, int]] = []
    for version in sorted(versions, reverse=True) if count else []:
        with contextlib.suppress(Damaged):  # a failing storage is no reason to call it bad
            values = read_evaluation(directory, version)
            name = name or next(iter(values), "")
            if name in values:
                found.append((sign * values[name], version))
    return [version for _, version in sorted(found, key=lambda pair: pair[0])[:count]]
