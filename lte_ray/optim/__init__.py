"""Optimizers for factors and whole weights, and learning-rate schedules.

    LoRAMuon        steps of one spectral norm for products of factors (LoRA-Muon)
    Muon            the same for whole weights
    lora_plus       AdamW with separate rates for A, B and everything else (LoRA+)
    warmup_cosine   and `warmup_linear`, `warmup_constant`: schedules for a worker's `build_schedule`

Each optimizer takes the parameter groups that a worker's `build_optimizer` gets.
"""

from lte_ray.optim.lora_muon import LoRAMuon
from lte_ray.optim.lora_plus import lora_plus
from lte_ray.optim.muon import Muon
from lte_ray.optim.orthogonalization import orthogonalize
from lte_ray.optim.schedules import warmup_constant, warmup_cosine, warmup_linear

__all__ = ["LoRAMuon", "Muon", "lora_plus", "orthogonalize", "warmup_constant", "warmup_cosine", "warmup_linear"]
