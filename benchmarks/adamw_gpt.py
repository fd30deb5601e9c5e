"""The GPT worker with AdamW on a cosine schedule, as it was before LoRA-Muon became the library's default.

Benchmarks whose figures are about merging or formats keep it, so that they can be compared with earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lte_ray.optim import warmup_cosine
from workers.gpt import GPT


@dataclass
class AdamWGPT(GPT):
    """`GPT` with an optimizer of its own."""

    lr: float = 4e-3
    """Peak learning rate of AdamW."""

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.0)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return warmup_cosine(optimizer, total_steps)
