"""Settings of single layers, the authors' mutable view, and the equivalence of flags, TOML and Python."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.cli.flags import Parsed, parse
from lte_ray.config import (
    BASE_DTYPES,
    BIASES,
    KINDS,
    FailureConfig,
    LayerConfig,
    LTEConfig,
    MergeConfig,
    PlacementConfig,
    StorageConfig,
    TrainConfig,
)
from lte_ray.config.layer_rules import parse_rules
from lte_ray.config.run import LENGTHS
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.run import record as run_record
from workers.regression import Regression

PROGRAM = "workers.regression:Regression"


def refusal(**settings: Any) -> str:
    """The error message of bad settings."""
    with pytest.raises(ConfigError) as raised:
        LTEConfig(**settings)
    return str(raised.value)


# -- how rules are written ---------------------------------------------------------------------------------------------


def test_rules_are_written_as_strings_layer_configs_or_dicts() -> None:
    """All three give the same configuration, in order."""
    texts = ("blocks.*: lora_r=8 lora_bias=frozen", "head: lora_alpha=2.5,3.0 lr=0.1 adapt=false", "@conv: base_dtype=int8")
    first = LayerConfig(lora_r=8, lora_bias="frozen")
    second = {"lora_alpha": (2.5, 3.0), "lr": 0.1, "adapt": False}
    expected = LTEConfig(layers=texts)
    assert LTEConfig(layers=list(texts)) == expected
    assert LTEConfig(layers=(text for text in texts)) == expected  # type: ignore[arg-type]
    mapping = {"blocks.*": first, "head": second, "@conv": {"base_dtype": "int8"}}
    assert LTEConfig(layers=mapping) == expected  # type: ignore[arg-type]
    assert expected.layers == texts
    assert hash(expected) == hash(LTEConfig(layers=texts))


def test_values_of_rules_have_their_types() -> None:
    """Whole numbers, numbers, words, and tuples for one value per head."""
    (rule,) = parse_rules(
        LTEConfig(layers=["a: lora_r=8,4 lora_alpha=16 lr=1e-3 adapt=TRUE lora_bias=lora base_dtype=nf4"]).layers
    )
    assert rule.settings == LayerConfig((8, 4), 16.0, "lora", 1e-3, "nf4", True)
    assert (rule.pattern, rule.kind) == ("a", None)
    (rule,) = parse_rules(LTEConfig(layers={"@norm": {"lora_r": [8, 4]}}).layers)  # type: ignore[arg-type]
    assert (rule.kind, rule.settings.lora_r) == ("norm", (8, 4))


layer_configs = st.builds(
    LayerConfig,
    lora_r=st.none() | st.integers(1, 999) | st.tuples(st.integers(1, 9), st.integers(1, 9)),
    lora_alpha=st.none() | st.floats(1e-30, 1e30) | st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9)),
    lora_bias=st.none() | st.sampled_from(BIASES),
    lr=st.none() | st.floats(0, 1e9),
    base_dtype=st.none() | st.sampled_from(BASE_DTYPES),
    adapt=st.none() | st.booleans(),
)
patterns = st.from_regex(r"\A[A-Za-z0-9_.*?\[\]:äß-]{1,20}\Z") | st.sampled_from([f"@{kind}" for kind in KINDS])


@given(patterns, layer_configs)
def test_rules_are_parsed_back_exactly(pattern: str, settings: LayerConfig) -> None:
    """Any settings, formatted as in `layers`, give the same settings again, bit for bit."""
    if settings == LayerConfig():
        return
    (rule,) = parse_rules(LTEConfig(layers={pattern: settings}).layers)  # type: ignore[arg-type]
    assert rule.pattern == pattern
    assert rule.settings == settings


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("a", "isn't a rule 'PATTERN: key=value ...'"),
        ("a:", "isn't a rule"),
        (": lr=2", "isn't a rule"),
        ("a: lr", "'lr' isn't key=value"),
        ("a: lr=2 4", "'4' isn't key=value"),
        ("a: lora_rank=4", "there is no setting 'lora_rank'. Did you mean lora_r?"),
        ("a: rank=4", "The settings are: lora_r, lora_alpha, lora_bias, lr, base_dtype, adapt."),
        ("a: lora_r=x", "lora_r is 'x', but it must be a whole number, or one per head: 8,8,32"),
        ("a: lora_r=2.5", "must be a whole number"),
        ("a: lora_r=8,", "must be a whole number"),
        ("a: lora_r=0", "lora_r is 0, but it must be a whole number, at least 1"),
        ("a: lora_r=4,-1", "lora_r is -1"),
        ("a: lora_r=4,4,4", "lora_r has 3 values [4, 4, 4], but --num-heads is 2: give one, or one per head"),
        ("a: lora_alpha=1,2,3", "lora_alpha has 3 values"),
        ("a: lora_alpha=0", "lora_alpha is 0.0, but it must be a number above 0"),
        ("a: lora_alpha=nan", "lora_alpha is nan"),
        ("a: lora_alpha=inf", "lora_alpha is inf"),
        ("a: lr=1,2", "lr is '1,2', but it must be one number"),
        ("a: lr=-1", "lr is -1.0, but it must be a number, at least 0"),
        ("a: lr=nan", "lr is nan"),
        ("a: adapt=no", "adapt is 'no', but it must be true or false"),
        ("a: lora_bias=true", "lora_bias is 'true', but it must be one of: replica, frozen, lora"),
        ("a: lora_bias=replicas", "Did you mean replica?"),
        ("a: base_dtype=int4", "base_dtype is 'int4', but it must be one of: fp32, bf16, int8, nf4. Did you mean int8?"),
        ("@linaer: lr=2", "'linaer' isn't a kind of layers; the kinds are: linear, attention, conv, embedding, norm"),
        ("@: lr=2", "'' isn't a kind of layers"),
    ],
)
def test_a_bad_rule_is_quoted_with_what_to_change(rule: str, says: str) -> None:
    """Alone or among others, in the constructor, before a model exists."""
    for layers in ([rule], ["fine: lr=2", rule]):
        message = refusal(layers=layers)
        assert f"--layers {rule!r}" in message
        assert says in message


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("a: lr=2", "must be a list of rules"),
        (5, "must be a list of rules"),
        (None, "must be a list of rules"),
        ([5], "must be a list of rules"),
        ({"a": {"lora_rank": 4}}, "there is no setting 'lora_rank'. Did you mean lora_r?"),
        ({"a": {5: 4}}, "there is no setting 5"),
        ({"a": "lora_r=4"}, "neither a LayerConfig nor a dict"),
        ({"a": None}, "neither a LayerConfig nor a dict"),
        ({"a": {}}, "isn't a rule"),
        ({"a": LayerConfig()}, "isn't a rule"),
        ({"a": {"lora_r": 4.0}}, "must be a whole number"),
        ({"a": {"lora_r": True}}, "must be a whole number"),
        ({"a": {"lr": True}}, "must be a number"),
        ({"a": {"adapt": 1}}, "must be true or false"),
        ({"a": {"lora_bias": True}}, "must be one of"),
        ({"": {"lr": 2}}, "isn't a rule"),
    ],
)
def test_bad_layers_in_python_are_one_clear_error(layers: Any, says: str) -> None:
    """For any wrong type, key or value."""
    message = refusal(layers=layers)
    assert "--layers" in message
    assert says in message


def test_a_later_rule_wins_setting_by_setting() -> None:
    """Settings that it doesn't name keep an earlier rule's value, or the value for all layers."""
    lte = LTEConfig(layers=("a: lora_r=8 lora_alpha=4", "b: lora_r=16 lr=0.5", "c: lr=2 adapt=false"))
    chosen = lte.resolve("linear", (True, True, False))
    assert (chosen.rank, chosen.scaling, chosen.lr, chosen.adapt) == (16, 4 / 16, 0.5, True)
    chosen = lte.resolve("linear", (True, True, True))
    assert (chosen.rank, chosen.lr, chosen.adapt) == (16, 2.0, False)
    chosen = lte.resolve("norm", (False, False, False))
    assert (chosen.rank, chosen.scaling, chosen.lr, chosen.adapt) == (64, 2.0, 1.0, False)


# -- values for all layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_r": "8"}, "--lora-r is '8'"),
        ({"lora_r": None}, "--lora-r is None"),
        ({"lora_r": 8.0}, "--lora-r is 8.0"),
        ({"lora_r": True}, "--lora-r is True"),
        ({"lora_r": (8, 0)}, "--lora-r is 0"),
        ({"lora_r": (8, 8, 8)}, "--lora-r has 3 values [8, 8, 8], but --num-heads is 2"),
        ({"lora_r": ()}, "--lora-r has 0 values"),
        ({"lora_alpha": (1.0,)}, "--lora-alpha has 1 values"),
        ({"lora_alpha": "1"}, "--lora-alpha is '1'"),
        ({"lora_alpha": (1.0, math.nan)}, "--lora-alpha is nan"),
        ({"rslora": "yes"}, "--rslora is 'yes', but it must be True or False"),
        ({"strict": None}, "--strict is None, but it must be True or False"),
        ({"lora_bias": "all"}, "--lora-bias is 'all'"),
        ({"lora_bias": None}, "--lora-bias is None"),
        ({"adapt": "lin"}, "--adapt is 'lin', but it must be one of: linear, attention, conv, embedding, norm. Did you mean"),
        ({"adapt": ("linear", "cnov")}, "Did you mean conv?"),
        ({"adapt": None}, "--adapt is None"),
        ({"adapt": [[]]}, "--adapt is [[]]"),
        ({"exclude": "head"}, "--exclude is 'head', but it must be a list of names"),
        ({"exclude": None}, "--exclude is None, but it must be a list of names"),
        ({"exclude": 5}, "--exclude is 5, but it must be a list of names"),
        ({"exclude": [5]}, "--exclude is [5]"),
        ({"base_dtype": "int4"}, "--base-dtype is 'int4'"),
        ({"num_heads": "2"}, "--num-heads is '2'"),
    ],
)
def test_bad_settings_for_all_layers_name_their_flag(settings: dict[str, Any], says: str) -> None:
    """For any wrong type or value, in the constructor."""
    assert says in refusal(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (TrainConfig, {"checkpoint_activations": "a"}, "--checkpoint-activations is 'a', but it must be a list of names"),
        (TrainConfig, {"checkpoint_activations": 5}, "--checkpoint-activations is 5, but it must be a list of names"),
        (TrainConfig, {"compile": "no"}, "--compile is 'no', but it must be True or False"),
        (TrainConfig, {"precision": "fp16"}, "--precision is 'fp16', but it must be one of: fp32, bf16-mixed, fp16-mixed."),
        (TrainConfig, {"clip_norm": "1"}, "--clip-norm is '1', but it must be a number"),
        (TrainConfig, {"clip_norm": None}, "--clip-norm is None, but it must be a number"),
        (TrainConfig, {"clip_norm": -1.0}, "--clip-norm is -1.0, but it must be at least 0"),
        (TrainConfig, {"accumulate": 0}, "--accumulate is 0, but it must be at least 1"),
        (LTEConfig, {"others": "lora"}, "--others is 'lora', but it must be one of: replica, frozen"),
        (LTEConfig, {"others": "frozen", "adapt": ()}, "--adapt none and --others frozen contradict each other"),
        (TrainConfig, {"weight_decay": -1.0}, "--weight-decay is -1.0, but it must be at least 0"),
        (TrainConfig, {"epochs": 0.0}, "--epochs is 0, but it must be above 0"),
        (TrainConfig, {"samples": math.inf}, "--samples is inf, but it must be a finite number"),
        (TrainConfig, {"epochs": 1, "tokens": 1e6}, "--epochs 1 and --tokens 1e+06 each say how long the run is"),
        (TrainConfig, {"samples": 10, "steps": 5}, "--samples 10 and --steps 5 each say how long the run is"),
        (TrainConfig, {"accumulate": 2.0}, "--accumulate is 2.0, but it must be a whole number"),
        (TrainConfig, {"optimizer": "lora_muon"}, "--optimizer is 'lora_muon', but it must be one of: auto, adamw, lora-plus,"),
        (TrainConfig, {"schedule": None}, "--schedule is None, but it must be one of: auto, constant, cosine, linear."),
        (TrainConfig, {"lr": "1"}, "--lr is '1', but it must be a number"),
        (TrainConfig, {"replica_lr": -1.0}, "--replica-lr is -1.0, but it must be at least 0"),
        (TrainConfig, {"warmup": 0.5, "schedule": "cosine"}, "--warmup is 0.5, but it must be a whole number"),
        (PlacementConfig, {"heads_per_actor": 0}, "--heads-per-actor is 0"),
        (PlacementConfig, {"stack_heads": True}, "--stack-heads is True, but it must be one of: auto, always, never"),
        (PlacementConfig, {"cpus_per_head": "1"}, "--cpus-per-head is '1', but it must be a number"),
        (StorageConfig, {"keep_checkpoints": 2.5}, "--keep-checkpoints is 2.5, but it must be a whole number"),
        (StorageConfig, {"name": "a", "resume": "yes"}, "--resume is 'yes', but it must be True or False"),
    ],
)
def test_bad_settings_of_training_and_resources_name_their_flag(kind: type, settings: dict[str, Any], says: str) -> None:
    """One clear error each, for any type of value."""
    with pytest.raises(ConfigError) as raised:
        kind(**settings)
    assert says in str(raised.value)


def test_collections_become_tuples() -> None:
    """Configurations are equal and hashable in any notation, and can be written to run.toml and manifests."""
    lte = LTEConfig(lora_r=[4, 8], lora_alpha=[1, 2], adapt=["conv"], exclude=["a"])  # type: ignore[arg-type]
    assert lte == LTEConfig(lora_r=(4, 8), lora_alpha=(1.0, 2.0), adapt=("conv",), exclude=("a",))
    assert LTEConfig(exclude={"a"}).exclude == ("a",)  # type: ignore[arg-type]
    assert LTEConfig(adapt="conv").adapt == ("conv",)  # type: ignore[arg-type]
    assert LTEConfig(num_heads=1, lora_r=(4,), lora_alpha=[8.0]) == LTEConfig(num_heads=1, lora_r=4, lora_alpha=8.0)  # type: ignore[arg-type]
    train = TrainConfig(checkpoint_activations=["a"])  # type: ignore[arg-type]
    assert train == TrainConfig(checkpoint_activations=("a",))
    assert hash(lte)
    assert hash(train)


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    """s = alpha / r, and alpha / sqrt(r) with rsLoRA; per head and per layer."""
    lte = LTEConfig(lora_r=(4, 16), lora_alpha=(8.0, 4.0), layers=("a: lora_r=64",))
    assert [lte.resolve("linear", (False,), head).scaling for head in (0, 1)] == [2.0, 0.25]
    assert [lte.resolve("linear", (True,), head).scaling for head in (0, 1)] == [8 / 64, 4 / 64]
    rooted = dataclasses.replace(lte, rslora=True)
    assert [rooted.resolve("linear", (False,), head).scaling for head in (0, 1)] == [4.0, 1.0]
    assert [rooted.resolve("linear", (True,), head).scaling for head in (0, 1)] == [1.0, 0.5]


def test_a_bool_sets_biases_as_in_the_authors_library() -> None:
    """True: biases have factors; False: they are frozen."""
    assert LTEConfig(lora_bias=True) == LTEConfig(lora_bias="lora")  # type: ignore[arg-type]
    assert LTEConfig(lora_bias=False) == LTEConfig(lora_bias="frozen")  # type: ignore[arg-type]


# -- the authors' way --------------------------------------------------------------------------------------------------


def test_default_has_the_authors_values_and_accepts_overrides() -> None:
    """r = 8, alpha = 16, one head, frozen biases; an unknown name is an error with a suggestion."""
    lte = LTEConfig.default()
    assert (lte.num_heads, lte.lora_r, lte.lora_alpha, lte.lora_bias) == (1, 8, 16.0, "frozen")
    lte = LTEConfig.default(lora_r=32, lora_alpha=4096, num_heads=32, lora_bias=True)
    assert (lte.num_heads, lte.lora_r, lte.lora_alpha, lte.lora_bias) == (32, 32, 4096, "lora")
    with pytest.raises(ConfigError, match=r"no setting 'lora_rank'. Did you mean lora_r\? It has: num_heads, lora_r"):
        LTEConfig.default(lora_rank=4)
    with pytest.raises(ConfigError, match="--lora-r is 0"):
        LTEConfig.default(lora_r=0)


def test_views_read_and_set_the_settings_for_all_layers() -> None:
    """``config.lora.lora_r = 4``, as programs for the authors' library do after they made the configuration."""
    lte = LTEConfig.default()
    lte.lora.lora_r = 4
    lte.lora.lora_bias = True
    lte.lora.adapt = ["linear", "norm"]
    assert lte == LTEConfig.default(lora_r=4, lora_bias="lora", adapt=("linear", "norm"))
    assert (lte.lora.lora_r, lte.lora.lora_bias, lte.lora.num_heads) == (4, True, 1)
    lte.lora.layers = {"a": {"lr": 2}}
    assert lte.layers == ("a: lr=2",)


