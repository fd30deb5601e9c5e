"""Bad settings, workers and policies, for `benchmarks.rejected`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.rejected_runner import Row, Run

GOOD = "workers.regression:Regression"

PLANS = ["--gpu 80XB", "--gpu A100", "--num-gpus 4", "--gpu 80GB --num-gpus 0", "--link 1Gb", "--step-time soon", "--baseline"]

SUBMISSIONS = [
    "",
    "mine.py:Net",
    "-- mine.py:Net",
    "-- python train.py",
    "watch a",
    "--submission-id ../a train regression",
    "--env 1=2 -- train regression",
    "--stop-time 0 train regression",
    "--package lte-ray==0.1.0 --working-dir none train regression",
    "--working-dir no/such/folder train regression",
    "train regression --address http://127.0.0.1:1",
    "train regression --storage runs",
    "train regression --num-heads 0",
    "--address http://127.0.0.1:1 --working-dir none train regression",
    "--address local train regression",
]

SWEEPS = [
    "",
    "--over lora-r",
    "--over lora-r=8,",
    "--over lora-r=8,0",
    "--over lora-rank=8,16",
    "--over worker.witdh=8,16",
    "--over lr=log:0:1",
    "--over worker.lr=1:0.1",
    "--over seed=1,2",
    "--over name=a,b",
    "--over wait=maybe",
    "--over worker.api-key=HIDDEN,b",
    "--over lora-r=8,16 --lora-r 8",
    "--over lora-r=8,16 --over lora-r=4",
    "--over lora-r=8,16 --num-trials 3",
    "--over lora-r=8,16 --num-trials 0",
    "--over lora-r=8,16 --seeds -1",
    "--over lora-r=8,16 --finalists 0",
    "--over lora-r=8,16 --max-concurrent -1",
    "--over lora-r=8,16 --scheduler hyperband",
    "--over lora-r=8,16 --scheduler asha --eval-every 0",
    "--over lora-r=8,16 --asha-start 1",
    "--over lora-r=8,16 --asha-factor 1",
    "--over lora-r=8,16 --best-by loss",
    "--over num-heads=1,2 --quorum 2 --when quorum",
]

SETTINGS = [
    "--num-heads 0",
    "--num-heads many",
    "--num-heads 1.5",
    "--num-heads -1",
    "--num-heds 2",
    "--batch-size 8",
    "--max-grad-norm 1",
    "--steps 3 4",
    "--log-level loud",
    "--steps 0",
    "--merge-iter 0",
    "--lora-r 0",
    "--lora-alpha nan",
    "--lora-alpha -1",
    "--seed -1",
    "--precision fp8",
    "--optimizer adam",
    "--optimizer lora-muon --lr 0.05",
    "--lr fast",
    "--replica-lr -1",
    "--schedule cosin",
    "--warmup 10",
    "--weight-decay -1",
    "--init-from no/such/weights",
    "--epochs 0",
    "--epochs 3 --steps 100",
    "--tokens 1e9",
    "--ema 1",
    "--ema -0.1",
    "--ema often",
    "--max-time soon",
    "--stop-when loss",
    "--stop-when 'loss<1' --eval-every 0",
    "--patience -1",
    "--profile 30:20",
    "--callback watch",
    "--transfer int3",
    "--when sometimes",
    "--quorum 9",
    "--reset B --no-wait",
    "--never-merge",
    "--never-merge --others frozen --policy nesterov",
    "--never-merge --others frozen --exhausted drop",
    "--send-down int4",
    "--merge-schedule 10",
    "--merge-schedule '0:1 0.5:10' --merge-every 30s",
    "--baseline-processes 2",
    "--baseline --baseline-processes 0",
    "--baseline --baseline-processes 4 --num-heads 6",
    "--baseline --baseline-processes 2 --merge-every 30s",
    "--exclude 9",
    "--others lora",
    "--others frozen --adapt none",
    "--others frozen --layers '@norm: lr=2'",
    "--merge-buffers codes",
    "--gpus-per-head 1.5",
    "--gpus-per-head 2",
    "--cpus-per-head inf",
    "--gpu-memory-share 0",
    "--gpu-memory-share 1.5",
    "--gpu-memory-share 0.5 --gpus-per-head 0",
    "--placement-strategy pack",
    "--head-labels spot",
    "--head-labels kind=a 'kind=!b'",
    "--coordinator-labels auto kind=a",
    "--keep-checkpoints 0",
    "--resume",
    "--resume --overwrite --name a",
    "--config missing.toml",
    "--min-heads 0",
    "--min-heads 9",
    "--max-heads 1",
    "--exhausted maybe",
    "--rejoin never",
    "--max-failures many",
    "--head-failures -2",
    "--backoff -1",
    "--grace -1",
    "--grace nan",
    "--grace soon",
    "--merge-every 30",
    "--measure-every -1",
    "--measure-every 5 --shards 2",
    "--measure-every 5 --never-merge --others frozen",
    "--max-norm-z -1",
    "--rollback-z -1",
    "--storage-patience -1",
    "--keep-best -1",
    "--log tensorbord",
    "--log none csv",
    "--log missing.py:Sink",
    "--log builtins:int",
]

FILES = [
    "[heads]\nsteps = 3",
    "[lte]\nnum_heads = 3",
    "steps = ",
    "stepz = 5",
    "steps = 'many'",
    "steps = true",
    "steps = [1, 2]",
    "steps = 18446744073709551616",
    "lora_alpha = inf",
    "exclude = ['a', '--overwrite']",
    "exclude = [['a']]",
    "name = '../up'",
    "policy = 5",
    "worker = 5",
    "policy_args = 5",
    "omitted = ['worker.lr']",
    "[name]\na = 1",
]

BINARY = {
    "bytes that are no text": b"\xff\xfe\x00",
    "arrays nested 50,000 deep": b"a = " + b"[" * 50_000 + b"]" * 50_000,
    "a number of 5,000 digits": b"steps = " + b"9" * 5_000,
    "2 MB": b"#" * 2_000_000,
}

WORKERS = '''
import torch
from torch import nn

class Net:
    def __init__(self, size: int = 8):
        self.size = size
    def build_model(self):
        return nn.Linear(8, 8)
    def train_batches(self, shard):
        while True:
            yield torch.randn(4, 8)
    def loss(self, model, batch):
        return model(batch).square().mean()
    def evaluate(self, model):
        return {}

class NoLoss(Net):
    loss = None

class NoBatches(Net):
    def train_batches(self, shard):
        yield from ()

class NoModel(Net):
    def build_model(self):
        return 5

class NothingToAdapt(Net):
    def build_model(self):
        return nn.LayerNorm(8)

class Raises(Net):
    def build_model(self):
        raise RuntimeError("weights are missing")

class Refuses(Net):
    def __init__(self, size: int = 8):
        raise ValueError("size must be 4")

class Untyped(Net):
    def __init__(self, size):
        pass

def function(): ...

class Empty:
    """A policy without a method."""

class Broken:
    def __init__(self, rate: float = 1.0):
        raise ValueError("rate must be 2")
    def merge(self, pending, roster): ...

def three(pending, roster, more): ...
'''


def settings(run: Run, folder: Path) -> Iterator[Row]:
    """Flags, and files given to --config."""
    for flags in SETTINGS:
        yield Row(flags, *run("train", GOOD, *shlex.split(flags), "--storage", str(folder / "runs")))
    for text, data in [*((text, text.encode()) for text in FILES), *BINARY.items()]:
        file = folder / "x.toml"
        file.write_bytes(data)
        yield Row(f"--config x.toml: {text}", *run("train", GOOD, "--config", str(file), "--storage", str(folder / "runs")))
    yield Row("--config", *run("train", GOOD, "--config"))
    yield Row("--config --name a", *run("train", GOOD, "--config", "--name", "a"))
    yield Row("--config FOLDER", *run("train", GOOD, "--config", str(folder)))
    (folder / "x.yaml").write_text("num_heads: 2")
    yield Row("--config x.yaml", *run("train", GOOD, "--config", str(folder / "x.yaml")))
    yield Row("trian", *run("trian"))
    yield Row("resume", *run("resume"))
    yield Row("resume nothing", *run("resume", "nothing", "--storage", str(folder / "runs")))
    yield Row("--address 127.0.0.1:1", *run("train", GOOD, "--address", "127.0.0.1:1", "--storage", str(folder / "runs")))
    yield Row("simulate --bandwidth 10Gb", *run("simulate", "--bandwidth", "10Gb"))
    yield Row("check", *run("check"))
    yield Row("check --gpu 80GB", *run("check", GOOD, "--gpu", "80GB"))
    for flags in PLANS:
        yield Row(f"plan {flags}", *run("plan", GOOD, *flags.split()))
    for flags in SUBMISSIONS:
        yield Row(f"submit {flags}".strip(), *run("submit", *shlex.split(flags)))
    (folder / "run.toml").write_text('program = "a:B"\nomitted = ["worker.lr"]')
    yield Row("--config run.toml that leaves out a secret", *run("train", GOOD, "--config", str(folder / "run.toml")))
    yield Row("RAY_ADDRESS=127.0.0.1:1", *run("train", GOOD, "--storage", str(folder / "runs")))


def sweeps(run: Run, folder: Path) -> Iterator[Row]:
    """Bad values of --over and what else `lte-ray sweep` takes."""
    for flags in SWEEPS:
        yield Row(f"sweep {flags}", *run("sweep", GOOD, *shlex.split(flags), "--storage", str(folder / "runs")))
    other = folder / "runs" / "other"
    other.mkdir(parents=True)
    (other / "letter.txt").write_text("dear")
    over = ("--over", "lora-r=8,16", "--storage", str(folder / "runs"))
    yield Row("sweep --name of another folder", *run("sweep", GOOD, *over, "--name", "other"))
    (other / "sweep.json").write_text("{")
    yield Row("sweep --name of a damaged sweep", *run("sweep", GOOD, *over, "--name", "other"))


def workers(run: Run, folder: Path) -> Iterator[Row]:
    """Bad values of WORKER."""
    (folder / "net.py").write_text(WORKERS)
    (folder / "broken.py").write_text("import nothing_of_this_name")
    yield Row("no WORKER", *run("train"))
    for name in (
        "nowhere:Net",
        "regresion",
        "workers.regression",
        "workers.regression:Regresion",
        "no/file.py:Net",
        "os:system",
        "json:loads",
    ):
        yield Row(name, *run("train", name))
    for flags in ("--worker.model ./nowhere", "--worker.model ./nowhere --worker.data x"):
        yield Row(f"causal-lm {flags}", *run("train", "causal-lm", *flags.split(), "--storage", str(folder / "runs")))
    yield Row("image", *run("train", "image", "--storage", str(folder / "runs")))
    yield Row("broken.py:Net", *run("train", f"{folder}/broken.py:Net"))
    for name in ("NoLoss", "NoBatches", "NoModel", "NothingToAdapt", "Raises", "Refuses", "Untyped", "function", "Nett"):
        yield Row(
            f"net.py:{name}", *run("train", f"{folder}/net.py:{name}", "--lora-r", "4", "--storage", str(folder / "runs"))
        )
    plain = f"{folder}/net.py:Net", "--lora-r", "4", "--storage", str(folder / "runs")
    yield Row("net.py:Net --optimizer muon", *run("train", *plain, "--optimizer", "muon"))
    for flags in ("--worker.widht 3", "--worker.width wide", "--worker.samples 1"):
        yield Row(f"{GOOD} {flags}", *run("train", GOOD, *flags.split(), "--storage", str(folder / "runs")))


def policies(run: Run, folder: Path) -> Iterator[Row]:
    """Invalid merge policies, and unknown arguments."""
    (folder / "mine.py").write_text(WORKERS)
    given = [
        "--policy avrage",
        "--policy nowhere:Policy",
        f"--policy {folder}/mine.py:Empty",
        f"--policy {folder}/mine.py:Broken",
        f"--policy {folder}/mine.py:three",
        "--policy momentum --policy.momentum 2",
        "--policy momentum --policy.speed 2",
        "--policy krum --policy.faulty -1",
        "--policy trimmed_mean --policy.trim 0.6",
    ]
    for flags in given:
        shown = flags.replace(f"{folder}/", "")
        yield Row(shown, *run("train", GOOD, *flags.split(), "--storage", str(folder / "runs")))


def watching(run: Run, folder: Path) -> Iterator[Row]:
    """Bad values of RUN and STORAGE for `lte-ray status` and others that read a run's files."""
    (folder / "no-run").mkdir()
    for command in ("status", "watch", "logs", "stop"):
        yield Row(f"{command} without a RUN", *run(command))
        yield Row(f"{command} of a folder that is no run", *run(command, str(folder / "no-run")))
    yield Row("status of a name that isn't there", *run("status", "nothing", "--storage", str(folder)))
    yield Row("status of a path, with --storage", *run("status", "./nothing", "--storage", str(folder)))
    yield Row("runs of a folder that isn't there", *run("runs", str(folder / "nowhere")))
    (folder / "run").mkdir()
    (folder / "run" / "run.toml").write_text("")
    (folder / "run" / "metrics.jsonl").write_text('{"kind": "event", "at": 1.0, "event": "finished"}\n')
    yield Row("stop of a run without a process", *run("stop", str(folder / "run")))
    yield Row("stop --timeout soon", *run("stop", str(folder / "run"), "--timeout", "soon"))
    yield Row("stop --timeout -1", *run("stop", str(folder / "run"), "--timeout=-1"))
    yield Row("runs of a run", *run("runs", str(folder / "run")))


