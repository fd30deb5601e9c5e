"""The settings of the LoRA heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.config.layer_rules import (
    BASE_DTYPES,
    BIASES,
    KINDS,
    check_alpha,
    check_rank,
    check_rules,
    format_rules,
    parse_rules,
    value_for_head,
)
from lte_ray.config.legacy_view import LoraView
from lte_ray.config.validation import (
    check_at_least,
    check_booleans,
    check_choice,
    check_integers,
    setting,
    suggest,
    to_name_tuples,
)
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class Resolved:
    """The settings of one layer of one head."""

    adapt: bool
    rank: int
    scaling: float
    bias: str
    lr: float
    base_dtype: str


@dataclass(frozen=True)
class LTEConfig:
    """The LoRA heads: how many, of what rank, and on which layers."""

    num_heads: int = setting(
        2,
        "Number of LoRA heads. Each is a Ray actor with its own copy of the main weights, unless --heads-per-actor is above 1.",
    )
    lora_r: int | tuple[int, ...] = setting(
        64, "Rank r of each head's factors A (r x in) and B (out x r), at most min(out, in); one number, or one per head."
    )
    lora_alpha: float | tuple[float, ...] | None = setting(
        None, "LoRA alpha. A head's LoRA update is (alpha / r) B A; one number, or one per head; by default 2 r."
    )
    rslora: bool = setting(False, "Scale the update by alpha / sqrt(r) instead (rsLoRA, arXiv 2312.03732).")
    lora_bias: Literal["replica", "frozen", "lora"] = setting(
        "replica",
        "Biases of layers with LoRA: replica (each head trains a copy, and merges average the changes), frozen, or lora (a "
        "vector times a scalar).",
    )
    reset: Literal["none", "B"] = setting(
        "none", "What a head resets after a merge: none (reset-less LTE) or B (B := 0; A is kept)."
    )
    adapt: tuple[Literal["linear", "attention", "conv", "embedding", "norm", "none"], ...] = setting(
        ("linear", "attention", "conv"),
        "Kinds of layers with LoRA: linear, attention (the projections of nn.MultiheadAttention), conv, embedding, norm (a "
        "vector times a scalar). All others train as replicas. none: everything does, as in local SGD and DiLoCo.",
    )
    others: Literal["replica", "frozen"] = setting(
        "replica",
        "Parameters without LoRA, such as norms, embeddings, and biases unless --lora-bias is lora: replica (each head trains "
        "a copy, and merges average the changes) or frozen (only factors train, as in PEFT). What --exclude or a rule with "
        "adapt=false names trains in either case.",
    )
    exclude: tuple[str, ...] = setting(
        (), "Names of layers without LoRA, which train as replicas, with wildcards, e.g. 'head' 'blocks.*.mlp'."
    )
    layers: tuple[str, ...] = setting(
        (),
        "Rules for single layers, e.g. 'blocks.*.attn: lora_r=8 lora_bias=frozen' '@conv: lr=0.5'. Settings: lora_r, "
        "lora_alpha, lora_bias, lr (a multiplier), base_dtype, adapt=false. Later rules win.",
    )
    base_dtype: Literal["fp32", "bf16", "int8", "nf4"] = setting(
        "fp32", "Format of the main weights in the heads; the coordinator keeps them in fp32. nf4 needs lte-ray[quant]."
    )
    full_rank: bool = setting(
        False,
        "Train the weights that would have factors themselves, in full: local SGD, as in DiLoCo and MuLoCo. Contributions are "
        "dense, and --lora-r, --lora-alpha and --rslora don't count.",
    )
    merge_buffers: tuple[str, ...] = setting(
        ("auto",),
        "Names of buffers that training changes and merges average, such as codebooks, with wildcards. auto: those that change "
        "when a loss is computed before the run. Running statistics of batch normalization are always merged.",
    )
    strict: bool = setting(
        False, "Refuse a model with parameters that train as replicas only because no setting mentions them."
    )

    def __post_init__(self) -> None:
        check_integers(self, "num_heads")
        check_at_least(self, 1, "num_heads")
        check_booleans(self, "rslora", "full_rank", "strict")
        for name in ("lora_r", "lora_alpha"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):  # a list of one value for one head is a number
                object.__setattr__(self, name, value[0] if len(value) == self.num_heads == 1 else tuple(value))
        if isinstance(self.lora_bias, bool):  # as in the authors' library
            object.__setattr__(self, "lora_bias", "lora" if self.lora_bias else "frozen")
        check_rank("--lora-r", self.lora_r, self.num_heads)
        if self.lora_alpha is None:  # s = 2
            alpha = tuple(2.0 * r for r in self.lora_r) if isinstance(self.lora_r, tuple) else 2.0 * self.lora_r
            object.__setattr__(self, "lora_alpha", alpha)
        check_alpha("--lora-alpha", self.lora_alpha, self.num_heads)
        check_choice(self, "lora_bias", BIASES)
        check_choice(self, "reset", ("none", "B"))
        check_choice(self, "base_dtype", BASE_DTYPES)
        if isinstance(self.adapt, str):
            object.__setattr__(self, "adapt", (self.adapt,))
        to_name_tuples(self, "adapt", "exclude", "merge_buffers")
        if self.adapt == ("none",):  # the empty tuple as a word, for the command line
            object.__setattr__(self, "adapt", ())
        if "none" in self.adapt:
            others = ", ".join(kind for kind in self.adapt if kind != "none")
            raise ConfigError(f"--adapt is none and {others}, which contradict each other. Leave one of them out.")
        check_choice(self, "adapt", KINDS)
        check_choice(self, "others", ("replica", "frozen"))
        object.__setattr__(self, "layers", format_rules(self.layers))
        check_rules(self.layers, self.num_heads)
        if not self.adapt and self.others == "frozen" and not any(rule.settings.adapt for rule in parse_rules(self.layers)):
            raise ConfigError(
                "--adapt none and --others frozen contradict each other: nothing would train. Leave one of them out, or "
                "choose layers by name: --layers '*.q_proj: adapt=true'."
            )
        if self.full_rank:
            self._check_full_rank()

    def _check_full_rank(self) -> None:
        """Raises ConfigError for settings of factors that would change what a full-rank run trains."""
        reasons = {
            "reset": ("none", "there is no B to reset"),
            "base_dtype": ("fp32", "the weights themselves train, so they can't be quantized"),
            "lora_bias": ("lora", "biases can't have factors either; they are replica or frozen"),
        }
        given = [("--" + name.replace("_", "-"), name, getattr(self, name)) for name in reasons]
        for rule, text in zip(parse_rules(self.layers), self.layers, strict=True):
            given += [(f"--layers {text!r}:", name, getattr(rule.settings, name, None)) for name in reasons]
        for where, name, value in given:
            word, why = reasons[name]
            if value is not None and (value == word if name == "lora_bias" else value != word):
                raise ConfigError(f"--full-rank and {where} {value} contradict each other: {why}. Leave one of them out.")

    @classmethod
    def default(cls, **overrides: Any) -> LTEConfig:
        """The authors' defaults (r = 8, alpha = 16, one head, biases frozen), with `overrides`.

        Raises:
            ConfigError: there is no such setting.
        """
        known = cls.__dataclass_fields__
        for name in overrides:
            if name not in known:
                raise ConfigError(
                    f"LTEConfig.default() has no setting {name!r}.{suggest(name, known)} It has: {', '.join(known)}."
                )
        values: dict[str, Any] = {"num_heads": 1, "lora_r": 8, "lora_alpha": 16.0, "lora_bias": "frozen"}
        return cls(**values | overrides)

    @staticmethod
    def override_kwargs(cfg: LTEConfig, kwargs: dict[str, Any]) -> LTEConfig:
        """Sets `kwargs` in `cfg` in place, as the authors' programs do, and returns it.

        Raises:
            ConfigError: there is no such setting.
        """
        for name, value in kwargs.items():
            cfg.lora[name] = value
        return cfg

    @property
    def alpha(self) -> float | tuple[float, ...]:
        """`lora_alpha`, with its default in place of None."""
        assert self.lora_alpha is not None
        return self.lora_alpha

    @property
    def lora(self) -> LoraView:
        """The mutable view of the authors' library: ``config.lora.lora_r``, ``config.lora.linear.lora_r = 32``."""
        return LoraView(self)

    def resolve(self, kind: str, matching: tuple[bool, ...], head: int = 0) -> Resolved:
        """Resolves the settings of one layer of a head.

        Args:
            kind: the layer's kind.
            matching: for each rule in `layers`, whether it matches the layer.
            head: the head's number.
        """
        values: dict[str, Any] = {
            "lora_r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_bias": "frozen" if self.others == "frozen" and self.lora_bias == "replica" else self.lora_bias,
            "lr": 1.0,
            "base_dtype": self.base_dtype,
            "adapt": kind in self.adapt,
        }
        for rule, matches in zip(parse_rules(self.layers), matching, strict=True):
            if matches:
                values |= {name: v for name, v in vars(rule.settings).items() if v is not None}
        rank, alpha = value_for_head(values["lora_r"], head), value_for_head(values["lora_alpha"], head)
        scaling = alpha / math.sqrt(rank) if self.rslora else alpha / rank
        return Resolved(values["adapt"], rank, scaling, values["lora_bias"], values["lr"], values["base_dtype"])
