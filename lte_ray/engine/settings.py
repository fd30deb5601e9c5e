"""The settings of a run that the engine needs, in one frozen record that every process gets."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.baseline import baseline_lte, baseline_merge, baseline_train
from lte_ray.config.independent import check_never_merge
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        untrained: fingerprints of what nothing trains in the model that the driver has built (`engine.head.untrained`).
        data_problem: how the worker's batches don't follow their shard, in words.
    """

    run: str
    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
    untrained: tuple[tuple[str, float], ...] = ()
    data_problem: str = ""

    def __post_init__(self) -> None:
        check_never_merge(self.lte, self.merge, self.train)
        if self.lte.reset == "B" and not self.merge.wait:
            raise ConfigError(
                "--reset B and --no-wait contradict each other: B is set to zero at a merge, and with it the steps that a head "
                "took meanwhile. Leave one of them out; reset-less heads lose nothing."
            )
        if self.lte.full_rank and self.merge.shards > 1:
            raise ConfigError(
                f"--full-rank and --shards {self.merge.shards} contradict each other: shards divide the layers with factors. "
                "Leave one of them out."
            )
        batches, processes = self.lte.num_heads * self.train.accumulate, self.train.baseline_processes
        if batches % processes:
            raise ConfigError(
                f"--baseline-processes is {processes}, but a step takes {batches} batches (--num-heads times --accumulate): "
                "choose a number that divides it."
            )
        for name, given in {"--merge-every": self.merge.merge_every, "--rollback-z": self.merge.rollback_z}.items():
            if given and processes > 1:
                raise ConfigError(
                    f"{name} and --baseline-processes {processes} contradict each other: only one process can follow its own "
                    "clock, or go back to an earlier version. Leave one of them out."
                )
        if self.merge.quorum > self.lte.num_heads:
            raise ConfigError(
                f"--quorum is {self.merge.quorum}, but there are {self.lte.num_heads} heads: choose at most as many."
            )

    @property
    def max_lag(self) -> int:
        """The most versions that a head lags behind before it rebases in mid-round.

        Orthogonal steps lose most from contributions that lag: with 4 heads and a limit of 2 instead of 1, the loss of
        `benchmarks.async_defaults` (seed 100) rose by 2%.
        """
        if self.merge.max_lag is not None:
            return self.merge.max_lag
        return max(1, self.lte.num_heads // 4) if self.merge.policy == "orthogonal" else 4

    def resolved(self) -> Settings:
        """Returns the settings to run: with ``--baseline`` those that make it ordinary training, otherwise these.

        Resolving them again changes nothing.
        """
        if not self.train.baseline:
            return self
        train = baseline_train(self.train, self.lte.num_heads)
        return Settings(self.run, baseline_lte(self.lte), baseline_merge(self.merge), train, self.untrained, self.data_problem)
