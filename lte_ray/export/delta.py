"""What a head, or all of them on average, have changed: as low-rank factors of the weights, and as values of the rest.

In reset-less LTE the average telescopes. Every merge adds w_n s_n (B_n A_n - B'_n A'_n) of each head n, and B_n, A_n are
the next reference. With constant weights w_n the merges sum up to

    W_v - W_0 = sum_n w_n s_n B'_n A'_n

with the references at version v: a product of rank sum_n r_n. Whether it holds is checked against W_v - W_0.

Sums of low-rank products as one product, of the smallest rank that holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lte_ray.errors import UserError
from lte_ray.export.run_reader import SavedRun
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_matrix, base_replicas, factor_views, replica_views, views

Term = tuple[float, Tensor, Tensor]
"""c, B (out x r), A (r x in), for c B A."""


def concatenate_terms(terms: list[Term]) -> tuple[Tensor, Tensor]:
    """(B, A) with B A = sum_k c_k B_k A_k, of rank sum_k r_k."""
    return torch.cat([c * b for c, b, _ in terms], dim=1), torch.cat([a for _, _, a in terms])


def dense_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) with B A = the matrix (out x in), of rank min(out, in): itself and the identity."""
    out, inner = matrix.shape
    if inner <= out:
        return matrix, torch.eye(inner, dtype=matrix.dtype, device=matrix.device)
    return torch.eye(out, dtype=matrix.dtype, device=matrix.device), matrix