def test_views_of_a_kind_read_and_set_what_differs() -> None:
    """Reading gives the value that was set, else the value for all layers."""
    lte = LTEConfig.default(lora_r=4)
    assert (lte.lora.linear.lora_r, lte.lora.linear.lr, lte.lora.linear.adapt, lte.lora.norm.adapt) == (4, 1.0, True, False)
    lte.lora.linear.lora_r = 32
    lte.lora.linear.lora_bias = True
    lte.lora.conv.adapt = False
    assert (lte.lora.linear.lora_r, lte.lora.conv.lora_r, lte.lora.linear.lora_bias) == (32, 4, True)
    assert lte.resolve("linear", tuple(rule.kind == "linear" for rule in parse_rules(lte.layers))).rank == 32
    assert not lte.resolve("conv", tuple(rule.kind == "conv" for rule in parse_rules(lte.layers))).adapt


def test_views_have_keys() -> None:
    """As in a dict. lora_bias works in an if, a clone is independent, and the repr shows the values."""
    lte = LTEConfig.default(lora_r=4)
    assert lte.lora["lora_r"] == lte.lora.get("lora_r") == dict(lte.lora)["lora_r"] == dict(lte.lora.items())["lora_r"] == 4
    assert LTEConfig.default(**lte.lora) == lte
    assert ("lora_r" in lte.lora, "linear" in lte.lora, lte.lora.get("rank", 3), hasattr(lte.lora, "rank")) == (
        True,
        False,
        3,
        False,
    )
    assert [LTEConfig(lora_bias=bias).lora.lora_bias for bias in ("frozen", "lora", "replica")] == [False, True, "replica"]  # type: ignore[arg-type]
    other = lte.lora.clone()
    other["lora_r"] = 2
    lte.lora.linear["lora_alpha"] = 8
    assert (other.lora_r, lte.lora_r, lte.lora.linear["lora_alpha"], other.linear.lora_alpha) == (2, 4, 8.0, 16.0)
    assert repr(lte.lora).startswith("LoraView(num_heads=1, lora_r=4, lora_alpha=16.0,")
    assert "lora_alpha=8.0" in str(lte.lora.linear)
    assert LTEConfig.override_kwargs(lte, {"num_heads": 3}) is lte
    assert lte.num_heads == 3


