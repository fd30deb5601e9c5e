"""`lte-ray simulate`: its output, its files and its errors. It starts no Ray."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from lte_ray.cli.main import main
from lte_ray.cli.timeline import COLORS, STYLES, shown_seconds, slices, svg, timeline
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.settings import Settings
from lte_ray.simulation.api import simulate_time
from lte_ray.simulation.cost_model import named_plan
from lte_ray.simulation.record import KINDS, Row, SimulationRecord, Span

FOUR = ("--num-heads", "4", "--speeds", "1", "1", "1", "4", "--steps", "100")


def simulated(**merge: object) -> SimulationRecord:
    settings = Settings("x", LTEConfig(num_heads=4), MergeConfig(**merge), TrainConfig(steps=100))  # type: ignore[arg-type]
    return simulate_time([named_plan("gpt2-124m", 8, 8.0)], settings, ClusterModel(speeds=(1, 1, 1, 4)))


def test_shapes_alone_give_a_summary_and_a_picture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a worker: utilization, bytes, staleness, and a row for each head and the coordinator."""
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["simulate", *FOUR]) == 0
    out = capsys.readouterr().out
    assert "gpt2-124m: average, barrier, every 10 steps" in out
    for word in ("utilisation", "heads' time", "400 local steps", "staleness", "0.00 versions on average", "bytes", "MB up"):
        assert word in out
    rows = [line for line in out.splitlines() if line.startswith(("     head ", "coordinator "))]
    assert [line.split()[0] for line in rows] == ["head"] * 4 + ["coordinator"]
    assert all(len(line) <= 100 for line in rows)
    assert "█ train" in out
    assert "validation" not in out


def test_a_worker_trains_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    """Its evaluation and losses are printed, and its own flags are accepted."""
    command = ["simulate", "workers.regression:Regression", "--num-heads", "2", "--steps", "40", "--worker.width", "8"]
    assert main([*command, "--when", "arrival", "--no-wait", "--policy", "stale"]) == 0
    out = capsys.readouterr().out
    assert "workers.regression:Regression: stale, arrival, no waiting, every 10 steps" in out
    assert "validation loss" in out
    assert "in the first merge" in out


@pytest.mark.parametrize("adapt", [["--adapt"], ["--adapt", "none"]])
def test_everything_may_train_as_replicas(adapt: list[str], tmp_path: Path) -> None:
    """`--adapt` with nothing, or with none: heads send full weights, as in full rank."""
    command = ["simulate", "workers.regression:Regression", "--num-heads", "2", "--steps", "20"]
    sent = []
    for name, flags in (("none", adapt), ("full", ["--full-rank"])):
        assert main([*command, *flags, "--json", str(tmp_path / name)]) == 0
        record = json.loads((tmp_path / name).read_text())
        assert (record["settings"]["LTEConfig"]["adapt"] == []) == (name == "none")
        sent.append(record["bytes_up"])
    assert sent[0] == sent[1] != 0


def test_with_time_only_a_worker_only_gives_its_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes are those of the worker's model; there is no evaluation."""
    assert main(["simulate", "workers.regression:Regression", "--num-heads", "2", "--steps", "20", "--time-only"]) == 0
    out = capsys.readouterr().out
    assert "validation" not in out
    assert " kB up" in out


