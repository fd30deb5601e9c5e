"""The change that a head, or all heads on average, made: low-rank factors of weights, and values of all other tensors.

In reset-less LTE the average telescopes. Each merge adds w_n s_n (B_n A_n - B'_n A'_n) of each head n, and B_n, A_n become the
next reference. With constant weights w_n, the merges sum up to

    W_v - W_0 = sum_n w_n s_n B'_n A'_n

with the references at version v: a product of rank sum_n r_n. This is verified against W_v - W_0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lte_ray.export.run_reader import SavedRun
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_matrix, base_replicas, factor_views, replica_views, views

Term = tuple[float, Tensor, Tensor]
"""c, B (out x r), A (r x in), representing c B A."""


def concatenate_terms(terms: list[Term]) -> tuple[Tensor, Tensor]:
    """Returns (B, A) with B A = sum_k c_k B_k A_k, of rank sum_k r_k."""
    return torch.cat([c * b for c, b, _ in terms], dim=1), torch.cat([a for _, _, a in terms])


def dense_factors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (B, A) with B A = the matrix (out x in), of rank min(out, in): the matrix and an identity."""
    out, inner = matrix.shape
    if inner <= out:
        return matrix, torch.eye(inner, dtype=matrix.dtype, device=matrix.device)
    return torch.eye(out, dtype=matrix.dtype, device=matrix.device), matrix


