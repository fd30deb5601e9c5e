"""Adapters for PEFT: `PeftModel.from_pretrained` computes what the run's model computes.

Logits are compared relative to the largest. In float32 one operation has an error of up to 6e-8 of it, and the rounding of
W x + B (A x) differs from that of (W + B A) x; through the few layers here, that adds up to about 1e-6. The limit is 1e-5, a
thousandth of the effect of any missing part of the change.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lte_ray import checkpoint, export
from lte_ray.engine.head.snapshot import snapshot
from lte_ray.errors import ConfigError, UserError
from lte_ray.export.delta import average_delta
from lte_ray.export.run_reader import open_run, read_run
from lte_ray.merging.policy import Decision, Merge, Wait
from lte_ray.messages import CheckpointRequest
from lte_ray.storage import RunDirectory
from tests.support.export_runs import (
    CLASSES,
    ExportWorker,
    built,
    inputs,
    logits,
    save_run,
    settings,
    train_without_contributing,
    write_checkpoint,
)

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

CLOSE = 1e-5
ALL: dict[str, Any] = {"adapt": ("linear", "attention", "conv", "embedding", "norm"), "lora_bias": "lora", "lora_r": (2, 1)}
EMBEDDINGS: dict[str, Any] = {"adapt": ("linear", "conv", "embedding"), "lora_r": 2, "layers": ("*mid: lora_r=1",)}
CASES = [
    ("attended", {}),
    ("attending", {}),
    ("bert", {}),
    ("bert", ALL),
    ("cnn", {}),
    ("cnn", ALL),
    ("ends in out", {"exclude": ("out",)}),
    ("ends in up", {"exclude": ("up",)}),
    ("gpt2", {}),
    ("gpt2", ALL),
    ("headed", {}),
    ("llama", {}),
    ("llama", {"adapt": ("linear", "embedding"), "lora_r": 3, "base_dtype": "bf16"}),
    ("resnet", {}),
    ("vit", {}),
    ("words", {**EMBEDDINGS, "layers": ("mid: lora_r=1",)}),
    ("wrapped", {"lora_bias": "frozen"}),
]


@pytest.fixture(autouse=True)
def silence() -> Any:
    """Suppresses PEFT's warnings about tied weights and Conv1D when it loads an adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def whole(kind: str, run: Path) -> nn.Module:
    """Returns the merged model, from the run's weights."""
    model = built(kind)
    model.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"), strict=True)
    return model


def adapted(kind: str, model: nn.Module, out: Path) -> nn.Module:
    """Loads the adapter as a user does."""
    return peft.PeftModel.from_pretrained(model.net if kind == "wrapped" else model, out).eval()


def config(out: Path) -> dict[str, Any]:
    return json.loads((out / "adapter_config.json").read_text())


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.sweep("kind")
@pytest.mark.parametrize(("kind", "lte"), CASES)
@torch.no_grad()
def test_the_average_on_the_initial_model_is_the_merged_model(tmp_path: Path, kind: str, lte: dict[str, Any]) -> None:
    """For each kind of layer and setting, without and with PEFT's own merging of the adapter."""
    with torch.enable_grad():
        run, _ = save_run(tmp_path, kind, settings(**lte))
    written = export.peft_adapter(run, tmp_path / "adapter")
    x = inputs(kind, 9)
    expected = logits(whole(kind, run), x)
    model = adapted(kind, built(kind), tmp_path / "adapter")
    assert largest(logits(built(kind), x), expected) > 1e-2
    assert largest(logits(model, x), expected) < CLOSE
    assert largest(logits(model.merge_and_unload(), x), expected) < CLOSE
    assert written.error is not None
    assert written.error < 1e-6


@pytest.mark.sweep("kind")
@pytest.mark.parametrize(("kind", "lte"), [*CASES, ("counting", {})])
@torch.no_grad()
def test_a_heads_on_the_merged_model_is_the_head(tmp_path: Path, kind: str, lte: dict[str, Any]) -> None:
    """A head that has trained since the last merge, compared with its own model."""
    with torch.enable_grad():
        run, done = save_run(tmp_path, kind, settings(**lte), ahead=True)
    written = export.peft_adapter(run, tmp_path / "adapter", head=1)
    x = inputs(kind, 9)
    expected = logits(done.heads[1].model.eval(), x)
    near = CLOSE if lte.get("base_dtype") != "bf16" else 0.02  # the head's own main weights are rounded to 8 bits
    assert largest(logits(whole(kind, run), x), expected) > 2 * near
    assert largest(logits(adapted(kind, whole(kind, run), tmp_path / "adapter"), x), expected) < near
    assert "what head 1 has trained beyond the merged weights of version 3" in written.summary
    assert config(tmp_path / "adapter")["base_model_name_or_path"] == ""


