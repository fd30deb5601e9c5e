"""`--init-from`: a run starts from what exports write: a run, a file, a model of transformers, an adapter of PEFT."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lte_ray import export
from lte_ray.cli.train import with_run
from lte_ray.config import TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.initial_weights import build_initial_model, load_initial_weights
from lte_ray.engine.prepare import prepare
from lte_ray.errors import ConfigError
from tests.support.export_runs import ExportWorker, built, inputs, logits, save_run, settings
from tests.support.numerics import EPS32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small GPT-2."""
    return save_run(tmp_path_factory.mktemp("runs"), "gpt2", settings())[0]


def equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def final(run: Path) -> nn.Module:
    model = built("gpt2")
    model.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"))
    return model


@pytest.mark.parametrize("form", ["run", "uri", "file", "folder", "pretrained", "sharded"])
def test_every_form_of_whole_weights_gives_the_runs_model(run: Path, tmp_path: Path, form: str) -> None:
    """Bit for bit, with tied weights, of which a file may have one name only."""
    source = {"run": str(run), "uri": run.as_uri(), "file": str(run / "model.safetensors")}.get(form, str(tmp_path / "out"))
    if form == "folder":
        export.safetensors(run, source)
    elif form == "pretrained":
        pytest.importorskip("transformers")
        export.save_pretrained(run, source)
    elif form == "sharded":
        pytest.importorskip("transformers")
        final(run).save_pretrained(source, max_shard_size="20KB")  # type: ignore[operator]
        assert (Path(source) / "model.safetensors.index.json").is_file()
    model = built("gpt2")
    assert not equal(model, final(run))
    assert load_initial_weights(model, source) == ""
    assert equal(model, final(run))


@pytest.mark.parametrize("kind", ["gpt2", "wrapped"])
def test_an_adapter_is_merged_into_the_model_that_it_is_for(tmp_path: Path, kind: str) -> None:
    """Also into a model of transformers inside the worker's model, whose adapter has its inner names."""
    pytest.importorskip("peft")
    path, _ = save_run(tmp_path, kind, settings())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export.peft_adapter(path, tmp_path / "adapter")
        model = built(kind)
        load_initial_weights(model, str(tmp_path / "adapter"))
    whole = built(kind)
    whole.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    x = inputs(kind, 3)
    found, expected = logits(model.eval(), x), logits(whole.eval(), x)
    assert (found - expected).abs().max() < 100 * EPS32 * expected.abs().max()


def test_heads_and_the_base_start_from_the_given_weights(run: Path) -> None:
    """What doesn't train comes from there, too; further training starts where the other run ended."""
    given = settings(others="frozen")
    given = replace(given, train=replace(given.train, init_from=str(run)))
    worker = ExportWorker("gpt2")
    initial = prepare(worker, given)
    assert equal(initial.model, final(run))
    head = Head(worker, initial.complete(given), 0)
    frozen = dict(head.converted.frozen)
    assert frozen
    assert all(torch.equal(value, final(run).get_parameter(name)) for name, value in frozen.items())
    assert not torch.equal(run_in_process(worker, given).base, initial.base)


def test_exports_of_a_run_that_started_elsewhere_start_there(run: Path, tmp_path: Path) -> None:
    """Its adapter is for the weights that it started from, so it doesn't name the model that they once came from."""
    pytest.importorskip("peft")
    given = settings(steps=2)
    given = replace(given, train=replace(given.train, init_from=str(run)))
    path, done = save_run(tmp_path, "gpt2", given)
    export.safetensors(path, tmp_path / "again", version=done.coordinator.version)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = export.peft_adapter(path, tmp_path / "adapter")
    assert written.error is not None
    assert written.error < 1e-5
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_names_that_only_one_side_has_are_told(run: Path, tmp_path: Path) -> None:
    """A new output layer keeps the values of build_model()."""
    state = safetensors.torch.load_file(run / "model.safetensors")
    bias = state.pop("transformer.ln_f.bias")
    safetensors.torch.save_file({**state, "other": bias}, tmp_path / "part.safetensors")
    model = built("gpt2")
    note = load_initial_weights(model, str(tmp_path / "part.safetensors"))
    assert note.endswith("transformer.ln_f.bias stays as build_model() gives them; other of the file is not in the model.")
    assert torch.equal(model.get_parameter("transformer.ln_f.bias"), built("gpt2").get_parameter("transformer.ln_f.bias"))
    given = replace(settings(), train=TrainConfig(init_from=str(tmp_path / "part.safetensors"), seed=5))
    assert prepare(ExportWorker("gpt2"), given).start == note


def bad_source(form: str, run: Path, folder: Path) -> str:
    """Makes a source that can't be used."""
    path = folder / "bad.safetensors"
    if form == "shape":
        safetensors.torch.save_file({"transformer.wte.weight": torch.zeros(3, 3)}, path)
    elif form == "names":
        safetensors.torch.save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, path)
    elif form == "pickle":
        torch.save({"a": torch.zeros(3)}, path)
    elif form == "unfinished":
        path = save_run(folder, "words", settings(), whole=False)[0]
    elif form == "outside":
        path = folder / "model"
        path.mkdir()
        (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../bad.safetensors"}}')
    return path.as_uri() if form == "uri" else str(path)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("missing", "can't be read: there is no file"),
        ("uri", "has no run.toml, so it isn't the directory of a run"),
        ("shape", r"transformer.wte.weight has shape \(3, 3\), but the model's has"),
        ("names", "has no weight of this model. It has a, b; the model has transformer.wte.weight, .* and [0-9]+ more"),
        ("pickle", "can't be read"),
        ("unfinished", "has no model.safetensors, since the run hasn't ended"),
        ("outside", "names files outside of the folder"),
    ],
)
def test_a_source_that_does_not_fit_is_one_clear_error(run: Path, tmp_path: Path, form: str, message: str) -> None:
    """Before the run; nothing is unpickled, and no index leads out of its folder."""
    source = bad_source(form, run, tmp_path)
    with pytest.raises(ConfigError, match=f"--init-from .*{message}") as raised:
        build_initial_model(ExportWorker("gpt2"), TrainConfig(init_from=source))
    assert str(raised.value).count("--init-from") == 1


def test_the_command_line_takes_a_runs_name(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all commands do; a file or folder of that name comes first."""
    monkeypatch.chdir(tmp_path)
    given = TrainConfig(init_from=run.name)
    assert with_run(given, str(run.parent)).init_from == str(run)
    assert with_run(TrainConfig(init_from="other"), str(run.parent)).init_from == "other"
    (tmp_path / run.name).mkdir()
    assert with_run(given, str(run.parent)) == given


@pytest.mark.parametrize("value", ["", 3])
def test_a_source_is_a_path(value: Any) -> None:
    """An error in the settings."""
    with pytest.raises(ConfigError, match=r"--init-from is .*, but it must be a path or URI"):
        TrainConfig(init_from=value)
