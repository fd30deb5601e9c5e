"""Optimizers for factors and whole weights.

    LoRAMuon    steps of one spectral norm for products of factors (LoRA-Muon)
    Muon        the same for whole weights

Each takes the parameter groups that a worker's `build_optimizer` gets.
"""

from lte_ray.optim.lora_muon import LoRAMuon
from lte_ray.optim.muon import Muon
from lte_ray.optim.orthogonalization import orthogonalize

__all__ = ["LoRAMuon", "Muon", "orthogonalize"]
