"""What the charts of a report are called, where they stand, and what they explain, by the names of figures in sinks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SECTIONS: Mapping[str, str] = {
    "loss": "Loss and evaluation",
    "heads": "Heads",
    "changes": "Changes",
    "cost": "Speed, traffic and memory",
    "optimizer": "Learning rates and gradients",
    "figures": "Figures of the worker",
    "other": "Other figures",
}
"""Titles of the parts of a report that have charts, in their order."""


class ChartKind(NamedTuple):
    """A chart: the key of its section, its title, the unit of its values, and a sentence that explains it."""

    section: str
    title: str
    unit: str = "number"
    help: str = ""


KNOWN: Mapping[str, ChartKind] = {
    "train/loss": ChartKind("loss", "Training loss", "loss", "Mean loss of the local steps that each merge holds."),
    "heads/utilisation": ChartKind(
        "heads", "Utilisation", "share", "Share of a head's time between two of its merges in which merging left it training."
    ),
    "merge/lag": ChartKind("heads", "Staleness", "number", "Merges by which a contribution was behind when it was merged."),
    "merge/head_steps": ChartKind("heads", "Local steps of a contribution"),
    "merge/stall_seconds": ChartKind(
        "heads", "Time lost to merging", "seconds", "Seconds that a head lost to merging since its merge before."
    ),
    "merge/weight": ChartKind("heads", "Weight in the merge"),
    "merge/change_norm": ChartKind(
        "changes", "Norm of the heads' changes", "number", "Frobenius norm of all that a contribution adds at weight 1."
    ),
    "merge/change_alignment": ChartKind(
        "changes", "Alignment of the heads' changes", "number", "Mean cosine with the changes of the other heads in the merge."
    ),
    "merge/effective_rank": ChartKind(
        "changes", "Effective rank of the heads' mean change", "number", "Mean over the adapted weights."
    ),
    "merge/base_error": ChartKind("changes", "Error of the quantized base"),
    "speed/samples_per_second": ChartKind("cost", "Samples per second", "number", "All heads together, over 10 merges."),
    "speed/tokens_per_second": ChartKind("cost", "Tokens per second", "number", "All heads together, over 10 merges."),
    "speed/mfu": ChartKind("cost", "MFU", "share", "Model FLOP utilisation: operations of the model per second, divided by the "
                           "most that the GPUs are capable of."),
    "merge/seconds": ChartKind("cost", "Time of a merge", "seconds", "Time of the coordinator's products."),
    "traffic/sent": ChartKind(
        "cost", "Bytes sent", "bytes", "Up and down, since the run began; and what other ways of training would have sent."
    ),
    "memory/process": ChartKind("cost", "Memory of a head's process", "bytes", "Its peak so far."),
    "memory/gpu": ChartKind("cost", "GPU memory of a head", "bytes", "The most that torch has allocated so far."),
    "train/gradient_norm": ChartKind(
        "optimizer", "Norm of the gradient", "number", "In the first step after a merge, before clipping."
    ),
    "train/ema_keep": ChartKind("other", "Share of the moving average that a merge keeps"),
    "merge/contributions": ChartKind("other", "Contributions in a merge"),
    "merge/steps": ChartKind("other", "Local steps of a merge", "number", "Of all its contributions."),
}  # fmt: skip

LEFT_OUT = ("traffic/bytes_up", "traffic/bytes_down", "traffic/instead")
"""Figures without a chart: `traffic/sent` has their sums."""

ZERO_LEFT_OUT = ("merge/base_error",)
"""Figures without a chart if they are always 0."""


def chart_kind(name: str) -> ChartKind:
    """The chart of a figure, whatever its name in sinks. What isn't the run's own under "train" is the worker's."""
    if name in KNOWN:
        return KNOWN[name]
    group, _, rest = name.partition("/")
    words = rest.replace("_", " ") or group
    if group == "eval":
        return ChartKind("loss", f"Evaluation: {words}", "loss" if "loss" in rest else "number")
    if name.startswith("train/lr/"):
        return ChartKind("optimizer", f"Learning rate: {words.partition('/')[2]}")
    if group == "train":
        return ChartKind("figures", words)
    if name.startswith("merge/outer_step/"):
        return ChartKind("changes", f"Outer step: {words.partition('/')[2]}")
    return ChartKind("other", f"{group}: {words}")


def order(name: str) -> tuple[int, int]:
    """Where the chart of a figure stands: its section, and its place there; those that aren't known come last."""
    places = list(KNOWN)
    return list(SECTIONS).index(chart_kind(name).section), places.index(name) if name in KNOWN else len(places)


def base_name(name: str) -> tuple[str, str]:
    """The name of a figure, and which part of it this is: "" for the mean, else "head 3", "min" or "max"."""
    base, _, last = name.rpartition("/")
    if base.count("/") and last.startswith("head_") and last[5:].isdigit():
        return base, f"head {last[5:]}"
    if base.count("/") and last in ("min", "max"):
        return base, last
    return name, ""