def test_a_head_that_had_not_heard_of_its_merge_is_the_head_that_adopts_it(tmp_path: Path) -> None:
    """Its state is saved while it trains beyond the contribution in the version, as in any run that doesn't wait."""
    run, done = save_run(tmp_path, "gpt2", settings())
    sent = []
    for head in done.heads:
        done.coordinator.join(head.number, 0)
        train_without_contributing(head)
        sent.append(head.contribute())
    for contribution in sent:
        verdicts = done.coordinator.receive(contribution, contribution.buffer).results
    train_without_contributing(done.heads[1])
    directory, base = RunDirectory.open(str(tmp_path), "run"), done.coordinator.base.clone()
    states = [snapshot(head, CheckpointRequest(4, {head.number: head.sequence})) for head in done.heads]
    files = [checkpoint.write_head(directory, 4, number, *state) for number, state in enumerate(states)]
    files.append(checkpoint.write_base(directory, 4, done.plan, base))
    checkpoint.commit(directory, 4, (0, 1), files, checkpoint.read_manifest(directory, 3).facts)
    assert {name.partition(".")[0] for name in states[1][0]} >= {"ahead", "reference"}
    done.heads[1].adopt(verdicts[1], 4, base)
    export.peft_adapter(run, tmp_path / "adapter", head=1, version=4)
    export.safetensors(run, tmp_path / "merged.safetensors", version=4)
    model, x = built("gpt2"), inputs("gpt2", 9)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "merged.safetensors"))
    with torch.no_grad():
        expected = logits(done.heads[1].model.eval(), x)
        assert largest(logits(model, x), expected) > 2 * CLOSE
        assert largest(logits(adapted("gpt2", model, tmp_path / "adapter"), x), expected) < CLOSE


@torch.no_grad()
def test_a_head_that_is_merged_has_changed_nothing(tmp_path: Path) -> None:
    """Its adapter is zero, so the merged model's logits stay the same, bit for bit."""
    with torch.enable_grad():
        run, _ = save_run(tmp_path, "gpt2", settings())
    written = export.peft_adapter(run, tmp_path / "adapter", head=0)
    x = inputs("gpt2", 9)
    assert torch.equal(logits(adapted("gpt2", whole("gpt2", run), tmp_path / "adapter"), x), logits(whole("gpt2", run), x))
    assert written.rank == 1
    assert "zero, since all that head 0 has trained is in the merged weights" in written.summary


def test_ranks_are_the_sums_of_the_heads_ranks_and_pefts_scaling_is_one(tmp_path: Path) -> None:
    """By layer and head; PEFT selects the layers by their exact names, and alpha is always the rank."""
    run, _ = save_run(tmp_path, "gpt2", settings(lora_r=(2, 3), layers=("transformer.h.1.mlp: lora_r=4",)))
    assert export.peft_adapter(run, tmp_path / "adapter").rank == 8
    found = config(tmp_path / "adapter")
    pattern = {r"^transformer\.h\.1\.mlp\.c_fc": 8, r"^transformer\.h\.1\.mlp\.c_proj": 8}
    assert (found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]) == (5, 5, pattern, pattern)
    assert sorted(found["target_modules"]) == ["c_attn", "c_fc", "c_proj"]
    assert (found["bias"], found["fan_in_fan_out"], found["use_rslora"]) == ("lora_only", True, False)
    tensors = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (5, 32)
    assert tensors["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"].shape == (128, 8)


