"""Methods and state-dict keys that scripts and checkpoints of the authors' library expect of layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.modes.arithmetic import set_to_mean
from lte_ray.modes.base import ModeLayer
from lte_ray.modes.stacked_factors import StackedFactors


class AuthorsLayer(ModeLayer):
    """The methods of their ddp and dmp layers. The dense matrices of all heads are formed on demand and never stored."""

    def padded_factors(self) -> tuple[Tensor, Tensor]:
        """A (H x r x in) and B (H x out x r), with zeros beyond a head's rank."""
        raise NotImplementedError

    @property
    def lora_initialized(self) -> Tensor:
        """1: factors are drawn when they are created."""
        return torch.ones_like(self.merged)

    def get_lora_params(self) -> tuple[tuple[Tensor, Tensor], tuple[None, None]]:
        """((A, B), (None, None)). Factors of a bias are in `lora_bias`."""
        return self.padded_factors(), (None, None)

    @torch.no_grad()
    def compute_delta(self) -> tuple[Tensor, Tensor | None]:
        """s B A of all heads (H x out x in), and of biases with factors (H x out) or None; the reference isn't subtracted."""
        weight, _ = self.lora_to_delta(*self.padded_factors(), None, None, self.scaling)
        if self.lora_bias is None:
            return weight, None
        return weight, self.lora_bias.scale((self.lora_bias.lora_B_weight @ self.lora_bias.lora_A_weight)[:, :, 0])

    @torch.no_grad()
    def lora_to_delta(
        self,
        A: Tensor,  # noqa: N803  # A and B are what the field calls them
        B: Tensor,  # noqa: N803
        b_A: Tensor | None,  # noqa: N803
        b_B: Tensor | None,  # noqa: N803
        scaling: float | tuple[float, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """(s B A, s (B b_A + b_B)) of stacked factors; the second is None without b_A (H x r) and b_B (H x out)."""
        s = torch.as_tensor(scaling, dtype=A.dtype, device=A.device).reshape(-1, 1, 1)
        if b_A is None or b_B is None:
            return s * (B @ A), None
        return s * (B @ A), s[:, 0] * ((B @ b_A[:, :, None])[:, :, 0] + b_B)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if state_dict.pop(f"{prefix}lora_initialized", None) is not None:  # only their checkpoints have this key
            if getattr(self._modules.get("lora", self), "reset", "none") == "B":
                raise ConfigError("This checkpoint is of LTE without resets; pass reset='none' to LTEConfig to load it.")
            self.translate_keys(state_dict, prefix)
            bias = state_dict.get(f"{prefix}bias")
            if self.bias_replicas is not None and bias is not None:
                state_dict[f"{prefix}bias_replicas"] = bias.expand_as(self.bias_replicas)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def translate_keys(self, state: dict[str, Any], prefix: str) -> None:
        """Replaces, in place, the keys of their layer of this mode by the keys of this one."""
        raise NotImplementedError


class DDPCompat(AuthorsLayer):
    """Their ddp layer's factors and keys."""

    lora: StackedFactors

    def padded_factors(self) -> tuple[Tensor, Tensor]:
        """The parameters themselves."""
        return self.lora.lora_A_weight, self.lora.lora_B_weight

    def translate_keys(self, state: dict[str, Any], prefix: str) -> None:
        for unused in ("lora_A.weight", "lora_B.weight"):  # of layers that their forward doesn't use
            state.pop(prefix + unused, None)
        for which in ("", "prev_"):
            names = [f"{which}lora_A_weight", f"{which}lora_B_weight"]
            if all(prefix + name in state for name in names):
                a, b = (state.pop(prefix + name) for name in names)
                reduced = [_reduce_rank(head_a, head_b, self.lora_r) for head_a, head_b in zip(a, b, strict=True)]
                state |= {
                    f"{prefix}lora.{name}": torch.stack(parts)
                    for name, parts in zip(names, zip(*reduced, strict=True), strict=True)
                }


class DMPCompat(AuthorsLayer):
    """Their dmp layer's factors and keys."""

    lora_A: nn.ModuleList  # noqa: N815
    lora_B: nn.ModuleList  # noqa: N815

    def padded_factors(self) -> tuple[Tensor, Tensor]:
        """Copies of all heads' factors on the main weight's device."""
        device = self.main_weight.device
        a = [F.pad(w, (0, 0, 0, self.lora_r - w.shape[0])) for f in self.lora_A if isinstance(w := f.weight, Tensor)]
        b = [F.pad(w, (0, self.lora_r - w.shape[1])) for f in self.lora_B if isinstance(w := f.weight, Tensor)]
        return torch.stack([w.to(device) for w in a]), torch.stack([w.to(device) for w in b])

    def translate_keys(self, state: dict[str, Any], prefix: str) -> None:
        changes = state.pop(f"{prefix}prev_delta_weights", None)  # s B' A' of all heads, after the first merge
        for h, spec in enumerate(self.specs):
            state.pop(f"{prefix}layers.{h}.bias", None)
            names = [f"{prefix}lora_{which}.{h}" for which in "AB"]
            if not all(f"{name}.weight" in state for name in names):
                continue
            a, b = (state[f"{name}.weight"] for name in names)
            reference = (torch.zeros_like(a), torch.zeros_like(b))
            if changes is not None:
                reference = _factorize(changes[h].to(a) / spec.scaling, spec.rank)
            for key, pair in (("weight", (a, b)), ("reference", reference)):
                reduced = _reduce_rank(pair[0], pair[1], spec.rank)
                state |= {f"{name}.{key}": part for name, part in zip(names, reduced, strict=True)}


class ReplicaCompat(nn.Module):
    """Loads checkpoints of their replica layers, which hold copies only: the merged module gets the copies' mean."""

    main: nn.Module
    replicas: nn.ModuleList

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(f"{prefix}main.") for key in state_dict):
            for name in self.main.state_dict():
                copies = [state_dict.get(f"{prefix}replicas.{h}.{name}") for h in range(len(self.replicas))]
                known = [c for c in copies if isinstance(c, Tensor)]
                if len(known) == len(copies):
                    state_dict[f"{prefix}main.{name}"] = torch.empty_like(known[0])
                    set_to_mean([state_dict[f"{prefix}main.{name}"]], known)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class FactorView(NamedTuple):
    """One head's A or B in mode mhlora: `lora_A[h].weight`."""

    weight: Tensor


class MHLoRACompat(ModeLayer):
    """Their mhlora layer's lists of factors as views of the stacked factors, to read and to set. The stacked factors train."""

    lora: StackedFactors

    @property
    def lora_A(self) -> list[FactorView]:  # noqa: N802
        """`lora_A[h].weight` is the head's A (r x in), with its gradient."""
        return [FactorView(_view(self.lora.lora_A_weight, (h, slice(s.rank)))) for h, s in enumerate(self.specs)]

    @property
    def lora_B(self) -> list[FactorView]:  # noqa: N802
        """`lora_B[h].weight` is the head's B (out x r), with its gradient."""
        return [FactorView(_view(self.lora.lora_B_weight, (h, slice(None), slice(s.rank)))) for h, s in enumerate(self.specs)]


class _View(Tensor):
    """A part of a tensor; `view.data = value` writes into that tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.detach().copy_(value)


def _view(stacked: Tensor, part: tuple[int | slice, ...]) -> Tensor:
    view = stacked.detach()[part].as_subclass(_View)
    view.grad = None if stacked.grad is None else stacked.grad[part]
    return view


def _reduce_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the same product with rank min(out, in), to which this library cuts any higher rank."""
    if a.shape[0] <= rank or rank < min(b.shape[0], a.shape[1]):
        return a, b  # a rank that differs for another reason is left for load_state_dict to report
    return _factorize(b @ a, rank)


def _factorize(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of this rank whose product is nearest to `product`, and equal to it if its rank isn't higher (SVD)."""
    u, s, v = torch.linalg.svd(product.to(torch.promote_types(product.dtype, torch.float32)), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).to(product), (u[:, :rank] * root).to(product)
