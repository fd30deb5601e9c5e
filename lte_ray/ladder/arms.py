"""An arm of a comparison: the complete settings of one training."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.run.record import object_name
from lte_ray.worker import Worker, worker_settings

MODES = ("heads", "mhlora")

EVALUATIONS = 14
"""About how often an arm is evaluated."""

WITHOUT_INFLUENCE = ("eval_every", "checkpoint_every", "threads_per_head", "compile")
"""Settings of training that don't change what is trained, other than in the last bits."""


DEFAULTS = 1
"""Counts the changes of defaults: a release that changes one raises it, so that older results aren't taken for today's."""


@dataclass(frozen=True)
class Arm:
    """The settings of one training, which several rungs, rates and seeds of a comparison vary.

    Attributes:
        rung: what is compared, by name; arms of one rung differ in their rates and seeds only.
        lte, merge, train: as for a run. `train.baseline` makes it ordinary training; `train.lr_scale` is its rate.
        mode: "heads", as `lte-ray train`, or "mhlora" (`MultiheadTraining`).
        worker: arguments that replace those of the comparison's worker.
        evaluate_every: steps between two evaluations; 0: only at the end.
    """

    rung: str
    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    mode: Literal["heads", "mhlora"] = "heads"
    worker: Mapping[str, Any] = field(default_factory=dict)
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"An arm's mode is {self.mode!r}, but it must be one of: {', '.join(MODES)}.")

    @property
    def seed(self) -> int:
        return self.train.seed

    @property
    def rate(self) -> float:
        """The multiplier of the learning rates."""
        return self.train.lr_scale

    @property
    def label(self) -> str:
        """The arm in words: ``mhlora, rate x0.5, seed 1``."""
        return f"{self.rung}, rate x{self.rate:g}, seed {self.seed}"

    @property
    def settings(self) -> Settings:
        """The settings of its run."""
        return Settings(f"{self.rung}-x{self.rate:g}-seed-{self.seed}", self.lte, self.merge, self.train)

    def with_rate(self, rate: float, seed: int) -> Arm:
        """Returns the same arm at another rate and seed."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, lr_scale=rate, seed=seed))

    def make_worker(self, worker: Worker) -> Worker:
        """Returns the comparison's worker with this arm's arguments.

        Raises:
            ConfigError: its constructor lacks an argument.
        """
        if not self.worker:
            return worker
        known = inspect.signature(type(worker)).parameters
        for name in self.worker:
            if name not in known:
                raise ConfigError(f"{type(worker).__name__} has no argument {name!r}. It has: {', '.join(known)}.")
        made: Worker = type(worker)(**worker_settings(worker) | dict(self.worker))
        return made

    @property
    def key(self) -> str:
        """Identifies what is trained: arms of equal keys give the same result. It doesn't depend on the rung's name.

        Only what differs from its default counts, so that results stay valid when a later release adds a setting.
        """
        merges = self.mode == "heads" and not self.train.baseline
        merge = dataclasses.replace(self.merge, policy=object_name(self.merge.policy)) if merges else None
        content = [DEFAULTS, self.mode, _changed(self.lte), merge and _changed(merge), _changed(self.train), dict(self.worker)]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _changed(config: LTEConfig | MergeConfig | TrainConfig) -> dict[str, Any]:
    """The settings that influence what is trained and differ from their defaults."""
    default = type(config)()
    names = {each.name for each in dataclasses.fields(config)} - set(WITHOUT_INFLUENCE)
    return {name: value for name in names if (value := getattr(config, name)) != getattr(default, name)}


def spacing(steps: int, merge_iters: Sequence[int]) -> int:
    """Returns the steps between two evaluations so that arms of all `merge_iters` are evaluated after equally many samples.

    It is a multiple of all of them where that gives at least five evaluations. Otherwise each arm is evaluated at the first
    merge after each evaluation is due.
    """
    common = math.lcm(*merge_iters)
    common = common if 5 * common <= steps else 1
    return common * max(1, round(steps / (EVALUATIONS * common)))
