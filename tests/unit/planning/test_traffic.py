"""Predicted bytes of a merge against what codecs encode and heads fetch."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.bytes import measure
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.in_process import LoopbackTransport, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.planning import plan
from lte_ray.planning.shapes import read_shapes
from tests.support.small_llama import SmallLlama
from tests.unit.planning.test_memory import RandomImages
from workers.gpt import GPT

WORKERS = {"gpt": GPT(depth=1, width=64), "vit": RandomImages(depth=2), "llama": SmallLlama(layers=1)}
HEADS = 3


@pytest.mark.parametrize("name", WORKERS)
def test_bytes_are_within_two_percent_of_measured_ones(name: str) -> None:
    """Up and down, each format is as a simulated link counts it for a real model's plan, with messages."""
    worker, lte = WORKERS[name], LTEConfig(num_heads=HEADS, lora_r=16)
    real = prepare(worker, Settings("real", lte, MergeConfig(policy="average"), TrainConfig(steps=20))).plan
    for way in plan(worker, lte, MergeConfig(policy="average")).traffic:
        if way.send_down == "auto":
            merge = MergeConfig(policy="average", transfer=way.transfer)  # type: ignore[arg-type]
            counted = measure(real, merge, HEADS, merges=1)
            assert math.isclose(way.up, counted["up"], rel_tol=0.02), way
            assert math.isclose(way.down, counted["down"], rel_tol=0.02), way


@pytest.mark.parametrize("transfer", ["bf16", "int8"])
def test_contributions_of_a_run_have_the_predicted_bytes(transfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers that heads encode in a run are as large as predicted, to the byte."""
    worker, sizes = GPT(depth=1, width=64, validation_windows=2), set[int]()
    settings = Settings("run", LTEConfig(lora_r=8), MergeConfig(transfer=transfer, merge_iter=1), TrainConfig(steps=2))
    call = LoopbackTransport.__call__

    def counted(self: LoopbackTransport, head: Any, contribution: Any) -> Any:
        encode = head.encode

        def counting(*given: Any) -> Any:
            sent = encode(*given)
            sizes.add(sum(buffer.nbytes for buffer in sent.buffer))
            return sent

        monkeypatch.setattr(head, "encode", counting, raising=False)
        try:
            return call(self, head, contribution)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(LoopbackTransport, "__call__", counted)

    monkeypatch.setattr(LoopbackTransport, "__call__", counted)
    run_in_process(worker, settings)
    assert sizes == {plan(worker, settings.lte, settings.merge, settings.train).traffic[0].up}


def test_policies_that_compute_with_tensors_send_the_base() -> None:
    """Heads can't redo merges of the default policy, so they get the whole base, as in a run."""
    planned = plan(GPT(depth=1, width=64), LTEConfig(num_heads=HEADS))
    assert planned.policy == "orthogonal"
    assert planned.traffic[0].down == 4 * planned.counts.parameters


def test_merges_take_longer_on_slower_links() -> None:
    """On a link of a tenth, the bytes take ten times as long."""
    worker, merge = GPT(depth=1, width=64), MergeConfig(policy="average")
    fast, slow = (plan(worker, LTEConfig(), merge, link=link).traffic[0].seconds for link in ("10Mbit", "1Mbit"))
    assert 9 < slow / fast < 10.1


def test_plans_are_those_of_a_run() -> None:
    """Shapes alone give the plan that the driver makes with values."""
    worker = GPT(depth=1, width=64)
    settings = Settings("run", LTEConfig(lora_r=(4, 8), layers=("blocks.0.up: lora_r=2",)), MergeConfig(), TrainConfig())
    assert read_shapes(worker, settings).plans == prepare(worker, settings).plans
