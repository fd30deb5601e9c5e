"""`lte-ray report` and `lte_ray.write_report`, on runs made by hand."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lte_ray
from lte_ray.cli.main import main
from lte_ray.errors import ConfigError, StorageError
from lte_ray.report import write_report
from lte_ray.run.error_log import ERRORS
from lte_ray.run.metrics_files import METRICS
from lte_ray.storage import RUN
from tests.support.long_run import make_long_run
from tests.support.run_folders import driver, evaluation_row, event_row, make_run, merge_row

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three merges, the second without head 1, with an evaluation, an event and a traceback."""
    rows = [merge_row(1, 101.0, bytes_up=10, bytes_down=5, stall_seconds={"0": 0.0, "1": 0.0})]
    rows += [merge_row(2, 102.0, heads=(0,), bytes_up=10, bytes_down=5, stall_seconds={"0": 0.5})]
    rows += [evaluation_row(2, 102.5, loss=0.25), event_row("head_lost", 102.7, heads=[1], why="killed")]
    rows += [merge_row(3, 104.0, bytes_up=10, bytes_down=5, stall_seconds={"0": 0.0, "1": 1.0}), event_row("finished", 105.0)]
    make_run(tmp_path / "run", *rows, lr=0.01)
    (tmp_path / "run" / ERRORS).write_text("2026-01-02 head 1: killed\n")
    return tmp_path / "run"


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


def chart(data: dict[str, Any], figure: str) -> dict[str, tuple[list[Any], list[Any]]]:
    """The lines of a chart: by label, samples and values."""
    lines = next(each["lines"] for each in data["charts"] if each["figure"] == figure)
    tables = data["tables"]
    return {
        line["label"]: (tables[line["table"]]["axes"]["samples"], tables[line["table"]]["columns"][line["column"]])
        for line in lines
    }


def test_a_page_has_curves_facts_events_and_settings(run: Path, tmp_path: Path) -> None:
    """Of a finished run, with nothing missing."""
    report = lte_ray.write_report(run, tmp_path / "out.html")
    assert report == lte_ray.Report(tmp_path / "out.html", (tmp_path / "out.html").stat().st_size, {})
    data, page = data_of(report.path), report.path.read_text()
    loss = chart(data, "train/loss")
    assert loss == {
        "mean": ([160, 240, 400], [1.5, 0.5, pytest.approx(0.83333)]),
        "head 0": ([160, 240, 400], [1, 0.5, pytest.approx(0.33333)]),
        "head 1": ([160, 240, 400], [2, None, pytest.approx(1.3333)]),
    }
    assert chart(data, "eval/loss") == {"Evaluation: loss": ([240], [0.25])}
    assert data["tables"][1]["axes"] == {"samples": [240], "step": [20], "seconds": [2], "bytes": [30]}
    assert chart(data, "heads/utilisation")["head 1"][1] == [None, None, pytest.approx(2 / 3, abs=1e-5)]
    assert [row["name"] for row in data["timelines"][0]["rows"]] == ["head 0", "head 1"]
    for part in ("head_lost", "why=killed", "2026-01-02 head 1: killed", "finished", "workers.regression:Regression"):
        assert part in page
    assert "What is missing" not in page


def test_runs_stand_side_by_side_with_their_differences(run: Path, tmp_path: Path) -> None:
    """A line of each figure for each run, without single heads; settings that differ are marked."""
    make_run(tmp_path / "other", merge_row(1, 101.0), lr=0.02)
    report = write_report([run, tmp_path / "other"], tmp_path / "out.html")
    assert set(chart(data_of(report.path), "train/loss")) == {"run", "other"}
    differing = report.path.read_text().split("Where the runs differ")[1].split("</table>")[0]
    assert re.findall(r'scope="row">(\w+)<', differing) == ["lr"]
    assert set(report.missing) == {str(tmp_path / "other")}
    (tmp_path / "more").mkdir()
    make_run(tmp_path / "more" / "run", merge_row(1, 101.0))
    assert set(chart(data_of(write_report([run, tmp_path / "more" / "run"], tmp_path / "out.html").path), "train/loss")) == {
        str(run),
        str(tmp_path / "more" / "run"),
    }


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    """Names of figures, events, settings, tracebacks and states: the page has them as text, and no script but ours."""
    rows = [merge_row(1, 1.0, figures={EVIL: {"0": 1.0, "1": 2.0}}, **{EVIL: 3.0}), evaluation_row(1, 2.0, **{EVIL: 1.0})]
    make_run(tmp_path / "r", *rows, event_row(EVIL, 3.0, why=EVIL), event_row("ended_early", 4.0, why=EVIL), program=EVIL)
    (tmp_path / "r" / RUN).write_text((tmp_path / "r" / RUN).read_text() + f"{json.dumps(EVIL)} = {json.dumps(EVIL)}\n")
    (tmp_path / "r" / ERRORS).write_text(EVIL)
    page = write_report(tmp_path / "r", tmp_path / "out.html").path.read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == page.count("</script") == 3
    policy = html.unescape(re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0])
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r'(?:src|href)="', page)
    assert any(EVIL.partition("\u2028")[0] in each["title"] for each in data_of(tmp_path / "out.html")["charts"])