def test_only_what_has_changed_is_in_the_adapter(tmp_path: Path) -> None:
    """Without replicas and biases, the adapter contains only factors."""
    frozen = {"lora_bias": "frozen", "layers": ("*: lr=0", "@linear: lr=1")}
    run, _ = save_run(tmp_path, "llama", settings(**frozen))
    export.peft_adapter(run, tmp_path / "adapter")
    assert all(".lora_" in key for key in safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert (config(tmp_path / "adapter")["modules_to_save"], config(tmp_path / "adapter")["bias"]) == (None, "none")


@torch.no_grad()
def test_a_sum_of_more_than_full_rank_is_taken_as_it_is(tmp_path: Path) -> None:
    """Three heads of rank 6 on a 16 x 16 weight: the adapter has rank 16, not 18, and is exact."""
    with torch.enable_grad():
        run, _ = save_run(tmp_path, "words", settings(num_heads=3, lora_r=6), heads=(0, 1, 2))
    written = export.peft_adapter(run, tmp_path / "adapter")
    x = inputs("words", 9)
    assert written.rank == 16
    assert written.error is not None
    assert written.error < 1e-6
    assert largest(logits(adapted("words", built("words"), tmp_path / "adapter"), x), logits(whole("words", run), x)) < CLOSE


class Uneven:
    """Gives one head a slightly higher weight."""

    def decide(self, pending: Any, roster: Any) -> Decision:
        return Merge({0: 0.5, 1: 0.501}) if len(pending) == 2 else Wait("for both")


@pytest.mark.parametrize(
    ("lte", "heads", "why"),
    [
        ({"reset": "B"}, (0, 1), "the run was made with --reset B"),
        ({"policy": Uneven()}, (0, 1), "other weights than 1/N"),
        ({}, (1,), r"heads \[0\] have no state in this checkpoint"),
    ],
)
def test_a_change_that_is_no_sum_has_full_rank(tmp_path: Path, lte: dict[str, Any], heads: tuple[int, ...], why: str) -> None:
    """The adapter is exact, and says why it is large; with --rank it is the best of that rank, and its error is reported."""
    run, _ = save_run(tmp_path, "words", settings(**lte), heads=heads)
    exact = export.peft_adapter(run, tmp_path / "exact")
    assert re.search(rf"isn't the sum of the heads' changes of low rank, since .*{why}.*--rank R", exact.summary)
    x = inputs("words", 9)
    assert largest(logits(adapted("words", built("words"), tmp_path / "exact"), x), logits(whole("words", run), x)) < CLOSE
    written = export.peft_adapter(run, tmp_path / "adapter", rank=3)
    assert "sum of the heads" not in written.summary
    before, after = built("words").mid.weight, whole("words", run).mid.weight  # type: ignore[union-attr]
    sigma = torch.linalg.svdvals((after.double() - before.double()).detach())  # type: ignore[operator]
    assert written.rank == 3
    assert written.error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)
    full = export.peft_adapter(run, tmp_path / "full", rank=100)
    assert full.rank == 16
    assert full.error is not None
    assert full.error < 1e-6


def test_the_moving_average_s_adapter_has_full_rank(tmp_path: Path) -> None:
    """It gives the average's logits, says why it is large, and can be truncated."""
    run, _ = save_run(tmp_path, "words", settings(ema=0.9))
    exact = export.peft_adapter(run, tmp_path / "exact", ema=True)
    assert "to the moving average of the merged weights up to version 3" in exact.summary
    assert "since it is a moving average of the weights of several versions" in exact.summary
    model, x = built("words"), inputs("words", 9)
    model.load_state_dict(safetensors.torch.load_file(run / "model-ema.safetensors"), strict=True)
    assert largest(logits(adapted("words", built("words"), tmp_path / "exact"), x), logits(model, x)) < CLOSE
    assert export.peft_adapter(run, tmp_path / "small", rank=2, ema=True).rank == 2


@pytest.mark.slow
def test_a_long_run_is_still_seen_as_a_sum(tmp_path: Path) -> None:
    """300 merges drift by rounding; a policy that gives one head 0.2% more weight is distinguished from that."""
    run, _ = save_run(tmp_path, "words", settings(steps=300, merge_iter=1))
    assert average_delta(read_run(run)).error < 1e-5
    run, _ = save_run(tmp_path, "words", settings(steps=300, merge_iter=1, policy=Uneven()), name="uneven")
    assert "other weights than 1/N" in average_delta(read_run(run)).not_a_sum


def test_a_rank_below_the_sum_truncates_it(tmp_path: Path) -> None:
    """Also if the sum is exact; and for one head's change."""
    run, _ = save_run(tmp_path, "gpt2", settings(), ahead=True)
    for head in (None, 1):
        written = export.peft_adapter(run, tmp_path / f"adapter-{head}", head=head, rank=2)
        assert written.rank == 2
        assert written.error is not None
        assert 0.01 < written.error < 1
        assert written.summary.endswith("(truncated)")


