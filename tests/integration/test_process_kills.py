"""Processes of every kind are killed or stopped at every point of the protocol, on a real Ray; no batch is lost or repeated.

A script (`fault_injection`) says which process sends itself which signal at which point. Several faults share a run, because
starting a run or a process takes seconds. While faults remain, heads train slowly, so that the run lasts.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.util import placement_group_table
from safetensors.torch import load_file
from torch import Tensor

from lte_ray import LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig, checkpoint, fault_injection
from lte_ray.audit import audit
from lte_ray.config import FailureConfig, PlacementConfig
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.layout import Layout
from lte_ray.merging.flat_buffer import views
from lte_ray.run.metrics import Reporter, SilentReporter
from lte_ray.storage import RunDirectory
from tests.support.ray_runs import DropoutRegression, lte_actors, merged_in_process, storage

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = 100
LAST = ("leaving.json", "finishes.json")
"""Ends of the names of faults that happen at the end of the run."""

HEADS = 3
NOT_WAITING: dict[str, Any] = {"when": "arrival", "wait": False}
NESTEROV: dict[str, Any] = {
    "policy": "nesterov",
    "policy_args": {"lr": 0.7, "momentum": 0.5, "final_lr": 0.5},
    "send_down": "factors",
}


@dataclass
class Patient(DropoutRegression):
    """Steps are slow, and the last ones very slow, while faults remain that happen before the end of the run."""

    script: str = ""
    steps: int = STEPS

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(super().train_batches(shard), shard.cursor + 1):
            if self.script and any(not path.name.endswith(LAST) for path in Path(self.script).glob("*.json")):
                time.sleep(0.1 if step < self.steps - 20 else 1.0)
            yield batch


def fault(point: str, signal: str = "SIGKILL", **where: int) -> dict[str, Any]:
    return {"point": point, "signal": signal, **where}


class Chaos:
    """A run under a script of faults, and its results."""

    def __init__(
        self,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        faults: list[dict[str, Any]],
        heads: int = HEADS,
        steps: int = STEPS,
        **merge: Any,
    ) -> None:
        self.path, self.faults, self.script, self.heads, self.steps = path, faults, path / "script", heads, steps
        self.script.mkdir()
        for number, item in enumerate(faults):
            (self.script / f"{number:02}-{item['point'].replace(' ', '-')}.json").write_text(json.dumps(item))
        monkeypatch.setenv(fault_injection.VARIABLE, str(self.script))
        self.lte = LTEConfig(num_heads=heads, lora_r=8, lora_alpha=16)
        self.merge = MergeConfig(**{"merge_iter": 5, "merge_threads": 1, **merge})
        self.train = TrainConfig(steps=steps, seed=3, budget="each", eval_every=4, checkpoint_every=2, ema=0.9)

    def run(self, worker: type[Patient] = Patient, reporter: Reporter | None = None, **failure: Any) -> None:
        """Trains to the end and asserts what must hold however many processes died."""
        result = LTETrainer(
            worker(script=str(self.script), steps=self.steps),
            lte=self.lte,
            merge=self.merge,
            train=self.train,
            scaling_config=PlacementConfig(cpus_per_head=0.5),
            failure=FailureConfig(head_failures=-1, backoff=0.1, **failure),
            reporter=reporter or SilentReporter(),
            run_config=storage(self.path, "r"),
        ).fit()
        self.model = load_file(Path(result.path) / "model.safetensors")
        self.rows = [json.loads(line) for line in (self.path / "r" / "metrics.jsonl").read_text().splitlines()]
        self.events = Counter(row["event"] for row in self.rows if row["kind"] == "event")
        assert sorted(path.name for path in self.script.glob("*.json")) == [], "faults that never happened"
        assert result.metrics is not None
        assert result.metrics["step"] == self.steps
        assert result.metrics["validation_loss"] < 0.3  # 0.67 before
        assert result.metrics["ema_validation_loss"] < 0.3
        assert self.events["ema_gap"] <= self.events["coordinator_lost"]
        report = audit(self.rows)
        assert report.clean, report.problems
        assert report.samples == self.heads * self.steps * DropoutRegression().batch_size
        self.assert_nothing_left()

    def assert_base_is_sum_of_references(self) -> None:
        """Asserts W = W_0 + sum_n s/N B'_n A'_n: the last version is the initial one plus its references, and no more."""
        directory = RunDirectory.open(str(self.path), "r")
        manifest, _ = checkpoint.read_newest_intact(directory)
        initial = prepare(DropoutRegression(), Settings("r", self.lte, self.merge, self.train))
        plan = initial.plan
        first, last = views(plan.base, initial.base), views(plan.base, checkpoint.read_base(directory, manifest, plan))
        references = checkpoint.read_references(directory, manifest, initial.plans)
        assert references.keys() == set(range(self.heads))
        layout = Layout(plan.contribution.entries[: 2 * len(plan.adapted)])
        factors = [views(layout, reference.double()) for reference in references.values()]
        for spec in plan.adapted:
            merged = sum(spec.scaling / self.heads * pair[spec.b_name] @ pair[spec.a_name] for pair in factors)
            change = (last[spec.name] - first[spec.name]).double()
            assert float(change.abs().max()) > 0.05
            assert torch.allclose(change, merged, rtol=0.0, atol=2e-5), spec.name  # float32, a few dozen sums

    def assert_nothing_left(self) -> None:
        """Asserts that no actor, placement group, partial file, or checkpoint without a manifest is left."""
        assert all(group["state"] == "REMOVED" for group in placement_group_table().values())
        deadline = time.monotonic() + 120
        while lte_actors() and time.monotonic() < deadline:  # they were killed; the kernel takes a moment
            time.sleep(0.05)
        assert lte_actors() == []
        assert not list(self.path.rglob("*.part"))
        checkpoints = list((self.path / "r" / "checkpoints").iterdir())
        assert checkpoints
        assert all((path / "manifest.json").exists() for path in checkpoints)

    def count(self, *names: str) -> int:
        """The number of the script's faults at these points, or at any point if none is named."""
        return sum(not names or item["point"] in names for item in self.faults)

    def train_without_faults(self) -> dict[str, Tensor]:
        """The merged model of the same run without faults and without Ray."""
        return merged_in_process(DropoutRegression(), self.lte, self.merge, self.train)