def test_long_curves_are_thinned_and_keep_their_peak(tmp_path: Path) -> None:
    """The page says so."""
    make_long_run(tmp_path / "r", 3000, heads=3)
    report = write_report(tmp_path / "r", tmp_path / "out.html")
    samples, values = chart(data_of(report.path), "train/loss")["mean"]
    assert len(samples) == len(values) == 1200
    assert max(values) == 99.0
    assert samples == sorted(samples)
    assert samples[-1] == 3000 * 320 * 3
    assert "the curves of 3,000 merges are thinned" in report.path.read_text()
    assert report.size < 1_000_000


@pytest.mark.parametrize("damage", ["settings", "rows", "environment", "all", "empty"])
def test_a_damaged_run_gives_a_partial_report_that_says_so(run: Path, tmp_path: Path, damage: str) -> None:
    """Whatever file is damaged."""
    names = {
        "settings": [RUN],
        "rows": [METRICS],
        "environment": ["environment.json"],
        "all": [RUN, METRICS, "environment.json"],
    }
    for name in names.get(damage, []):
        (run / name).write_bytes(b'\xff{"kind": [\x00')
    if damage == "empty":
        (run / METRICS).unlink()
    report = write_report(run, tmp_path / "out.html")
    assert "What is missing of" in report.path.read_text()
    assert len(report.missing[str(run)]) >= (3 if damage == "all" else 1)
    if damage in ("settings", "environment"):
        assert chart(data_of(report.path), "train/loss")


def test_a_running_run_says_that_it_goes_on(run: Path, tmp_path: Path) -> None:
    """It shows what there is."""
    with driver(make_run(tmp_path / "new")):
        report = write_report([tmp_path / "new", run], tmp_path / "out.html")
    texts = report.missing[str(tmp_path / "new")]
    assert "Nothing was merged yet." in texts
    assert any(text.startswith("The run goes on") for text in texts)


def test_what_is_no_run_is_one_error(run: Path, tmp_path: Path) -> None:
    """And nothing is written."""
    out = tmp_path / "out.html"
    (tmp_path / "folder").mkdir()
    no_file = "no run.toml, and no ladder.json or sweep.json"
    for path, part in ((tmp_path / "folder", no_file), (tmp_path / "nothing", "There is no run in")):
        with pytest.raises(StorageError, match=part):
            write_report([run, path], out)
    with pytest.raises(ConfigError, match=r"run is given twice\. Give each run once"):
        write_report([run, str(run)], out)
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], out)
    assert not out.exists()


def test_only_an_earlier_report_is_replaced(run: Path, tmp_path: Path) -> None:
    """Another file only if forced; and it stays if the new one can't be written."""
    out = tmp_path / "out.html"
    write_report(run, out)
    write_report(run, out)
    out.write_text("mine")
    with pytest.raises(ConfigError, match="isn't a report of lte-ray"):
        write_report(run, out)
    assert out.read_text() == "mine"
    write_report(run, out, force=True)
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["run", "out.html"] or len(list(tmp_path.iterdir())) == 2
    for bad, part in (
        ("s3://b/x.html", "local file"),
        (str(tmp_path), "must be a file"),
        (str(tmp_path / "no" / "x"), "no folder"),
    ):
        with pytest.raises(ConfigError, match=part):
            write_report(run, bad)


def test_the_command_prints_the_file_and_what_is_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name and by path, with -o and without."""
    make_run(tmp_path / "new")
    assert main(["report", "run", "new", "--storage", str(tmp_path), "-o", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path / 'x.html'} (")
    assert f"Missing of {tmp_path / 'new'}: Nothing was merged yet." in printed.err
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run)]) == 0
    assert (tmp_path / "report.html").exists()
    assert main(["report"]) == 2
    assert "lte-ray report needs RUN" in capsys.readouterr().err


def test_a_report_needs_neither_torch_nor_ray(run: Path, tmp_path: Path) -> None:
    """So it is made in a second."""
    code = (
        "import sys; from lte_ray.cli.main import main; "
        f"assert main(['report', {str(run)!r}, '-o', {str(tmp_path / 'x.html')!r}]) == 0; "
        "sys.exit(bool({'torch', 'ray'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3], env=os.environ)
