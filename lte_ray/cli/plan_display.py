"""A plan as tables on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lte_ray.planning import Parts, RunPlan, total
from lte_ray.run.display import format_bytes

MAX_ROWS = 40
"""Rows of layers that are shown, at most."""

MIN_WIDTH = 110
"""Columns of the tables, at least: names of layers are long."""

UNKNOWN = "not known"


def show(plan: RunPlan, program: str) -> None:
    """Prints the plan."""
    console = Console(highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    _show_layers(console, plan)
    _show_head(console, plan)
    _show_processes(console, plan)
    _show_traffic(console, plan)
    _show_ordinary(console, plan)
    if plan.counts.factors:
        enough = f"The ranks of {plan.num_heads} head(s) add up to enough for merges to change every matrix in all directions."
        console.print(Text(f"{plan.low_rank or enough}\n"), soft_wrap=True)
    for note in plan.notes:
        console.print(Text(f"Note: {note}", style="yellow"), soft_wrap=True)
    _show_recommendation(console, plan, program)


def _table(console: Console, title: str, *columns: str) -> Table:
    console.print(Text(title, style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        left = index == 0 or column == "parts"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _show_layers(console: Console, plan: RunPlan) -> None:
    table = _table(
        console, f"What {plan.worker} trains", "parameters", "number", "shape", "trains", "rank", "format", "trained"
    )
    for row in plan.layers[:MAX_ROWS]:
        ranks = ", ".join(map(str, row.ranks[:4])) + (", ..." if len(row.ranks) > 4 else "")
        shape = " x ".join(map(str, row.shape)) or "scalar"
        trained = f"{row.trained:,}" if row.trained else "-"
        table.add_row(Text(row.name), str(row.count), shape, row.how, ranks or "-", row.base_dtype or "-", trained)
    console.print(table)
    if len(plan.layers) > MAX_ROWS:
        console.print(f"... and {len(plan.layers) - MAX_ROWS} more rows (--json has all)\n")
    counts = plan.counts
    console.print(
        f"The model has {counts.parameters:,} parameters: {counts.adapted:,} with factors, {counts.replicas:,} as replicas, "
        f"{counts.frozen:,} frozen.\nA head trains {counts.trained:,} values ({plan.trainable_share:.1%} of the model): "
        f"{counts.factors:,} in factors, {counts.replicas:,} in replicas.\n",
        soft_wrap=True,
    )


def _show_head(console: Console, plan: RunPlan) -> None:
    table = _table(console, "Memory of a head on its device, at the peak of a step", "part", "bytes")
    _add_parts(table, plan.head)
    console.print(table)
    if plan.head_by_format:
        sums = ", ".join(f"{name} {_bytes(size)}" for name, size in plan.head_by_format.items())
        console.print(f"By the format of main weights (--base-dtype): {sums}\n", soft_wrap=True)


def _show_processes(console: Console, plan: RunPlan) -> None:
    table = _table(console, "Memory of processes, besides Python, torch and Ray themselves", "process", "bytes", "parts")
    for name, parts in {"head, in the machine's memory": plan.host, **plan.processes}.items():
        listed = ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items())
        table.add_row(name, _bytes(total(parts)), listed if len(parts) > 1 else next(iter(parts), ""))
    console.print(table)


def _show_traffic(console: Console, plan: RunPlan) -> None:
    heads = f"{plan.num_heads} head{'s' * (plan.num_heads > 1)}"
    table = _table(
        console, f"A merge of {heads} (policy {plan.policy}), on links of {8 * plan.link / 1e9:.3g} Gbit/s", "--transfer",
        "--send-down", "up, a head", "down, a head", "time",
    )  # fmt: skip
    for way in plan.traffic:
        table.add_row(way.transfer, way.send_down, _bytes(way.up), _bytes(way.down), _seconds(way.seconds))
    console.print(table)
    console.print("Between heads on one machine, bytes go through shared memory.\n")


def _show_ordinary(console: Console, plan: RunPlan) -> None:
    table = _table(console, "The same without heads (AdamW, all that trains in full)", "", "memory", "parts")
    for name, parts in {"ordinary training": plan.ordinary, "DDP, each process": plan.ddp}.items():
        table.add_row(name, _bytes(total(parts)), ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items()))
    console.print(table)
    ring = plan.ddp_ring
    console.print(
        f"DDP on {max(2, plan.num_heads)} machines sends {_bytes(ring.bytes)} from each in every step, which takes "
        f"{_seconds(ring.seconds)}.\n",
        soft_wrap=True,
    )


def _show_recommendation(console: Console, plan: RunPlan, program: str) -> None:
    chosen = plan.recommendation
    if chosen is None:
        return
    console.print(Text("For these GPUs" if chosen.fits else "These GPUs don't fit", style="bold"))
    if chosen.fits:
        heads = f"{chosen.num_heads} heads" if chosen.num_heads != 1 else "1 head"
        console.print(f"  {heads}, {chosen.heads_per_gpu} a GPU, which fills {_bytes(chosen.bytes_per_gpu)} of each")
        console.print(Text(f"  lte-ray train {program} {chosen.flags}"), soft_wrap=True)
    for reason in chosen.reasons:
        console.print(Text(f"  {reason}"), soft_wrap=True)


def _add_parts(table: Table, parts: Parts | Mapping[str, int | None]) -> None:
    for name, size in parts.items():
        table.add_row(name, _bytes(size))
    table.add_section()
    table.add_row("total", _bytes(total(parts)))


def _bytes(size: int | None) -> str:
    return UNKNOWN if size is None else format_bytes(size)


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"