def test_layers_that_share_a_weight_get_lora_once(tmp_path: Path) -> None:
    """Merging adapters of both would add the change to their one weight twice; the other layer is copied."""
    run, _ = save_run(tmp_path, "words", settings(**EMBEDDINGS | {"layers": ()}))
    export.peft_adapter(run, tmp_path / "adapter")
    assert sorted(config(tmp_path / "adapter")["target_modules"]) == ["embed", "mid"]
    assert config(tmp_path / "adapter")["modules_to_save"] == ["logits"]


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    """`up` is copied, so `block.up` is too; `out` can't be copied, so it gets LoRA of full rank."""
    run, _ = save_run(tmp_path, "ends in up", settings(exclude=("up",)))
    export.peft_adapter(run, tmp_path / "adapter")
    found = config(tmp_path / "adapter")
    assert (sorted(found["target_modules"]), found["modules_to_save"]) == (["down", "more"], ["block.up", "embed", "up"])
    run, _ = save_run(tmp_path, "ends in out", settings(exclude=("out",)), name="second")
    assert export.peft_adapter(run, tmp_path / "other").rank == 16
    found = config(tmp_path / "other")
    assert (sorted(found["target_modules"]), found["modules_to_save"]) == (["down", "more", "out", "up"], ["embed"])


def test_what_pefts_lora_computes_otherwise_is_copied(tmp_path: Path) -> None:
    """Grouped and dilated convolutions, torch's attention, and all in torch's encoder layer, whose fast path calls no layer."""
    run, _ = save_run(tmp_path, "cnn", settings())
    assert "dilated, grouped, norm, twin" in export.peft_adapter(run, tmp_path / "cnn").summary
    run, _ = save_run(tmp_path, "attending", settings(), name="attending")
    export.peft_adapter(run, tmp_path / "attending-adapter")
    copied = config(tmp_path / "attending-adapter")["modules_to_save"]
    assert copied == [f"block.{name}" for name in ("linear1", "linear2", "norm1", "norm2", "self_attn")] + ["embed"]


def test_an_adapter_fits_the_model_of_transformers_that_a_worker_wraps(tmp_path: Path) -> None:
    """Names are that model's own, unless something outside of it is trained."""
    for kind, prefix in (("wrapped", "transformer"), ("headed", "net.transformer")):
        run, _ = save_run(tmp_path, kind, settings(), name=kind)
        export.peft_adapter(run, tmp_path / f"{kind}-adapter")
        tensors = safetensors.torch.load_file(tmp_path / f"{kind}-adapter" / "adapter_model.safetensors")
        assert f"base_model.model.{prefix}.h.0.attn.c_attn.lora_A.weight" in tensors


