"""A node drains, as a spot machine with a notice: how long until its heads' steps are merged, and are any of them lost?

Real runs of four heads on several Ray nodes on this machine, with 30 ms a step and 40 steps a round. Again and again a node
with heads drains, and is taken away. Times count from the moment at which Ray was told; the record of the run has all else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import progress, report

CASES = ("barrier", "quorum", "arrival")
SCRIPT = Path(__file__).parents[1] / "tests" / "support" / "node_drain.py"

MAX_SECONDS = 2.0
"""From a notice to the merge of what the heads had trained, at most, in the median."""


def measure(case: str, times: int) -> dict[str, Any]:
    """Runs a case; returns the seconds of each head that had to leave, and the steps that were lost."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, SCRIPT, folder, case, str(times)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise SystemExit(process.stdout + process.stderr)
        rows = [json.loads(line) for line in (Path(folder) / "r" / "metrics.jsonl").read_text().splitlines()]
        notices = json.loads(process.stdout.splitlines()[-1])["notices"]
    merges = [row for row in rows if row["kind"] == "merge"]
    merged, again = [], []
    for notice in notices:
        events = [row for row in rows if row.get("event") == "node_drains" and row["node"] == notice["node"]]
        for head in [str(head) for event in events for head in event["heads"]]:
            after = [row for row in merges if row["at"] >= notice["at"] and head in row["held"]]
            incarnation = after[0]["held"][head]["incarnation"] if after else 0
            back = [row for row in after if row["held"][head]["incarnation"] > incarnation]
            if after and back:  # else it had trained nothing since its last merge
                merged.append(after[0]["at"] - notice["at"])
                again.append(back[0]["at"] - notice["at"])
    lost = 0  # what heads had trained when they moved, and what was merged of it
    for row in [row for row in rows if row.get("event") == "head_moves"]:
        (head,) = map(str, row["heads"])
        held = [m["held"][head] for m in merges if head in m["held"]]
        lost += row["step"] - max((each["step"] for each in held if each["incarnation"] <= row["incarnation"]), default=0)
    return {
        "notices": len(notices),
        "seconds_until_merged": [round(each, 2) for each in merged],
        "seconds_until_merged_again_elsewhere": [round(each, 1) for each in again],
        "heads_lost": sum(row.get("event") in ("head_lost", "head_hung") for row in rows),
        "steps_lost": lost,
    }


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3, help="notices of each case")
    times = parser.parse_args().times
    figures: dict[str, Any] = {}
    for number, case in enumerate(CASES, 1):
        figures[case] = measure(case, times)
        progress(number, len(CASES), f"{case}: {figures[case]['seconds_until_merged']} s")
    seconds = [each for case in CASES for each in figures[case]["seconds_until_merged"]]
    figures["median_seconds_until_merged"] = round(statistics.median(seconds), 2)
    figures["longest_seconds_until_merged"] = max(seconds)
    figures["steps_lost"] = sum(figures[case]["steps_lost"] for case in CASES)
    report(
        "drain",
        limits={
            "median_seconds_until_merged": f"<= {MAX_SECONDS:g}",
            "steps_lost": "0",
            "heads_lost": "0",
        },
        met={
            "median_seconds_until_merged": figures["median_seconds_until_merged"] <= MAX_SECONDS,
            "steps_lost": figures["steps_lost"] == 0,
            "heads_lost": not any(figures[case]["heads_lost"] for case in CASES),
        },
        figures=figures,
    )


if __name__ == "__main__":
    main()
