"""LoRA-Muon: steps of one spectral norm for the product of two factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lte_ray.optim.groups import Scaling, check_pairs, check_range
from lte_ray.optim.muon import Muon, wide, width_ratio
from lte_ray.optim.orthogonalization import inverse_square_root, scale_to_one


class LoRAMuon(Muon):
    """LoRA-Muon (arXiv 2606.12921) for groups named "lora", Muon for "weight", AdamW for all others.

    A group named "lora" has the factors A (... x r x in) and B (... x out x r) of each weight in turn, and in "scalings" each
    product's s. The layer computes with W + s B A. Leading dimensions are those of stacked heads, each with its own product;
    the entry in "scalings" may then be a list of each head's s.

    With momenta M <- mu M + G of both factors, c = sqrt(max(1, out / in)), and L L^T = A A^T + damping::

        B <- B - lr c / (2 |s|) msign(M_B L^-T) L^-1
        A <- A - lr c / (2 |s|) T msign(T^T M_A),    T T^T = (B^T B + (t^2 + damping) (L L^T)^-1)^-1

    Then s B A changes by about lr c in the spectral norm, half of it through B and half through A, whatever the rank, s, and
    scale of A and B; (A, B) and (k A, B / k) change alike. While B is smaller than the steps themselves, the part through A
    is smaller.

    Both steps at once also change the product by s dB dA, which would be large where B is small. t = lr c / (2 |s| limit)
    bounds it: in coordinates where the rows of A are orthonormal, A changes by at most `limit` in the spectral norm, so the
    unwanted part is at most `limit` times the wanted part of B. Where B is zero, A doesn't change.

    msign(M R) R^T is the same for all R with R R^T = (A A^T)^-1, so Cholesky factors serve as well as the paper's inverse
    square roots. Everything that iterates is r x r, and batched over all weights of one rank.

    Momenta are stored, and steps computed, in float32 at least. A must not be zero.

    Args:
        params: parameter groups, as `build_optimizer` gets them. A group's own "lr" comes first.
        lr: rate of the groups that are orthogonalized: the spectral norm of a step of s B A whose `out` is at most `in`.
        momentum: mu.
        nesterov: whether to use G + mu M for M.
        damping: added to the diagonals of A A^T, and of B^T B where the rows of A are orthonormal, relative to the norm of
            each.
        limit: most that A changes in a step, relative to A.
        replica_lr: rate of AdamW, for all other groups.
        betas, eps: of AdamW.
        weight_decay: the part of a product or parameter, relative to the rate, that a step removes.

    Raises:
        ConfigError: the groups have no names, or factors and scalings don't fit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.05,
        *,
        momentum: float = 0.9,
        nesterov: bool = True,
        damping: float = 1e-3,
        limit: float = 0.05,
        replica_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        check_range("damping", damping, 0)
        check_range("limit", limit, 1e-6)
        super().__init__(
            params, lr, momentum=momentum, nesterov=nesterov, replica_lr=replica_lr, betas=betas, eps=eps,
            weight_decay=weight_decay, damping=damping, limit=limit,
        )  # fmt: skip

    def orthogonalizes(self, group: dict[str, Any]) -> bool:
        return group.get("name") in {"lora", "weight"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if param_group.get("name") == "lora":
            check_pairs(type(self).__name__, param_group)

    def step_orthogonalized(self, group: dict[str, Any]) -> None:
        if group.get("name") != "lora":
            super().step_orthogonalized(group)
            return
        factors, by_rank = group["params"], dict[Any, list[_Pairs]]()
        batches: dict[Any, list[tuple[Tensor, Tensor, Scaling]]] = {}
        for a, b, scaling in zip(factors[::2], factors[1::2], group["scalings"], strict=True):
            if a.grad is not None or b.grad is not None:
                key = (a.shape, b.shape, a.dtype, a.device, a.grad is None, b.grad is None)
                batches.setdefault(key, []).append((a, b, scaling))
        for pairs in batches.values():
            batch = self._gather(pairs, group)
            by_rank.setdefault((batch.a.shape[-2], batch.a.dtype, batch.a.device), []).append(batch)
        rate = float(group["lr"])
        if not rate:
            return
        decay = math.sqrt(1 - rate * group["weight_decay"])
        for same_rank in by_rank.values():
            for pairs_batch, (step_a, step_b) in zip(same_rank, _compute_steps(same_rank, group), strict=True):
                _apply(pairs_batch.parameters_a, step_a, decay)
                _apply(pairs_batch.parameters_b, step_b, decay)

    def _gather(self, pairs: Sequence[tuple[Tensor, Tensor, Scaling]], group: dict[str, Any]) -> _Pairs:
        """Updates the momenta of pairs of the same shapes, and stacks all."""
        all_a, all_b, scalings = (list(column) for column in zip(*pairs, strict=True))
        (r, in_features), out = all_a[0].shape[-2:], all_b[0].shape[-2]
        dtype, heads = wide(all_a[0].dtype), all_a[0].shape[:-2].numel()
        momenta_a = self.update_momentum(all_a, group) if all_a[0].grad is not None else None
        momenta_b = self.update_momentum(all_b, group) if all_b[0].grad is not None else None
        c = float(group["lr"]) * width_ratio(out, in_features) / 2
        each = [abs(s) for scaling in scalings for s in (scaling if isinstance(scaling, list) else [scaling] * heads)]
        return _Pairs(
            a=torch.stack(all_a).to(dtype).view(-1, r, in_features),
            b=torch.stack(all_b).to(dtype).view(-1, out, r),
            momentum_a=None if momenta_a is None else torch.stack(momenta_a).view(-1, r, in_features),
            momentum_b=None if momenta_b is None else torch.stack(momenta_b).view(-1, out, r),
            sizes=torch.tensor([c / s for s in each], dtype=dtype, device=all_a[0].device).view(-1, 1, 1),
            parameters_a=all_a,
            parameters_b=all_b,
        )


@dataclass
class _Pairs:
    """Factors of the same shapes, stacked (n x r x in, n x out x r), and what their steps are computed from.

    Attributes:
        momentum_a, momentum_b: None if the factor has no gradient.
        sizes: lr c / (2 |s|) of each (n x 1 x 1).
        parameters_a, parameters_b: that were stacked.
    """

    a: Tensor
    b: Tensor
    momentum_a: Tensor | None
    momentum_b: Tensor | None
    sizes: Tensor
    parameters_a: list[Tensor]
    parameters_b: list[Tensor]


def _compute_steps(batches: Sequence[_Pairs], group: dict[str, Any]) -> list[tuple[Tensor | None, Tensor | None]]:
    """The steps of A and B, to be subtracted, for pairs of one rank. What is r x r is computed for all batches at once."""
    counts = [len(batch.a) for batch in batches]
    sizes = torch.cat([batch.sizes for batch in batches])
    l_a = _cholesky(torch.cat([batch.a @ batch.a.mT for batch in batches]), group["damping"])
    whiten_b = _invert(l_a)
    # In coordinates where A's rows are orthonormal, B is B L and the bound t^2 (L L^T)^-1 is t^2 I.
    gram_b = l_a.mT @ torch.cat([batch.b.mT @ batch.b for batch in batches]) @ l_a
    whiten_a = l_a @ _invert(_cholesky(gram_b, group["damping"], (sizes / group["limit"]).square())).mT
    parts = list(zip(batches, torch.split(whiten_a, counts), torch.split(whiten_b, counts), strict=True))
    x_a = [None if p.momentum_a is None else scale_to_one(w.mT @ p.momentum_a) for p, w, _ in parts]
    x_b = [None if p.momentum_b is None else scale_to_one(p.momentum_b @ w.mT) for p, _, w in parts]
    grams = [x @ x.mT for x in x_a if x is not None] + [x.mT @ x for x in x_b if x is not None]
    roots = iter(torch.split(inverse_square_root(torch.cat(grams)), [len(g) for g in grams]))
    steps_a = [None if x is None else w @ (next(roots) @ x) * p.sizes for x, (p, w, _) in zip(x_a, parts, strict=True)]
    steps_b = [None if x is None else (x @ next(roots)) @ w * p.sizes for x, (p, _, w) in zip(x_b, parts, strict=True)]
    return list(zip(steps_a, steps_b, strict=True))


def _cholesky(gram: Tensor, damping: float, added: Tensor | None = None) -> Tensor:
    """The Cholesky factors of Gram matrices K (n x r x r) with `damping` times the norm of K, and `added`, on the diagonal."""
    limits = torch.finfo(gram.dtype)
    shift = torch.linalg.matrix_norm(gram) * max(damping, limits.eps * gram.shape[-1]) + limits.tiny
    gram.diagonal(dim1=-2, dim2=-1).add_((shift if added is None else shift + added.view(-1)).unsqueeze(-1))
    factors: Tensor = torch.linalg.cholesky_ex(gram).L
    return factors


def _invert(lower: Tensor) -> Tensor:
    """The inverses of lower triangular matrices (n x r x r)."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
    return inverse


def _apply(parameters: list[Tensor], steps: Tensor | None, decay: float) -> None:
    """p <- decay p - step / decay: a product of two such factors decays by decay^2, and changes as without decay."""
    if steps is None:
        return
    if decay != 1.0:
        torch._foreach_mul_(parameters, decay)
    shaped = steps.view(len(parameters), *parameters[0].shape)
    torch._foreach_sub_(parameters, list(shaped.unbind()), alpha=1 / decay)