class LowRankFit:
    """Chooses the smallest factors of each matrix, and accumulates their error."""

    def __init__(self) -> None:
        self.exact, self._squared_error, self._squared_norm = True, 0.0, 0.0

    @property
    def error(self) -> float:
        return math.sqrt(self._squared_error / self._squared_norm) if self._squared_norm else 0.0

    def add(self, delta: Tensor, b: Tensor, a: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
        """Returns B and A if their rank is at most min(out, in) and `rank`.

        Otherwise returns factors of the change itself or, by SVD, of its best approximation of `rank`.
        """
        full = min(delta.shape)
        limit = full if rank is None else min(rank, full)
        if a.shape[0] > full and limit == full:
            b, a = dense_factors(delta.to(b.dtype))
        elif a.shape[0] > limit:
            u, sigma, v = torch.linalg.svd(delta, full_matrices=False)
            root = sigma[:limit].sqrt()
            b, a = (u[:, :limit] * root).to(b.dtype), (root[:, None] * v[:limit]).to(a.dtype)
            self.exact = False
        self._squared_error += float(torch.linalg.vector_norm(delta - b.double() @ a.double())) ** 2
        self._squared_norm += float(torch.linalg.vector_norm(delta)) ** 2
        return b, a


@dataclass
class ModelDelta:
    """The change of a model from `start` to `final` (both flat, in the base layout).

    Attributes:
        start: the parameters before the change.
        final: the parameters after the change.
        factors: B, A of each changed matrix, so that W_start + B A = W_final, exactly or approximately.
        buffers: changed buffers that aren't merged.
        exact: whether B A equals the change up to rounding, without an approximation of lower rank.
        error: ||W_final - W_start - B A|| / ||W_final - W_start||, Frobenius, over all matrices.
        not_a_sum: why the change isn't the sum of the heads' low-rank changes, if it isn't.
    """

    start: Tensor
    final: Tensor
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = True
    error: float = 0.0
    not_a_sum: str = ""


def matrix_weights(adapted: tuple[Adapted, ...]) -> list[Adapted]:
    """Returns the adapted weights that are matrices; changes of vectors (norms, biases) are exported as values."""
    return [spec for spec in adapted if len(spec.shape) > 1]


@torch.no_grad()
def head_delta(saved: SavedRun, head: int, rank: int | None = None) -> ModelDelta:
    """Returns a head's change beyond the merged weights: s (B A - B' A') and its own replicas.

    The change is exactly zero if all that the head has trained is merged. `final` is the head's W_v + s (B A - B' A'). If heads
    never merge, the change is s B A, and `final` is W_0 + s B A.

    Args:
        saved: the run at a checkpoint.
        head: the head's number.
        rank: the largest rank of a weight's change; by default the exact rank, at most 2 r.

    Raises:
        ConfigError, StorageError: as `SavedRun.head`.
    """
    tensors = saved.head(head)
    plan, change = saved.plans[head], ModelDelta(saved.base, saved.base.clone())
    final = views(plan.base, change.final)
    in_base = tensors.get("reference") if not saved.never_merged else None
    reference = {} if in_base is None else factor_views(plan, in_base)
    fit = LowRankFit()
    for spec in plan.adapted:
        terms = _head_terms(spec, tensors, reference, saved.base.dtype)
        if not terms:
            continue
        b, a = concatenate_terms(terms)
        delta = b.double() @ a.double()
        as_matrix(spec, final[spec.name]).add_(delta)
        if len(spec.shape) > 1:
            change.factors[spec.name] = fit.add(delta, b, a, rank)
    for name, value in replica_views(plan, base_replicas(plan, change.final)).items():
        if f"ahead.{name}" in tensors:  # the version was merged while the head continued to train
            value.add_(tensors[f"ahead.{name}"])
        else:
            value.copy_(tensors[f"replica.{name}"])
    initial = dict(saved.model.named_buffers())
    for name, value in tensors.items():
        buffer = name.removeprefix("buffer.")
        if buffer != name and buffer in initial and not torch.equal(initial[buffer], value):
            change.buffers[buffer] = value
    change.exact, change.error = fit.exact, fit.error
    return change


@torch.no_grad()
def average_delta(saved: SavedRun, rank: int | None = None) -> ModelDelta:
    """Returns the change of the main weights since the start, W_v - W_0, from the heads' references if the sum telescopes.

    If it doesn't, or if the summed rank is above min(out, in), uses W_v - W_0 itself, times the identity.

    Args:
        saved: the run at a checkpoint.
        rank: the largest rank of a weight's change; by default that of the exact change.
    """
    start, final = views(saved.plan.base, saved.initial), views(saved.plan.base, saved.base)
    terms = _reference_terms(saved)
    change, fit = ModelDelta(saved.initial, saved.base), LowRankFit()
    mismatched = {}
    for spec in matrix_weights(saved.plan.adapted):
        w0, w = as_matrix(spec, start[spec.name]), as_matrix(spec, final[spec.name])
        delta = w.double() - w0.double()
        if not delta.any():
            continue
        mismatch = _relative_mismatch(delta, w0, w, terms[spec.name], saved.manifest.version)
        if mismatch:
            mismatched[spec.name] = mismatch
        b, a = dense_factors(delta.to(w.dtype)) if mismatch else concatenate_terms(terms[spec.name])
        change.factors[spec.name] = fit.add(delta, b, a, rank)
    change.exact, change.error = fit.exact, fit.error
    change.not_a_sum = _explain(saved, mismatched) if mismatched else ""
    return change


def _reference_terms(saved: SavedRun) -> dict[str, list[Term]]:
    """Returns w_n s_n B'_n A'_n of all heads, for each weight; w_n = 1/N."""
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
    """Returns the relative error of the terms' sum as W_v - W_0; 0 if the rounding in merges explains it.

    A merge rounds each element of W, so v merges drift by about sqrt(v) eps ||W||. The rounding of products is relative to
    their own size.
    """
    if not terms:
        return 1.0
    b, a = concatenate_terms(terms)
    distance = float(torch.linalg.vector_norm(delta - b.double() @ a.double()))
    products = sum(c * float(torch.linalg.vector_norm(b)) * float(torch.linalg.vector_norm(a)) for c, b, a in terms)
    size = float(torch.linalg.vector_norm(w)) + float(torch.linalg.vector_norm(w0)) + products
    if distance <= 4 * torch.finfo(w.dtype).eps * math.sqrt(version + 1) * size:
        return 0.0
    return distance / float(torch.linalg.vector_norm(delta))


def _head_terms(spec: Adapted, tensors: dict[str, Tensor], reference: dict[str, Tensor], dtype: torch.dtype) -> list[Term]:
    a, b = tensors[f"factor.{spec.a_name}"].to(dtype), tensors[f"factor.{spec.b_name}"].to(dtype)
    if not reference:
        return [(spec.scaling, b, a)] if b.any() else []
    if torch.equal(a, reference[spec.a_name]) and torch.equal(b, reference[spec.b_name]):
        return []
    return [(spec.scaling, b, a), (-spec.scaling, reference[spec.b_name], reference[spec.a_name])]


def _explain(saved: SavedRun, mismatched: dict[str, float]) -> str:
    """Says why the change isn't the sum of the heads' changes."""
    worst = max(mismatched, key=lambda name: mismatched[name])
    missing = sorted(set(range(len(saved.plans))) - set(saved.manifest.heads))
    reset = saved.record.get("reset", "none")
    if saved.is_ema:
        why = "it is a moving average of the weights of several versions"
    elif missing:
        why = f"heads {missing} have no state in this checkpoint"
    elif reset != "none":
        why = f"the run was made with --reset {reset}"
    else:
        why = (
            f"--policy {saved.record.get('policy')} gave the heads' changes other weights than 1/N, or the worker builds "
            "another initial model than for the run"
        )
    return f"{why}: {len(mismatched)} weight(s) differ from the sum, most {worst} (by {mismatched[worst]:.1%} of its change)"
