"""The memory of one training step, measured on tensors without values: activations, gradients and the optimizer's state.

Every operation of the step is seen, with the sizes of what it makes and the moment at which that is freed. So the peak is that
of the real step, except for what kernels need within themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lte_ray.adapters.convert import Converted, convert, quantizer_input
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.config.layer_rules import LayerConfig, parse_rules
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.optimization import autocast, build_optimizer, checkpoint_activations
from lte_ray.engine.prepare import named_tensors
from lte_ray.engine.settings import Settings
from lte_ray.errors import UserError
from lte_ray.layout import Plan
from lte_ray.optim import Muon
from lte_ray.planning.shapes import Shapes, brief
from lte_ray.worker import Worker, count_samples


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step of one process, in addition to weights, factors and what a head keeps of a merge.

    Attributes:
        gradients: of all that trains.
        optimizer: its state after a step; None if it isn't known.
        peak: the most that forward, backward and optimizer step need at once, with gradients and without the optimizer's
            state; None if it isn't known.
        quantized: how much more the loss keeps for its gradients where main weights are in formats of fewer bits: references
            apart from them, but no copies in the type of mixed precision.
        flops: operations of the step's matrix products, forward and backward; None if they aren't known.
        batch: of one batch.
        samples: of one batch, a number.
        orthogonalizes: whether the optimizer takes orthogonalized steps, which decides the merge policy.
        problems: why something isn't known, in sentences.
    """

    gradients: int
    optimizer: int | None = None
    peak: int | None = None
    quantized: int = 0
    flops: float | None = None
    batch: int = 0
    samples: int = 0
    orthogonalizes: bool = False
    problems: tuple[str, ...] = ()

    @property
    def activations(self) -> int | None:
        """What the peak needs beyond the gradients: activations, and space to work in."""
        return None if self.peak is None else max(0, self.peak - self.gradients)


def measure_head(worker: Worker, shapes: Shapes, settings: Settings) -> StepMemory:
    """Measures a step of one head. Converts the model of `shapes` in place.

    bf16 stands for all formats of fewer bits: main weights in them are computed with alike, one at a time.
    """
    train, plan = settings.train, shapes.plans[0]
    as_set = {spec.name for spec in plan.adapted if spec.base_dtype != "fp32"}
    other = set() if as_set else {spec.name for spec in plan.adapted}
    with shapes.computing():
        converted = convert(shapes.model, _in_full(settings.lte), separate_reference=True)
        converted.make_masters()
        converted.user_parameters.watched = True  # nothing is learned from watching a loss without values
        checkpoint_activations(converted.model.train(), train.checkpoint_activations)
        weights = {name: main.stored for name, main in converted.main_weights.items()}
        step = _HeadStep(worker, converted, shapes, train)
        trained = {**converted.factors, **converted.replicas()}
        _quantize(converted, weights, as_set)
        measured = _measure(step, converted.plan, trained)
        if measured.peak is None or not plan.adapted:
            return measured
        kept = step.kept
        _quantize(converted, weights, other)
        step.compute_loss()
        return replace(measured, quantized=kept - step.kept if as_set else step.kept - kept)


def measure_ordinary(worker: Worker, shapes: Shapes, train: TrainConfig) -> StepMemory:
    """Measures a step of ordinary training with AdamW, in which all that heads would train trains in full.

    The model of `shapes` is as before, except that what doesn't train requires no gradient.
    """
    with shapes.computing():
        plan = shapes.plans[0].full_rank()
        tensors = named_tensors(shapes.model)
        trained = {replica.name: tensors[replica.name] for replica in plan.replicas}
        for name, parameter in shapes.model.named_parameters():
            parameter.requires_grad_(name in trained)
        adamw = replace(train, optimizer="adamw", lr_scale=1.0, accumulate=1)
        return _measure(_Step(_WithoutOptimizer(worker), shapes.model.train(), shapes, adamw), plan, trained)


def has_separate_references(plan: Plan) -> bool:
    """Whether the head keeps references apart from main weights, since these are stored in fewer bits."""
    return any(spec.base_dtype != "fp32" for spec in plan.adapted)


class _WithoutOptimizer:
    """A worker that leaves its optimizer to the settings."""

    def __init__(self, worker: Worker) -> None:
        self.loss = worker.loss