AT_HEADS = [
    fault("built", head=0),
    fault("started", head=1),
    fault("stepped", head=2, step=7),
    fault("contributes", head=1, step=10),
    fault("sent", head=0, step=15),
    fault("answered", head=2, step=20),
    fault("adopts", head=1, step=25),
    fault("adopted", head=0, step=30),
    fault("snapshot", head=2, step=35),
    fault("saved", head=1, version=8),
    fault("leaving", head=0),
    fault("evaluates"),
]
MORE_AT_HEADS = [fault("begins", head=1, incarnation=2)]
AT_THE_COORDINATOR = [
    fault("arrived", version=1),
    fault("decided", version=2),
    fault("answers", version=4),
    fault("base written", version=6),
    fault("commits", version=8),
    fault("committed", version=10),
]
MORE_AT_THE_COORDINATOR = [fault("coordinator begins", epoch=3), fault("finishes")]


def test_one_process_of_each_kind_is_killed(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head, the evaluator, a shard, and the coordinator in one run: all restart, and nothing is lost or merged twice."""
    faults = [
        fault("stepped", head=1, step=7),
        fault("evaluates"),
        fault("shard receives", head=0),
        fault("decided", version=5),
    ]
    chaos = Chaos(tmp_path, monkeypatch, faults, heads=2, steps=50, shards=2)
    chaos.run()
    assert chaos.events["head_lost"] == chaos.events["head_restarts"] == 1
    assert chaos.events["evaluator_lost"] == 1
    assert chaos.events["coordinator_lost"] == chaos.events["coordinator_restarts"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("merge", [{}, NOT_WAITING], ids=["barrier", "async"])
def test_heads_killed_at_every_point(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: dict[str, Any]
) -> None:
    """Each restarts and takes its steps; the evaluator dies, too. With a barrier, heads don't wait for a dead head."""
    chaos = Chaos(tmp_path, monkeypatch, AT_HEADS + (MORE_AT_HEADS if merge else []), **merge)
    chaos.run()
    assert chaos.events["head_lost"] >= chaos.count() - chaos.count("evaluates")
    assert chaos.events["head_restarts"] == chaos.events["head_lost"]
    assert chaos.events["evaluator_lost"] == 1
    assert chaos.events["coordinator_lost"] == 0
    chaos.assert_base_is_sum_of_references()


@pytest.mark.slow
@pytest.mark.parametrize("merge", [{}, NESTEROV], ids=["average", "nesterov"])
def test_a_coordinator_killed_at_every_point_changes_no_bit_of_a_barrier_run(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: dict[str, Any]
) -> None:
    """Heads recover the next coordinator, which merges what the last one had not: bitwise the run without faults.

    So they do with the outer momentum, if they redo merges from factors.
    """
    chaos = Chaos(tmp_path, monkeypatch, AT_THE_COORDINATOR, **merge)
    chaos.run()
    assert chaos.events["momentum_restarts"] == 0
    assert chaos.events["coordinator_lost"] == chaos.events["coordinator_restarts"] == chaos.count()
    assert chaos.events["head_lost"] == 0
    expected = chaos.train_without_faults()
    assert chaos.model.keys() == expected.keys()
    assert all(torch.equal(chaos.model[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_coordinator_killed_at_every_point_while_heads_train(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads train without it meanwhile, and each contribution is merged once."""
    chaos = Chaos(tmp_path, monkeypatch, AT_THE_COORDINATOR + MORE_AT_THE_COORDINATOR, **NOT_WAITING)
    chaos.run()
    assert chaos.events["coordinator_lost"] == chaos.events["coordinator_restarts"] == chaos.count()
    chaos.assert_base_is_sum_of_references()


@pytest.mark.slow
def test_a_shard_of_the_coordinator_killed_and_a_head_with_it(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coordinator and shards restart together, and later a head does."""
    faults = [fault("shard receives", head=1), fault("answers", version=3), fault("answered", head=2, step=60)]
    chaos = Chaos(tmp_path, monkeypatch, faults, shards=2, send_down="factors", **NOT_WAITING)
    chaos.run()
    assert chaos.events["coordinator_lost"] == 2
    assert chaos.events["head_lost"] == 1


@pytest.mark.slow
def test_a_head_and_a_coordinator_that_hang(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped processes don't die: they are detected because they don't answer, and are killed and replaced."""
    faults = [fault("stepped", "SIGSTOP", head=1, step=12), fault("decided", "SIGSTOP", version=8)]
    chaos = Chaos(tmp_path, monkeypatch, faults, **NOT_WAITING)
    chaos.run()
    assert chaos.events["head_hung"] + chaos.events["head_lost"] >= 1
    assert chaos.events["coordinator_lost"] == 1