def test_the_last_value_set_for_a_kind_counts() -> None:
    """Also after a rule for the kind; a rule for single layers still wins."""
    lte = LTEConfig(layers=("blocks.0: lora_r=2", "@linear: lora_r=4 lr=3", "blocks.1: lora_r=1"))
    for rank in (16, 32):
        lte.lora.linear.lora_r = rank
        assert lte.lora.linear.lora_r == rank
    assert lte.lora.linear.lr == 3.0
    assert lte.layers == ("blocks.0: lora_r=2", "@linear: lora_r=4 lr=3", "@linear: lora_r=32", "blocks.1: lora_r=1")
    fresh = LTEConfig(layers=("blocks.0: lora_r=2",))
    fresh.lora.linear.lora_r = 4
    assert fresh.layers == ("@linear: lora_r=4", "blocks.0: lora_r=2")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lora_rank", 4, r"no setting lora.lora_rank. Did you mean lora_r\?"),
        ("linaer", 4, "no setting lora.linaer"),
        ("lora_r", 0, "--lora-r is 0"),
        ("lora_r", (1, 2, 3), "--lora-r has 3 values"),
        ("num_heads", 0, "--num-heads is 0"),
        ("lora_bias", "some", "--lora-bias is 'some'"),
        ("layers", ["a"], "isn't a rule"),
        ("exclude", "a", "must be a list of names"),
    ],
)
def test_a_rejected_value_does_not_change_the_configuration(name: str, value: Any, says: str) -> None:
    """Reading or setting an unknown name is an error, too."""
    lte = LTEConfig(lora_r=(2, 4))
    before = dataclasses.replace(lte)
    with pytest.raises(ConfigError, match=says):
        setattr(lte.lora, name, value)
    assert lte == before
    if name not in before.__dataclass_fields__:
        with pytest.raises(ConfigError, match=says):
            getattr(lte.lora, name)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lora_rank", 4, r"no setting.*lora_rank.*Did you mean lora_r\?"),
        ("lora_r", 0, "lora_r is 0"),
        ("lora_r", (1, 2, 3), "lora_r has 3 values"),
        ("lora_r", None, "isn't a rule"),
        ("lr", -1, "lr is -1"),
        ("adapt", "maybe", "adapt is 'maybe'"),
    ],
)
def test_a_rejected_value_does_not_change_a_kind(name: str, value: Any, says: str) -> None:
    """As for all layers."""
    lte = LTEConfig(layers=("@linear: lora_r=4",))
    with pytest.raises(ConfigError, match=says):
        setattr(lte.lora.linear, name, value)
    assert lte == LTEConfig(layers=("@linear: lora_r=4",))