def test_the_record_holds_the_settings_and_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON without NaN. The same command writes the same record."""
    for name in ("a.json", "b.json"):
        assert main(["simulate", *FOUR, "--jitter", "0.1", "--json", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["settings"]["ClusterModel"]["speeds"] == [1, 1, 1, 4]
    assert record["settings"]["LTEConfig"]["num_heads"] == 4
    assert (record["versions"], record["steps"], len(record["heads"]), len(record["rows"])) == (10, 400, 4, 5)
    assert record["merges"][0]["loss"] is None
    assert sum(record["shares"].values()) == pytest.approx(1)


def test_the_picture_is_well_formed_and_to_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The SVG parses; the first bar of each head is its first round, as wide as its time."""
    file = tmp_path / "a.svg"
    assert main(["simulate", *FOUR, "--picture", str(file)]) == 0
    run = simulated()
    root = ET.fromstring(svg(run, "a < b"))
    assert ET.fromstring(file.read_text()).tag == root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in texts
    assert {"head 0", "head 3", "coordinator", "train", "wait"} <= set(texts)
    bars = [
        r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("x") == "90.00" and r.get("fill") == COLORS["train"]
    ]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths[:3] == pytest.approx([1 / shown_seconds(run) * 900] * 3, abs=0.01)
    assert widths[3] == pytest.approx(4 * widths[0], abs=0.05)


def test_the_picture_can_be_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the timeline of all rows, and curves against steps and time; nothing was trained, so none against samples."""
    file = tmp_path / "a.html"
    assert main(["simulate", *FOUR, "--when", "arrival", "--no-wait", "--picture", str(file)]) == 0
    run, text = simulated(when="arrival", wait=False), file.read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    (timeline,) = data["timelines"]
    assert [row["name"] for row in timeline["rows"]] == [*(f"head {n}" for n in range(4)), "coordinator"]
    assert timeline["end"] == pytest.approx(run.seconds, rel=0.05)
    share = sum(timeline["rows"][0]["shares"]["training"]) / 100 / 480 * timeline["end"]
    assert share == pytest.approx(run.heads[0].seconds["train"], rel=0.01)
    assert list(data["tables"][0]["axes"]) == ["step", "seconds"]
    lag = next(chart for chart in data["charts"] if chart["title"] == "Staleness")
    assert [line["label"] for line in lag["lines"]] == ["max", "mean"]
    assert "gpt2-124m: average, arrival, no waiting" in text


def test_a_slice_shows_what_fills_most_of_it() -> None:
    """Ten slices of ten seconds: a short wait disappears, and idle time is empty."""
    row = Row("head 0", (Span("train", 0, 3.4), Span("wait", 3.4, 3.6), Span("train", 3.6, 5), Span("dead", 5, 7)))
    assert slices(row, 10, 10) == ["train"] * 5 + ["dead"] * 2 + [None] * 3


def test_the_picture_is_readable_without_unicode_and_color() -> None:
    """ASCII has a different sign for each kind."""
    text = timeline(simulated(wait=False, when="arrival"), 80, unicode=False).plain
    assert text.isascii()
    assert "# train" in text
    assert "| newer base adopted while training" in text
    for column in (0, 1):
        signs = [style[column] for style in STYLES.values()]
        assert len(set(signs)) >= len(signs) - 1
    assert set(KINDS) <= set(STYLES)
    assert set(KINDS) <= set(COLORS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt3"], "--shapes is 'gpt3', but it must be one of: gpt2-124m"),
        (["--json", "nowhere/a.json"], "--json is nowhere/a.json, but there is no folder nowhere."),
        (["--policy", "gated"], "which a simulation that only keeps time can't: give a WORKER"),
        (["--shards", "1000"], "--shards is 1000, but the model has 48 adapted weights"),
        (["no.such:Worker"], "WORKER"),
        (["workers.regression:DEFAULT"], "WORKER"),
        (["--step-seconds", "-1"], "--step-seconds is -1.0"),
    ],
)
def test_settings_that_cannot_be_simulated_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with exit code 1 or 2, and no file."""
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *arguments]) in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_a_runs_toml_may_be_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The settings of a run.toml that matter here are used; its resources are ignored."""
    (tmp_path / "run.toml").write_text(
        'program = "x:Y"\nname = "a"\nnum_heads = 3\nsteps = 20\ncpus_per_head = 2.0\nspeeds = [1.0, 2.0]\n'
    )
    assert main(["simulate", "--config", str(tmp_path / "run.toml")]) == 0
    assert "60 local steps" in capsys.readouterr().out