@pytest.mark.parametrize(
    ("kind", "lte", "message"),
    [
        ("lone", {}, r"PEFT can't represent the model's direct parameters: scale\..*--to safetensors"),
        ("enclosed", {}, "PEFT can represent little of this change as LoRA: it must copy body in full"),
        ("vit", {"adapt": ("conv",)}, r"PEFT can represent none of this change as LoRA: it must copy .*vit\.embeddings"),
        ("clash", {}, r"PEFT can't copy layer: .* parts of its own layers end so \(base_layer\)"),
    ],
)
def test_what_peft_cannot_hold_is_refused(tmp_path: Path, kind: str, lte: dict[str, Any], message: str) -> None:
    """Each error names the parameters or modules, and nothing is written."""
    run, _ = save_run(tmp_path, kind, settings(**lte))
    with pytest.raises(UserError, match=message):
        export.peft_adapter(run, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@torch.no_grad()
def test_a_lone_parameter_that_has_not_changed_is_no_hindrance(tmp_path: Path) -> None:
    """With a learning rate of zero it doesn't change."""
    with torch.enable_grad():
        run, _ = save_run(tmp_path, "lone", settings(layers=("scale: lr=0",)))
    export.peft_adapter(run, tmp_path / "adapter")
    x = inputs("lone", 9)
    assert largest(logits(adapted("lone", built("lone"), tmp_path / "adapter"), x), logits(whole("lone", run), x)) < CLOSE


@pytest.mark.parametrize(
    ("kind", "lte", "task"),
    [
        ("named", {}, "CAUSAL_LM"),
        ("llama", {}, "CAUSAL_LM"),
        ("bert", {}, None),
        ("classifier", {}, None),
        ("classifier", {"exclude": ("score",)}, "SEQ_CLS"),
    ],
)
@torch.no_grad()
def test_the_adapter_says_its_task_and_its_base_model(tmp_path: Path, kind: str, lte: dict[str, Any], task: str | None) -> None:
    """PEFT then loads the class for the task, which computes the same.

    A classifier whose last layer has LoRA gets no task: PEFT would copy that layer. A model of random weights isn't the one
    whose name it has.
    """
    with torch.enable_grad():
        run, _ = save_run(tmp_path, kind, settings(**lte))
    export.peft_adapter(run, tmp_path / "adapter")
    found = config(tmp_path / "adapter")
    assert (found["task_type"], found["base_model_name_or_path"] or "") == (task, "")
    x, model = inputs(kind, 9), adapted(kind, built(kind), tmp_path / "adapter")
    assert type(model).__name__ == {"CAUSAL_LM": "PeftModelForCausalLM", "SEQ_CLS": "PeftModelForSequenceClassification"}.get(
        task or "", "PeftModel"
    )
    assert largest(model(input_ids=x).logits, logits(whole(kind, run), x)) < CLOSE
    export.peft_adapter(run, tmp_path / "head", head=0)
    assert config(tmp_path / "head")["base_model_name_or_path"] == ""


class FromFolder(ExportWorker):
    """A classifier on a saved model, which has no classifier: it is drawn."""

    def __init__(self, folder: str) -> None:
        super().__init__("classifier")
        self.folder = folder

    def build_model(self) -> nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=CLASSES)


@pytest.mark.parametrize("lte", [{}, {"others": "frozen"}, {"exclude": ("score",)}], ids=["replica", "frozen", "excluded"])
@torch.no_grad()
def test_weights_that_the_base_model_lacks_are_in_the_adapter_whole(tmp_path: Path, lte: dict[str, Any]) -> None:
    """Who loads the base model draws other ones: a classifier on a model of words computes the same nevertheless."""
    folder = tmp_path / "base"
    torch.manual_seed(1)
    words = built("classifier").base_model
    words.save_pretrained(str(folder))
    worker = FromFolder(str(folder))
    with torch.enable_grad():
        run, _ = save_run(tmp_path, "classifier", settings(**lte), worker=worker)
    export.peft_adapter(run, tmp_path / "adapter", worker=worker)
    assert config(tmp_path / "adapter")["base_model_name_or_path"] == str(folder)
    merged = worker.build_model()
    merged.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"), strict=True)
    x = inputs("classifier", 9)
    for seed in (2, 3):
        torch.manual_seed(seed)
        loaded = peft.PeftModel.from_pretrained(worker.build_model(), tmp_path / "adapter").eval()
        assert largest(loaded(input_ids=x).logits, merged.eval()(input_ids=x).logits) < CLOSE


def test_bad_heads_and_ranks_are_refused(tmp_path: Path) -> None:
    """The error says which heads exist, and which are in the checkpoint."""
    run, done = save_run(tmp_path, "words", settings(), heads=(1,))
    for head in (-1, 2):
        with pytest.raises(ConfigError, match=rf"--head is {head}, but the heads of .* are 0 to 1"):
            export.peft_adapter(run, tmp_path / "adapter", head=head)
    with pytest.raises(UserError, match=r"has no state of head 0, since the policy merged only heads \[1\] there"):
        export.peft_adapter(run, tmp_path / "adapter", head=0)
    with pytest.raises(ConfigError, match="--rank is 0, but it must be at least 1"):
        export.peft_adapter(run, tmp_path / "adapter", rank=0)
    write_checkpoint(open_run(run), settings(), done)
    assert checkpoint.complete_versions(open_run(run)) == [3]
    assert export.peft_adapter(run, tmp_path / "adapter").rank == 4


def test_without_peft_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the run is read."""
    run, _ = save_run(tmp_path, "words", settings())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs peft, which can't be imported .*: pip install 'lte-ray\[hf\]'"):
        export.peft_adapter(run, tmp_path / "adapter")
