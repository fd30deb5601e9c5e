"""Multi-head LoRA (mhlora) as a training of its own: one process, all heads learn from all batches, nothing is merged."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lte_ray.adapters.plan import make_plans
from lte_ray.config import LTEConfig
from lte_ray.config.layer_rules import LayerConfig, parse_rules
from lte_ray.engine.head.batch_stream import BatchStream
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.optimization import OptimizerStep, autocast, build_optimizer, checkpoint_activations
from lte_ray.engine.head.rng import Generators, head_seed
from lte_ray.engine.initial_weights import build_initial_model
from lte_ray.engine.settings import Settings
from lte_ray.errors import LTEError, WorkerFailed
from lte_ray.ladder.figures import evaluate
from lte_ray.modes.base import ModeLayer, StackedLayer
from lte_ray.modes.merged_state_dict import merged_state_dict
from lte_ray.modes.parameter_guard import MODEL_RUNNING
from lte_ray.modes.prepare import prepare_model_for_lte
from lte_ray.modes.stacked_factors import StackedFactors
from lte_ray.worker import Worker, count_samples, to_device


class MultiheadTraining:
    """Trains y = x W^T + (1/N) sum_n s x A_n^T B_n^T with the settings of a run: the same A, batches, optimizer and schedule.

    A step takes the batches that the N heads of a run take in the same step, as one batch. Each head's factors get the
    gradient that they would get in a run that merges after every step: N times that of the mean product. So it equals such a
    run whose heads all see all batches. The main weights are in fp32, whatever `base_dtype` says.

    Args:
        worker: the user's program.
        settings: of the run; those of merging don't count.
        device: where to train.

    Attributes:
        step: steps taken.
        samples: seen.

    Raises:
        ConfigError, WorkerError: as `engine.prepare.prepare`.
        WorkerFailed: the worker's code raised.
    """

    def __init__(self, worker: Worker, settings: Settings, device: torch.device | str = "cpu") -> None:
        self._worker, self._device, lte = worker, torch.device(device), settings.lte
        self._train = dataclasses.replace(settings.train, accumulate=settings.train.accumulate * lte.num_heads)
        self._heads, seed = lte.num_heads, settings.train.seed
        self._batches = BatchStream(worker, 0, 1, seed)
        self._generators = Generators(head_seed(seed, 0), self._device)
        self.step = self.samples = 0
        with self._generators.swapped_in(), self._worker_errors():
            self._evaluated = build_initial_model(worker, self._train).to(self._device)
            model = build_initial_model(worker, self._train)
            plans, parameters = make_plans(model, lte), dict(model.named_parameters())
            model = prepare_model_for_lte(
                model, _for_modes(lte), strict=False, mode="mhlora", use_special_attention_scaling=False, seed=seed
            )
            self._model = model.to(self._device).train()
            stacks = _stacked_factors(self._model)
            checkpoint_activations(self._model, self._train.checkpoint_activations)
            if self._train.compile:
                self._model.compile()
        tensors: dict[str, Tensor] = {r.name: parameters[r.name] for r in plans[0].replicas if not r.buffer}
        tensors |= {r.name: model.get_buffer(r.name) for r in plans[0].replicas if r.buffer}
        for spec in plans[0].adapted:
            tensors |= {spec.a_name: stacks[spec.name].lora_A_weight, spec.b_name: stacks[spec.name].lora_B_weight}
        trained = {id(p) for p in self._model.parameters() if p.requires_grad}
        assert trained == {id(t) for t in tensors.values() if isinstance(t, nn.Parameter)}, "the plan names what trains"
        self._factors = [p for stack in stacks.values() for p in (stack.lora_A_weight, stack.lora_B_weight)]
        with self._worker_errors():
            self._optimizer, schedule = build_optimizer(worker, plans[0], tensors, self._train)
            _set_scalings(self._optimizer, stacks.values())
        self._optimizer_step = OptimizerStep(self._optimizer, schedule, self._train, self._device)

    def train_step(self) -> float:
        """Takes a step; returns its mean loss.

        Raises:
            WorkerFailed: the worker's code raised; names the step.
        """
        losses = []
        with self._generators.swapped_in(), self._worker_errors(self.step + 1):
            for _ in range(self._train.accumulate):
                batch = to_device(self._batches.next_batch(), self._device)
                self.samples += count_samples(batch)
                with autocast(self._train, self._device), _parameters_are_effective():
                    loss, _ = compute_loss(self._worker, self._model, batch)
                torch.autograd.backward(self._optimizer_step.scale_loss(loss))
                losses.append(loss.detach())
            torch._foreach_mul_([p.grad for p in self._factors if p.grad is not None], float(self._heads))
            self._optimizer_step.step()
        self.step += 1
        return float(torch.stack(losses).mean())

    def evaluate(self) -> dict[str, float]:
        """The worker's evaluation of W + (1/N) sum_n s B_n A_n, in an unconverted model.

        Raises:
            WorkerFailed: the worker's code raised.
        """
        self._evaluated.load_state_dict(self.merged_weights())
        return evaluate(self._worker, self._evaluated)

    def merged_weights(self) -> dict[str, Tensor]:
        """The state dict of the unconverted model with W + (1/N) sum_n s B_n A_n."""
        return merged_state_dict(self._model)

    @contextmanager
    def _worker_errors(self, step: int | None = None) -> Iterator[None]:
        try:
            yield
        except LTEError:
            raise
        except Exception as error:
            raise WorkerFailed("mhlora", step, traceback.format_exc()) from error


@contextmanager
def _parameters_are_effective() -> Iterator[None]:
    """Within the block, a weight that a loss reads without calling its layer has the heads' product, as in the model."""
    token = MODEL_RUNNING.set(True)
    try:
        yield
    finally:
        MODEL_RUNNING.reset(token)


def _set_scalings(optimizer: torch.optim.Optimizer, stacks: Iterable[StackedFactors]) -> None:
    """Gives groups of factors each head's scaling, where heads differ; they have the first head's."""
    differing = {stack.lora_A_weight: list(s) for stack in stacks if isinstance(s := stack.scaling, tuple)}
    for group in optimizer.param_groups if differing else ():
        if "scalings" in group:
            pairs = zip(group["params"][::2], group["scalings"], strict=True)
            group["scalings"] = [differing.get(a, scaling) for a, scaling in pairs]


def _for_modes(lte: LTEConfig) -> LTEConfig:
    """The settings without formats and learning rates of layers, which modes leave to the user."""
    rules = []
    for rule in parse_rules(lte.layers):
        settings = dataclasses.replace(rule.settings, lr=None, base_dtype=None)
        if settings != LayerConfig():
            rules.append(f"{rule.pattern}: {settings}")
    return dataclasses.replace(lte, layers=tuple(rules), base_dtype="fp32", strict=False)


def _stacked_factors(model: nn.Module) -> dict[str, StackedFactors]:
    """The heads' factors, by the name of the unconverted model's parameter."""
    stacks: dict[str, StackedFactors] = {}
    for module in model.modules():
        if isinstance(module, StackedLayer):
            stacks[module.lora.specs[0].name] = module.lora
        if isinstance(module, ModeLayer) and module.lora_bias is not None:
            stacks[module.lora_bias.specs[0].name] = module.lora_bias
    return stacks