class LowRankFit:
    """Picks the smallest factors of each matrix, and adds up their error."""

    def __init__(self) -> None:
        self.exact, self._squared_error, self._squared_norm = True, 0.0, 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def add(self, delta: Tensor, b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """B and A if their rank is within min(out, in) and `rank`; else the best of `rank`, by SVD, or the change itself."""
        full = min(delta.shape)
        most = full if rank is None else min(rank, full)
        if a.shape[0] > full and most == full:
            b, a = dense_factors(delta.to(b.dtype))
        elif a.shape[0] > most:
            u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
            root = sigma[:most].sqrt()
            b, a = (u[:, :most] * root).to(b.dtype), (root[:, None] * v[:most]).to(a.dtype)
            self.exact = False
        self._squared_error += float(torch.linalg.vector_norm(delta - b.double() @ a.double())) ** 2
        self._squared_norm += float(torch.linalg.vector_norm(delta)) ** 2
        return b, a


@dataclass
class ModelDelta:
    """A change of a model from `start` to `final` (both flat, in the base layout).

    Attributes:
        factors: B, A of each changed matrix, so that W_start + B A = W_final, exactly or nearly.
        buffers: buffers that aren't merged and have changed.
        exact: whether B A is the change but for rounding, not an approximation of lower rank.
        error: ||W_final - W_start - B A|| / ||W_final - W_start||, Frobenius, over all matrices.
    """

    start: Tensor
    final: Tensor
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = True
    error: float = 0.0


def matrix_weights(plan_adapted: tuple[Adapted, ...]) -> list[Adapted]:
    """The adapted weights that are matrices; vectors (norms, biases) are given as values."""
    return [spec for spec in plan_adapted if len(spec.shape) > 1]


@torch.no_grad()
def head_delta(saved: SavedRun, head: int, rank: int | None = None) -> ModelDelta:
    """What head n computes with beyond the merged weights: s_n (B_n A_n - B'_n A'_n) and its own replicas.

    It is zero, exactly, where all that the head has trained is merged. `final` is the head's W_v + s (B A - B' A').

    Args:
        rank: the largest that a weight may have; by default what is exact, at most 2 r.

    Raises:
        ConfigError, StorageError: as `Saved.head`.
    """
    tensors = saved.head(head)
    plan, change = saved.plans[head], ModelDelta(saved.base, saved.base.clone())
    final = views(plan.base, change.final)
    reference = factor_views(plan, tensors["reference"]) if "reference" in tensors else {}
    tally = LowRankFit()
    for spec in plan.adapted:
        terms = _head_terms(spec, tensors, reference, saved.base.dtype)
        if not terms:
            continue
        b, a = concatenate_terms(terms)
        delta = b.double() @ a.double()
        as_matrix(spec, final[spec.name]).add_(delta)
        if len(spec.shape) > 1:
            change.factors[spec.name] = tally.add(delta, b, a, rank)
    for name, value in replica_views(plan, base_replicas(plan, change.final)).items():
        if f"ahead.{name}" in tensors:  # where the version was merged while the head trained on
            value.add_(tensors[f"ahead.{name}"])
        else:
            value.copy_(tensors[f"replica.{name}"])
    built = dict(saved.model.named_buffers())
    for name, value in tensors.items():
        own = name.removeprefix("buffer.")
        if own != name and own in built and not torch.equal(built[own], value):
            change.buffers[own] = value
    change.exact, change.error = tally.exact, tally.error
    return change


@torch.no_grad()
def average_delta(saved: SavedRun, rank: int | None = None) -> ModelDelta:
    """The change of the main weights since the start, W_v - W_0, from the heads' references where the sum telescopes.

    Where it doesn't, the best approximation of `rank` is taken. Where the summed rank is above min(out, in), W_v - W_0
    itself is taken, times the identity.

    Args:
        rank: the largest that a weight may have; by default what is exact.

    Raises:
        UserError: the sum doesn't telescope, and no rank is given.
    """
    start, final = views(saved.plan.base, saved.initial), views(saved.plan.base, saved.base)
    terms = _reference_terms(saved)
    change, tally = ModelDelta(saved.initial, saved.base), LowRankFit()
    departing = {}
    for spec in matrix_weights(saved.plan.adapted):
        w0, w = as_matrix(spec, start[spec.name]), as_matrix(spec, final[spec.name])
        delta = w.double() - w0.double()
        if not delta.any():
            continue
        difference = _relative_mismatch(delta, w0, w, terms[spec.name], saved.manifest.version)
        if difference and rank is None:
            departing[spec.name] = difference
            continue
        b, a = dense_factors(delta.to(w.dtype)) if difference else concatenate_terms(terms[spec.name])
        change.factors[spec.name] = tally.add(delta, b, a, rank)
    if departing:
        raise UserError(_mismatch_message(saved, departing))
    change.exact, change.error = tally.exact, tally.error
    return change


def _reference_terms(saved: SavedRun) -> dict[str, list[Term]]:
    """w_n s_n B'_n A'_n of all heads, for each weight; w_n = 1/N."""
    terms: dict[str, list[Term]] = {spec.name: [] for spec in saved.plan.adapted}
    for head in saved.manifest.heads:
        reference, plan = saved.head(head).get("reference"), saved.plans[head]
        if reference is None:
            continue
        parts = factor_views(plan, reference)
        for spec in plan.adapted:
            terms[spec.name].append((spec.scaling / len(saved.plans), parts[spec.b_name], parts[spec.a_name]))
    return terms


def _relative_mismatch(delta: Tensor, w0: Tensor, w: Tensor, terms: list[Term], version: int) -> float:
    """How far the sum of the terms is from W_v - W_0, relative; 0 if no further than merging's rounding explains.

    A merge rounds each element of W, so v merges drift by about sqrt(v) eps ||W||. Products are rounded by their own size.
    """
    if not terms:
        return 1.0
    b, a = concatenate_terms(terms)
    apart = float(torch.linalg.vector_norm(delta - b.double() @ a.double()))
    products = sum(c * float(torch.linalg.vector_norm(b)) * float(torch.linalg.vector_norm(a)) for c, b, a in terms)
    size = float(torch.linalg.vector_norm(w)) + float(torch.linalg.vector_norm(w0)) + products
    if apart <= 4 * torch.finfo(w.dtype).eps * math.sqrt(version + 1) * size:
        return 0.0
    return apart / float(torch.linalg.vector_norm(delta))


def _head_terms(spec: Adapted, tensors: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype) -> list[Term]:
    a, b = tensors[f"factor.{spec.a_name}"].to(dtype), tensors[f"factor.{spec.b_name}"].to(dtype)
    if not reference:
        return [(spec.scaling, b, a)] if b.any() else []
    if torch.equal(a, reference[spec.a_name]) and torch.equal(b, reference[spec.b_name]):
        return []
    return [(spec.scaling, b, a), (-spec.scaling, reference[spec.b_name], reference[spec.a_name])]


def _mismatch_message(saved: SavedRun, departing: dict[str, float]) -> str:
    worst = max(departing, key=lambda name: departing[name])
    missing = sorted(set(range(len(saved.plans))) - set(saved.manifest.heads))
    reset = saved.record.get("reset", "none")
    if missing:
        why = f"since heads {missing} have no state in this checkpoint"
    elif reset != "none":
        why = f"since the run was made with --reset {reset}"
    else:
        why = (
            "as it is only where a policy weighs each head by 1/N throughout and the worker builds the same initial model again"
        )
    return (
        f"The change since the start isn't the sum of what the heads hold at version {saved.manifest.version}, {why}: they "
        f"differ in {len(departing)} weight(s), most in {worst} (by {departing[worst]:.1%} of its change). Give --rank R for "
        "the best adapter of rank R, whose error is reported, or export the whole weights: --to safetensors or pretrained."
    )