def test_the_number_of_heads_must_fit_values_per_head() -> None:
    """Two ranks don't fit three heads, and the error says so."""
    lte = LTEConfig(layers=("a: lora_r=2,4",))
    with pytest.raises(ConfigError, match="lora_r has 2 values"):
        lte.lora.num_heads = 3
    assert lte.num_heads == 2


def test_views_and_configurations_are_copied_and_pickled() -> None:
    """Programs keep them in objects that are sent to other processes."""
    lte = LTEConfig(lora_r=(2, 4), layers=("a: lr=2",))
    lte.lora.linear.lr = 0.5
    for again in (copy.deepcopy(lte), pickle.loads(pickle.dumps(lte))):
        assert again == lte
    for view in (copy.deepcopy(lte.lora), copy.copy(lte.lora), pickle.loads(pickle.dumps(lte.lora))):
        assert view.lora_r == (2, 4)
    for kind in (copy.deepcopy(lte.lora.linear), pickle.loads(pickle.dumps(lte.lora.linear))):
        assert kind.lr == 0.5


# -- flags and TOML ----------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> Parsed:
    return parse(Regression, PROGRAM, list(arguments))


def test_flags_give_ranks_kinds_rules_and_switches() -> None:
    """A flag may have several values; a rule is one argument."""
    lte = parsed("--lora-r", "8", "8", "32", "64", "--num-heads", "4", "--lora-alpha", "1", "2.5", "3", "4").lte
    assert lte == LTEConfig(num_heads=4, lora_r=(8, 8, 32, 64), lora_alpha=(1.0, 2.5, 3.0, 4.0))
    assert parsed("--lora-r", "8", "--lora-alpha", "1e3").lte == LTEConfig(lora_r=8, lora_alpha=1000.0)
    assert parsed("--adapt", "linear", "conv").lte.adapt == ("linear", "conv")
    assert parsed("--adapt").lte.adapt == ()
    rules = ("a: lora_r=2,4 lr=0.5", "b: adapt=false", "@norm: lora_bias=frozen")
    assert parsed("--layers", *rules).lte == LTEConfig(layers=rules)
    lte = parsed("--rslora", "--strict", "--lora-bias", "lora", "--base-dtype", "nf4").lte
    assert lte == LTEConfig(rslora=True, strict=True, lora_bias="lora", base_dtype="nf4")
    train = parsed("--compile", "--precision", "bf16-mixed", "--clip-norm", "1", "--accumulate", "4").train
    assert train == TrainConfig(compile=True, precision="bf16-mixed", clip_norm=1.0, accumulate=4)
    assert parsed("--checkpoint-activations", "blocks.*", "head").train.checkpoint_activations == ("blocks.*", "head")
    placement = parsed("--heads-per-actor", "8", "--stack-heads", "never").placement
    assert placement == PlacementConfig(heads_per_actor=8, stack_heads="never")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--lora-r", "8", "8", "32"], "--lora-r has 3 values"),
        (["--lora-r"], "--lora-r needs at least one value"),
        (["--layers", "a:", "lora_r=2"], "--layers 'a:' isn't a rule"),
        (["--layers", "a: lora_r=2,2,2"], "lora_r has 3 values"),
    ],
)
def test_flags_that_contradict_each_other_are_one_clear_error(arguments: list[str], says: str) -> None:
    """The same errors as in Python."""
    with pytest.raises(ConfigError) as raised:
        parsed(*arguments)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [["--adapt", "lin"], ["--lora-bias", "True"], ["--lora-r", "8.5"], ["--precision", "fp16"], ["--strict", "yes"]],
)
def test_flags_of_the_wrong_type_are_one_clear_error(arguments: list[str]) -> None:
    """The message names the flag and the value."""
    with pytest.raises(ConfigError) as raised:
        parsed(*arguments)
    assert all(argument in str(raised.value) for argument in arguments)


