"""Memory of every process of a run, by part, from shapes and the measured step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lte_ray.adapters.factors import trained_dtype
from lte_ray.adapters.quantization import BLOCK, NESTED_BLOCK
from lte_ray.config import MergeConfig
from lte_ray.config.merge import ROUNDED_CHANGES
from lte_ray.engine.prepare import named_tensors
from lte_ray.engine.settings import Settings
from lte_ray.layout import Adapted, Plan
from lte_ray.merging.policies.orthogonal import Orthogonal
from lte_ray.merging.policies.outer_optimizers import Adam
from lte_ray.merging.registry import WEIGHT_POLICIES, make_rule
from lte_ray.planning.measure import StepMemory, has_separate_references
from lte_ray.planning.shapes import Shapes
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups

VALUE = 4
"""Bytes of a value of the base, of contributions and of references."""

Parts = Mapping[str, int | None]
"""Bytes by part; None where they aren't known."""


def total(parts: Parts) -> int | None:
    """Returns the sum; None if a part isn't known."""
    return None if None in parts.values() else sum(size for size in parts.values() if size is not None)


def stored_bytes(spec: Adapted, base_dtype: str, dtype: torch.dtype) -> int:
    """Returns the bytes of a head's copy of a main weight.

    Args:
        base_dtype: its format; "fp32" leaves it in the model's type. A vector is always left so.
        dtype: the model's type.
    """
    size = math.prod(spec.shape)
    if base_dtype == "fp32" or len(spec.shape) == 1:
        return size * dtype.itemsize
    if base_dtype == "bf16":
        return 2 * size
    if base_dtype == "int8":
        return size + 2 * (spec.matrix[0] if len(spec.shape) == 2 else spec.shape[0])
    blocks = -(-size // BLOCK)
    return blocks * BLOCK // 2 + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4


class MemoryModel:
    """Bytes of a run's processes.

    Args:
        shapes: of the unconverted model; read at once, so that the model may be converted later.
        settings: of the run.

    Attributes:
        plans: each head's.
    """

    def __init__(self, shapes: Shapes, settings: Settings) -> None:
        self._settings, self.plans, plan = settings, shapes.plans, shapes.plans[0]
        tensors, parameters = named_tensors(shapes.model), dict(shapes.model.named_parameters())
        self._dtypes = {spec.name: tensors[spec.name].dtype for spec in plan.adapted}
        self._built = sum(tensor.nbytes for tensor in tensors.values())
        self._rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in self._dtypes)
        replicas = [parameters[r.name] for r in plan.replicas if r.name in parameters]
        self._masters = sum(p.numel() * trained_dtype(p).itemsize for p in replicas if p.dtype.itemsize < VALUE)
        # The gradient of A is half of that of [A; A'], where references are apart from the weights.
        self._doubled = sum(spec.rank * spec.matrix[1] * trained_dtype(tensors[spec.name]).itemsize for spec in plan.adapted)
        self._factors = sum(spec.rank * sum(spec.matrix) * trained_dtype(tensors[spec.name]).itemsize for spec in plan.adapted)

    def choose(self, settings: Settings) -> None:
        """Takes over settings whose policy isn't "auto", on which what the coordinator keeps depends."""
        self._settings = settings

    @property
    def plan(self) -> Plan:
        """The first head's."""
        return self.plans[0]

    def head(self, step: StepMemory, base_dtype: str | None = None) -> Parts:
        """Returns the memory of the first head, on its device, at the peak of a step.

        Args:
            step: as measured with the settings' formats.
            base_dtype: of all main weights, instead of the settings'.
        """
        parts: dict[str, int | None] = {**self.shared_weights(base_dtype), **self.own(step, base_dtype)}
        return parts

    def shared_weights(self, base_dtype: str | None = None) -> dict[str, int]:
        """Returns what heads of one actor share: main weights, and what doesn't train."""
        plan, main = self.plan, 0
        for spec in plan.adapted:
            main += stored_bytes(spec, base_dtype or spec.base_dtype, self._dtypes[spec.name])
        parts = {"main weights": main}
        if not self._settings.merge.wait:
            parts["next main weights"] = sum(
                stored_bytes(spec, "fp32", self._dtypes[spec.name])
                for spec in plan.adapted
                if (base_dtype or spec.base_dtype) == "fp32"
            )
        return parts

    def own(self, step: StepMemory, base_dtype: str | None = None) -> dict[str, int | None]:
        """Returns what each head has for itself."""
        plan = self.plan
        contribution = VALUE * plan.contribution.size
        separate = has_separate_references(plan) if base_dtype is None else base_dtype != "fp32"
        activations = step.activations
        if activations is not None:
            difference = int(separate) - int(has_separate_references(plan))
            activations += difference * (step.quantized + self._largest_dequantized())
        return {
            "other weights": self._rest + self._masters,
            "factors": self._factors,
            "last contribution": contribution * (1 if self._settings.merge.wait else 2),
            "adopted replicas": contribution - VALUE * plan.factors_size,
            "gradients": step.gradients + (self._doubled if separate else 0),
            "optimizer state": step.optimizer,
            "batch": step.batch,
            "activations": activations,
        }

    def _largest_dequantized(self) -> int:
        """Bytes of the largest weight in the type in which heads compute."""
        width = 2 if self._settings.train.precision != "fp32" else VALUE
        sizes = [math.prod(a.shape) * min(width, self._dtypes[a.name].itemsize) for a in self.plan.adapted if len(a.shape) > 1]
        return max(sizes, default=0)

    def host(self, merge: MergeConfig) -> Parts:
        """Returns what the process of a head on a GPU has in the machine's memory; on CPUs it is in addition to `head`.

        Args:
            merge: as contributions and bases are sent.
        """
        groups = make_groups(self.plans, merge)
        redone = [i for i, group in enumerate(groups) if group.redone]
        if not redone:
            return {"base (shared memory)": VALUE * self.plan.base.size}
        codec = Codec(self.plan, groups, merge)
        values = sum(codec.group_plans[i].base.size for i in redone)
        momenta = VALUE * values * (self._policy_bases() if any(group.by_factors for group in groups) else 0)
        factors = sum(plan.factors_size for plan in self.plans)
        return {
            "base": VALUE * self.plan.base.size,
            "base to redo merges": VALUE * values,
            "momentum": momenta,
            "heads' references": VALUE * factors,
        }

    def processes(self, merge: MergeConfig) -> dict[str, Parts]:
        """Returns the memory of the processes that aren't heads, and of the object store of the coordinator's node.

        Args:
            merge: as contributions and bases are sent.
        """
        base = VALUE * self.plan.base.size
        contributions = sum(VALUE * plan.contribution.size for plan in self.plans)
        groups = make_groups(self.plans, merge)
        sent = {plan: sum(Codec(plan, groups, merge).buffer_sizes) for plan in set(self.plans)}
        rounded = base if merge.send_down in ROUNDED_CHANGES else 0
        coordinator = {
            "base": base,
            "momentum": base * self._policy_bases(),
            "rounding": rounded,
            "moving average": base if self._settings.train.ema else 0,
            "heads' references": contributions,
            "contributions of a merge": contributions,
        }
        return {
            "driver": {"model": self._built, "base": base},
            "coordinator": {name: size for name, size in coordinator.items() if size},
            "object store": {"base, old and new": 2 * base, "contributions": sum(sent[plan] for plan in self.plans)},
            "evaluator": {"model": self._built},
        }

    def ordinary(self, step: StepMemory) -> Parts:
        """Returns the memory of a process of ordinary training with AdamW, in full precision of the model's types."""
        return {
            "weights": self._built,
            "gradients": step.gradients,
            "optimizer state": step.optimizer,
            "batch": step.batch,
            "activations": step.activations,
        }

    def _policy_bases(self) -> int:
        """How many values the policy keeps for each value of the base; 0 for a policy that isn't known."""
        merge = self._settings.merge
        rule = make_rule(merge.policy, merge.policy_args or {})
        if isinstance(rule, Adam):
            return 2
        momentum = isinstance(merge.policy, str) and merge.policy in WEIGHT_POLICIES[3:]
        return int(momentum or isinstance(rule, Orthogonal))


def with_gradient_buckets(parts: Parts, gradients: int) -> Parts:
    """Returns the memory of a process of DDP: its buckets are another copy of the gradients."""
    return {**parts, "gradient buckets": gradients}
