"""Runs on hosts with networks of their own (`tests/support/network.py`): their traffic, and slow links.

Usage: python -m benchmarks.cluster [--part links|traffic]; all parts by default. Needs root and iproute2.

- links: asynchronous LTE on three hosts that are joined at 100 Mbit/s, data-parallel training of the same model (Ray Train with
  gloo), and DiLoCo at the same interval.
- traffic: seconds to the first step, merges, and bytes between hosts against the fewest; 2 to 16 heads, 1 to 4 hosts.

Bytes are those that the hosts' interfaces count, with the headers of packets and with Ray's own messages.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.cluster_links import links
from benchmarks.cluster_traffic import traffic
from benchmarks.report import RESULTS, report
from tests.support.network import NetworkUnavailable

Part = Callable[[], tuple[dict[str, Any], dict[str, tuple[str, bool]]]]

PARTS: dict[str, Part] = {"links": links, "traffic": traffic}
"""Each returns its figures, and its limits with whether they are met."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="measure only this one, and keep the results of the others")
    chosen = parser.parse_args().part
    measured = {}
    for name in [chosen] if chosen else PARTS:
        try:
            measured[name] = PARTS[name]()
        except NetworkUnavailable as error:
            sys.exit(f"{name}: this machine can't make such a network: {error}")
    path = RESULTS / "cluster.json"
    before = json.loads(path.read_text()) if path.exists() else {"figures": {}, "limits": {}, "met": {}}
    figures, limits, met = before["figures"], before["limits"], before["met"]
    for name, (found, reached) in measured.items():
        figures[name] = found
        limits |= {limit: text for limit, (text, _) in reached.items()}
        met |= {limit: is_met for limit, (_, is_met) in reached.items()}
    report("cluster", limits=limits, met=met, figures=figures)


if __name__ == "__main__":
    main()