def round_trip(path: Path, lte: LTEConfig, train: TrainConfig, placement: PlacementConfig, merge: MergeConfig) -> Parsed:
    """The settings that the run.toml of such a run gives to another run."""
    storage = StorageConfig(name="r", storage=str(path))
    record = run_record.make_record(
        Regression(width=4), PROGRAM, Settings("r", lte, merge, train), placement, storage, FailureConfig()
    )
    (path / "run.toml").write_bytes(run_record.format_record(record).encode())
    return parsed("--config", str(path / "run.toml"))


EVERYTHING = (
    LTEConfig(
        num_heads=3,
        lora_r=(1, 2, 3),
        lora_alpha=(1.5, 2.0, 1e-7),
        rslora=True,
        lora_bias="lora",
        reset="B",
        adapt=("norm", "embedding"),
        others="frozen",
        exclude=("a", "b.*"),
        layers={"a.*": LayerConfig(lora_r=(1, 2, 4), adapt=False, lr=0.1), "@conv": {"lr": 1e-5}, 'q"\\ß': {"lr": 2}},  # type: ignore[arg-type]
        base_dtype="nf4",
        merge_buffers=("auto", "codes.*"),
        strict=True,
    ),
    TrainConfig(
        steps=7,
        budget="shared",
        seed=3,
        eval_every=5,
        checkpoint_every=0,
        threads_per_head=2,
        precision="bf16-mixed",
        optimizer="lora-muon",
        lr=0.25,
        replica_lr=0.125,
        schedule="cosine",
        warmup=5,
        clip_norm=0.5,
        ema=0.5,
        accumulate=3,
        init_from="runs/first",
        weight_decay=0.125,
        lr_scale=0.5,
        checkpoint_activations=("a", "b.*"),
        baseline=True,
        baseline_processes=3,
        compile=True,
        max_time=5400.0,
        stop_when="train_loss<2.5",
        patience=3,
        profile="20:30",
        callback=("mine:Callback",),
    ),
    PlacementConfig(
        heads_per_actor=3,
        stack_heads="always",
        cpus_per_head=0.5,
        gpus_per_head=0.25,
        gpu_memory_share=0.5,
        placement_strategy="SPREAD",
        head_labels=("ray.io/market-type=!spot", "mine=in(a,b)"),
        coordinator_labels=("mine=a",),
        resource_timeout=3.0,
    ),
)


