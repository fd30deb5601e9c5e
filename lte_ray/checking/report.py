"""What a check has found: one finding for each thing that it looked at, and where time went."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lte_ray.checking.explanation import explain
from lte_ray.redaction import redact

Status = Literal["ok", "warning", "error", "skipped"]

PARTS = (
    "sending", "worker", "model", "data", "loss", "layers", "optimizer", "steps", "gradients", "merge", "evaluation", "saving",
    "files", "devices",
)  # fmt: skip
"""What is looked at, in the order of the report."""


@dataclass(frozen=True)
class Finding:
    """What was found out about one part of a worker.

    Attributes:
        part: what was looked at, such as ``data``.
        status: ``skipped`` if it couldn't be looked at, for a reason that the text names.
        text: in a sentence or two, and what to change.
        details: where in the user's code an error was raised, as lines of a traceback; empty if nowhere.
    """

    part: str
    status: Status
    text: str
    details: str = ""


@dataclass(frozen=True)
class CheckReport:
    """What `lte_ray.check` has found.

    Attributes:
        worker: the name of its class.
        device: on which heads trained.
        heads: that trained.
        findings: in the order of `PARTS`.
        times: seconds, by what was timed: ``model``, ``first batch``, ``batch``, ``step``, ``merge``, ``evaluation``, ``save``
            and ``resume``; what wasn't reached is missing.
        seconds: of the whole check.
    """

    worker: str
    device: str
    heads: int
    findings: tuple[Finding, ...]
    times: Mapping[str, float]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; there may be warnings."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What is wrong."""
        return tuple(finding for finding in self.findings if finding.status == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What may be wrong."""
        return tuple(finding for finding in self.findings if finding.status == "warning")

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(f"{finding.status}: {finding.part}: {finding.text}" for finding in self.findings)


class Findings:
    """Collects findings and times. An error in one part doesn't keep the others from being looked at."""

    def __init__(self) -> None:
        self.all: list[Finding] = []
        self.times: dict[str, float] = {}

    def ok(self, part: str, text: str) -> None:
        """Records that nothing is wrong with a part."""
        self._add(Finding(part, "ok", text))

    def warn(self, part: str, text: str, details: str = "") -> None:
        """Records what may be wrong."""
        self._add(Finding(part, "warning", text, details))

    def fail(self, part: str, text: str) -> None:
        """Records what is wrong."""
        self._add(Finding(part, "error", text))

    def skip(self, part: str, text: str) -> None:
        """Records why a part wasn't looked at."""
        self._add(Finding(part, "skipped", text))

    def fail_with(self, part: str, error: Exception, where: str = "") -> None:
        """Records an exception as an error; `where` names what raised, as for `explain`."""
        self._add(Finding(part, "error", *explain(error, where)))

    def has_failed(self, part: str) -> bool:
        """Whether there is an error of this part."""
        return any(finding.part == part and finding.status == "error" for finding in self.all)

    def _add(self, finding: Finding) -> None:
        text, details = redact(finding.text), redact(finding.details)
        self.all.append(Finding(finding.part, finding.status, text, details))

    def in_order(self) -> tuple[Finding, ...]:
        """All findings, in the order of `PARTS`."""
        return tuple(sorted(self.all, key=lambda finding: PARTS.index(finding.part)))

    @contextlib.contextmanager
    def looking_at(self, part: str, where: str = "") -> Iterator[None]:
        """Records what the block raises as an error of this part, as `fail_with`, and goes on after the block."""
        try:
            yield
        except Exception as error:
            self.fail_with(part, error, where)

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Times the block."""
        begin = time.perf_counter()
        yield
        self.times[what] = time.perf_counter() - begin