class _Step:
    """The loss of a batch and its gradients, as one process computes them.

    Attributes:
        known: what isn't made by the step.
        kept: bytes that the last loss kept until its gradients were computed.
    """

    def __init__(self, worker: Any, model: nn.Module, shapes: Shapes, train: TrainConfig) -> None:
        self.worker, self.model, self.batch, self.train = worker, model, shapes.batch, train
        self.kept = 0

    @property
    def known(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def loss(self) -> Tensor:
        with autocast(self.train, torch.device("cpu")):
            return compute_loss(self.worker, self.model, self.batch)[0]

    def backward(self, memory: PeakMemory) -> None:
        """Computes the loss and its gradients; `memory` counts."""
        loss = self.loss()
        self.kept = memory.now
        torch.autograd.backward(loss)


class _HeadStep(_Step):
    """That of a head."""

    def __init__(self, worker: Any, converted: Converted, shapes: Shapes, train: TrainConfig) -> None:
        super().__init__(worker, converted.model, shapes, train)
        self._converted = converted

    @property
    def known(self) -> list[Tensor]:
        mains = self._converted.main_weights.values()
        stored = [t for e in mains for t in (e.stored.parts if isinstance(e.stored, QuantizedWeight) else (e.stored,))]
        factors = [t for each in mains for t in (*each.factors.parameters(), *each.factors.buffers())]
        return [*super().known, *stored, *factors, *self._converted.replicas().values()]

    def backward(self, memory: PeakMemory) -> None:
        with self._converted.user_parameters.track():
            super().backward(memory)

    def compute_loss(self) -> None:
        """Computes the loss alone."""
        memory = PeakMemory(self.known)
        with memory, self._converted.user_parameters.track():
            loss = self.loss()
            self.kept = memory.now
            del loss


def _quantize(converted: Converted, weights: Mapping[str, Tensor | QuantizedWeight], names: Collection[str]) -> None:
    """Stores these main weights in bf16, and gives them references as after a merge; the others as they were."""
    for name, main in converted.main_weights.items():
        weight, factors, quantized = weights[name], main.factors, name in names
        assert isinstance(weight, Tensor)
        if quantized and weight.ndim > 1:
            main.user.set_stored(QuantizedWeight.from_weight(quantizer_input(main.spec, weight), "bf16"))
        else:
            main.user.set_stored(weight)
        factors.reference_A = torch.zeros_like(factors.A) if quantized else None
        factors.reference_B = torch.zeros_like(factors.B) if quantized else None


def _measure(step: _Step, plan: Plan, trained: dict[str, Tensor]) -> StepMemory:
    parameters = [tensor for tensor in trained.values() if isinstance(tensor, nn.Parameter)]
    gradients = sum(parameter.nbytes for parameter in parameters)
    peak = flops = state = optimizer = None
    problems: list[str] = []
    if step.batch is not None:
        memory = PeakMemory(step.known)
        try:
            with memory:
                step.backward(memory)
            peak, flops = memory.peak, memory.flops
        except Exception as error:
            problems.append(f"Activations aren't known, since the loss needs values: {brief(error)}")
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer, _ = build_optimizer(step.worker, plan, trained, step.train)
        memory = PeakMemory([*step.known, *(p.grad for p in parameters if p.grad is not None)])
        with memory:
            optimizer.step()
        state = sum(t.nbytes for t in tree_leaves(dict(optimizer.state)) if isinstance(t, Tensor))
        peak = None if peak is None else max(peak, gradients + memory.peak - state)
    except UserError:
        raise
    except Exception as error:
        problems.append(f"The optimizer's state isn't known, since its step needs values: {brief(error)}")
    for parameter in parameters:
        parameter.grad = None
    return StepMemory(
        gradients=gradients,
        optimizer=state,
        peak=peak,
        flops=flops,
        batch=0 if step.batch is None else memory_of(step.batch),
        samples=0 if step.batch is None else count_samples(step.batch),
        orthogonalizes=isinstance(optimizer, Muon),
        problems=tuple(problems),
    )


def memory_of(batch: Any) -> int:
    """Returns the bytes of a batch's tensors, in containers or attributes."""
    if isinstance(batch, Mapping):
        batch = dict(batch)
    elif hasattr(batch, "__dict__") and not isinstance(batch, Tensor):
        batch = vars(batch)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory that operations allocate, until it is freed.

    Args:
        known: tensors whose memory doesn't count.

    Attributes:
        now, peak: bytes.
        flops: operations of matrix products and convolutions, which torch knows formulas for.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.peak = 0
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)  # its address may be used again
        self.now -= size


def _in_full(lte: LTEConfig) -> LTEConfig:
    """The settings without formats of main weights."""
    rules = [(rule.pattern, replace(rule.settings, base_dtype=None)) for rule in parse_rules(lte.layers)]
    kept = tuple(f"{pattern}: {settings}" for pattern, settings in rules if settings != LayerConfig())
    return replace(lte, base_dtype="fp32", layers=kept)