def test_the_example_differs_from_every_default() -> None:
    """So the round trip below tests every field; those that contradict others, in cases of their own."""
    for config in EVERYTHING:
        for field in dataclasses.fields(config):
            contradicts = field.name in ("full_rank", *LENGTHS)
            assert contradicts or getattr(config, field.name) != field.default, field.name


@pytest.mark.parametrize(
    ("lte", "train", "placement"),
    [
        (LTEConfig(), TrainConfig(), PlacementConfig()),
        EVERYTHING,
        (LTEConfig(adapt=()), TrainConfig(), PlacementConfig()),
        (LTEConfig(full_rank=True), TrainConfig(), PlacementConfig()),
        *((LTEConfig(), TrainConfig(**{length: 2.5}), PlacementConfig()) for length in LENGTHS),
        (LTEConfig(num_heads=1, lora_r=(4,), lora_alpha=(8.0,)), TrainConfig(), PlacementConfig()),  # type: ignore[arg-type]
        (LTEConfig.default(lora_bias=True, lora_alpha=16), TrainConfig(), PlacementConfig(cpus_per_head=0)),
    ],
)
def test_a_run_toml_gives_the_settings_of_its_run(
    tmp_path: Path, lte: LTEConfig, train: TrainConfig, placement: PlacementConfig
) -> None:
    """--config run.toml gives every field of every section, in its type."""
    merge = MergeConfig(merge_iter=3, merge_threads=2)
    again = round_trip(tmp_path, lte, train, placement, merge)
    assert (again.lte, again.train, again.placement, again.merge) == (lte, train, placement, merge)
    assert again.worker == Regression(width=4)
    for config in (again.lte, again.train, again.placement):
        for field in dataclasses.fields(config):
            original = getattr({type(c): c for c in (lte, train, placement)}[type(config)], field.name)
            assert type(getattr(config, field.name)) is type(original) or {type(original)} <= {int, float}, field.name


@given(layer_configs, st.integers(1, 99), st.floats(1e-9, 1e9), st.sampled_from(["auto", "always", "never"]))
def test_any_settings_survive_a_run_toml(
    tmp_path_factory: pytest.TempPathFactory, layer: LayerConfig, rank: int, alpha: float, stack: Any
) -> None:
    """Numbers stay the same bit for bit, through TOML and flags."""
    layers = {} if layer == LayerConfig() else {"blocks.[0-9]*": layer}
    lte = LTEConfig(lora_r=(rank, 1), lora_alpha=alpha, layers=layers)  # type: ignore[arg-type]
    train, placement = TrainConfig(clip_norm=alpha, accumulate=rank), PlacementConfig(stack_heads=stack, cpus_per_head=alpha)
    again = round_trip(tmp_path_factory.getbasetemp(), lte, train, placement, MergeConfig())
    assert (again.lte, again.train, again.placement) == (lte, train, placement)
