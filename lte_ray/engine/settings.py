"""All that the engine needs to know of a run, in one frozen record that every process gets."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig


@dataclass(frozen=True)
class Settings:
    """The settings of one run."""

    run: str
    lte: LTEConfig
    merge: MergeConfig
    train: TrainConfig
