"""Puts a simulation's record together when it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from lte_ray.simulation.clock import Clock
from lte_ray.simulation.coordinator import SimCoordinator
from lte_ray.simulation.delivery import Delivery
from lte_ray.simulation.head import SimHead
from lte_ray.simulation.record import VirtualRun

MOST_ROWS = 16
"""Heads whose time can be drawn."""


def record(seats: Sequence[SimHead], desk: SimCoordinator, post: Delivery, clock: Clock) -> VirtualRun:
    """The record of a simulation whose heads have all ended."""
    desk.time.enter("end", clock.now)
    up, down = post.network.traffic()
    drawn = [seat.time for seat in seats[:MOST_ROWS]]
    rows = [time.row(f"head {number}") for number, time in enumerate(drawn)]
    whole = max(clock.now, 1e-300)
    return VirtualRun(
        seconds=max(seat.ended_at for seat in seats),
        heads=tuple(seat.record(up[seat.number], down[seat.number]) for seat in seats),
        merges=tuple(desk.merges),
        lags=dict(desk.lags),
        arrivals=desk.arrivals,
        coordinator_busy=desk.worked / whole,
        link_in_busy=post.network.inward.busy / whole,
        link_out_busy=post.network.outward.busy / whole,
        rows=(*rows, desk.time.row("coordinator")),
        cut=any(time.cut for time in (*drawn, desk.time)),
        events=clock.events,
    )