def reports(run: Run, folder: Path) -> Iterator[Row]:
    """Bad values of RUN and --out for `lte-ray report`."""
    yield Row("report without a RUN", *run("report"))
    (folder / "no-run").mkdir()
    yield Row("report of a folder that is no run", *run("report", str(folder / "no-run"), "-o", str(folder / "x.html")))
    yield Row("report of a name that isn't there", *run("report", "nothing", "--storage", str(folder)))
    for name, files in {"good": {"run.toml": ""}, "ladder": {"ladder.json": "{"}, "sweep": {"sweep.json": "[]"}}.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    good = str(folder / "good")
    yield Row("report of a damaged ladder", *run("report", str(folder / "ladder"), "-o", str(folder / "x.html")))
    yield Row("report of a damaged sweep", *run("report", str(folder / "sweep"), "-o", str(folder / "x.html")))
    yield Row("report of a run given twice", *run("report", good, good, "-o", str(folder / "x.html")))
    (folder / "mine.txt").write_text("mine")
    yield Row("report -o a file that is no report", *run("report", good, "-o", str(folder / "mine.txt")))
    yield Row("report -o a folder", *run("report", good, "-o", str(folder)))
    yield Row("report -o in a folder that isn't there", *run("report", good, "-o", str(folder / "nowhere" / "x.html")))
    yield Row("report -o s3://bucket/x.html", *run("report", good, "-o", "s3://bucket/x.html"))


def audits(run: Run, folder: Path) -> Iterator[Row]:
    """Bad values of RUN for `lte-ray audit`."""
    yield Row("no RUN", *run("audit"))
    yield Row("a folder that isn't there", *run("audit", str(folder / "nowhere")))
    (folder / "empty").mkdir()
    yield Row("a folder that is no run", *run("audit", str(folder / "empty")))
    merge = '{"kind": "merge", "version": 1}'
    files = {"rows that are no JSON": "{\n{}", "a row that is a list": "[1]\n{}", "a merge without figures": merge}
    for name, text in files.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        (place / "run.toml").write_text("")
        (place / "metrics.jsonl").write_text(text + "\n")
        yield Row(name, *run("audit", str(place)))


CATEGORIES: dict[str, Callable[[Run, Path], Iterator[Row]]] = {
    "Settings": settings,
    "Sweeps": sweeps,
    "Workers": workers,
    "Policies": policies,
    "Watching": watching,
    "Reports": reports,
    "Audits": audits,
}
