"""Exports of heads that never merge: each head's adapter, and the base with it merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch

import lte_ray.export
from lte_ray import checkpoint
from lte_ray.cli.main import main
from lte_ray.config import MergeConfig
from lte_ray.engine.in_process import InProcessRun
from lte_ray.engine.independent import head_weights
from lte_ray.engine.prepare import load_base
from lte_ray.errors import ConfigError, StorageError
from lte_ray.merging.flat_buffer import factor_views
from lte_ray.storage import RunDirectory
from tests.support.export_runs import built, inputs, logits, save_run, settings

Run = tuple[Path, InProcessRun]


@pytest.fixture(scope="module", params=[False, True], ids=["done", "ahead"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """GPT-2 with two independent adapters, at the end of a round and in the middle of one."""
    given = dataclasses.replace(settings(others="frozen"), merge=MergeConfig(merge_iter=2, never_merge=True))
    return save_run(tmp_path_factory.mktemp("runs"), "named", given, ahead=request.param, whole=False)


def expected_logits(run: Run, head: int) -> torch.Tensor:
    """Those of W_0 + s B A, with the head's newest factors, computed densely."""
    model, trained = built("named"), run[1].heads[head]
    factors = torch.cat([factor.detach().flatten() for factor in trained.state.factors.values()])
    load_base(model, trained.plan, head_weights(trained.plan, run[1].base, factors))
    return logits(model, inputs("named", 1))


@pytest.mark.parametrize("head", [0, 1])
def test_each_head_is_exported_as_an_adapter_for_the_initial_model(run: Run, head: int, tmp_path: Path) -> None:
    """Its rank is the head's, it knows the model's name, and the model with it computes what the head does."""
    peft = pytest.importorskip("peft")
    written = lte_ray.export.peft_adapter(run[0], tmp_path / "a", head)
    assert written.rank == 2
    assert f"what head {head} has trained until version 3. Relative error" in written.summary
    model = peft.PeftModel.from_pretrained(built("named"), tmp_path / "a").eval()
    assert model.peft_config["default"].base_model_name_or_path == ""  # its weights are drawn
    torch.testing.assert_close(logits(model, inputs("named", 1)), expected_logits(run, head), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["safetensors", "pretrained"])
def test_each_head_is_exported_with_its_adapter_merged(run: Run, to: str, tmp_path: Path) -> None:
    """W_0 + s B A under the model's own names."""
    assert main(["export", str(run[0]), str(tmp_path / "a"), "--to", to, "--head", "1"]) == 0
    state, model = safetensors.torch.load_file(tmp_path / "a" / "model.safetensors"), built("named")
    model.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model, inputs("named", 1)), expected_logits(run, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["safetensors", "pretrained", "peft"])
def test_without_a_head_there_is_nothing_to_export(
    run: Run, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the flag and the heads, and nothing is written."""
    assert main(["export", str(run[0]), str(tmp_path / "a"), "--to", to]) == 2
    assert "were never merged (--never-merge): each has an adapter of its own. Say which with --head, 0 to 1." in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "a").exists()


def test_a_head_that_does_not_exist_is_refused(run: Run, tmp_path: Path) -> None:
    """As for other runs."""
    with pytest.raises(ConfigError, match=r"--head is 2, but the heads of .* are 0 to 1"):
        lte_ray.export.safetensors(run[0], tmp_path / "a", head=2)


def test_a_head_without_a_state_is_exported_as_it_contributed_last(tmp_path: Path) -> None:
    """Its process was gone when the checkpoint was written; the references hold its factors. Without these it is refused."""
    given = dataclasses.replace(settings(others="frozen"), merge=MergeConfig(merge_iter=2, never_merge=True))
    path, done = save_run(tmp_path, "words", given, heads=(0,), whole=False)
    with pytest.raises(StorageError, match="has nothing of head 1, which hadn't contributed"):
        lte_ray.export.safetensors(path, tmp_path / "none", head=1)
    directory, version = RunDirectory.open(str(tmp_path), "run"), done.coordinator.version
    manifest = checkpoint.read_manifest(directory, version)
    reference = done.coordinator.reference(1)
    assert reference is not None
    entry = checkpoint.write_references(directory, version, {1: reference})
    checkpoint.commit(directory, version, (0,), [*manifest.files, entry], manifest.facts)
    lte_ray.export.safetensors(path, tmp_path / "a.safetensors", head=1)
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    expected = built("words")
    load_base(expected, done.plan, head_weights(done.heads[1].plan, done.base, reference))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6)


def test_a_head_of_a_merged_run_is_exported_with_what_it_trained_since(tmp_path: Path) -> None:
    """W_v + s (B A - B' A'): other than the merged weights, and what `--to peft --head` adds to them."""
    path, done = save_run(tmp_path, "words", settings(), ahead=True)
    lte_ray.export.safetensors(path, tmp_path / "merged.safetensors", 3)
    lte_ray.export.safetensors(path, tmp_path / "head.safetensors", head=1)
    merged, own = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("merged", "head"))
    head = done.heads[1]
    spec = head.plan.adapted[0]
    assert head.state.reference is not None
    a_old, b_old = (factor_views(head.plan, head.state.reference)[name] for name in (spec.a_name, spec.b_name))
    a, b = (head.state.factors[name].detach() for name in (spec.a_name, spec.b_name))
    torch.testing.assert_close(own[spec.name] - merged[spec.name], spec.scaling * (b @ a - b_old @ a_old), rtol=0, atol=1e-6)
