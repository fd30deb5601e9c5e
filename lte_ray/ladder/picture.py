"""The picture of a ladder: a figure against samples, one line for each rung."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import Any

from lte_ray.errors import ConfigError
from lte_ray.ladder.rungs import ORDINARY
from lte_ray.ladder.summary import Summary

COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2", "#9c6b4e", "#97bbf5")
"""Observable's categorical colors, which differ in lightness too. Ordinary training is black."""

MARKERS = "osD^vP*X"

DASHES = ("-", "--", ":")
"""Those of the first lines, of the next ones with the same colors, and so on."""

INSIDE = 8
"""Lines that a legend inside of the picture may name. With more it is below."""

HOW_TO_GET_MATPLOTLIB = (
    "The picture needs matplotlib: pip install 'lte-ray[plots]'. The same command then draws it without training."
)


def draw(summaries: Sequence[Summary], title: str, *, kind: str = "svg") -> bytes:
    """Returns the picture: means over seeds, with a band from the lowest to the highest of them.

    A figure that is above 0 and changes by half or more is on a logarithmic axis.

    Args:
        kind: "svg", "png" or "pdf".

    Raises:
        ConfigError: matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError as error:
        raise ConfigError(HOW_TO_GET_MATPLOTLIB) from error
    lines = sum(bool(s.curve) for s in summaries)
    shape: Any = Figure(figsize=(7.2, 4.4 if lines <= INSIDE else 4.4 + 0.1 * lines), layout="constrained")
    axes = shape.add_subplot()
    styles = itertools.cycle((*look, dash) for dash in DASHES for look in zip(COLORS, MARKERS, strict=True))
    values = []
    for s in summaries:
        if not s.curve:
            continue
        samples, means, low, high = (list(column) for column in zip(*s.curve, strict=True))
        color, marker, dash = ("black", "", "-") if s.name == ORDINARY else next(styles)
        look = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 2 if s.name == ORDINARY else 1.5}
        axes.plot(samples, means, **look, markersize=4, label=f"{s.name} (rate x{s.result.rate:g})")
        if len(s.values) > 1:
            axes.fill_between(samples, low, high, color=color, alpha=0.15, linewidth=0)
        values += means
    ordinary = next((s for s in summaries if s.name == ORDINARY and s.curve), None)
    if ordinary is not None:
        axes.axhline(ordinary.mean, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if values and min(values) > 0 and max(values) > 2 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("samples")
    axes.set_ylabel(summaries[0].figure.name.replace("_", " "))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if lines > INSIDE:
        shape.legend(frameon=False, fontsize="small", loc="outside lower left", ncols=2)
    elif lines:
        axes.legend(frameon=False, fontsize="small")
    content = io.BytesIO()
    with rc_context({"svg.hashsalt": "ladder"}):  # the same picture each time
        shape.savefig(content, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return content.getvalue()
