"""The arithmetic of LTE on low-rank products, as pure functions of tensors (arXiv 2402.16828).

The products B A are averaged, never A and B separately: mean(B) mean(A) has cross terms and is a different matrix. Norms and
scalar products of changes come from their factors, without the dense change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.layout import Adapted, Plan
from lte_ray.merging.flat_buffer import as_matrix, as_stored, base_replicas, factor_views, factors_part, replica_part, views

MAX_INNER_SIZE = 2048
"""Largest inner size of one matrix product. More terms are added in several products, so that concatenating their factors needs
bounded memory."""


def add_products(weight: Tensor, terms: Sequence[tuple[float, Tensor, Tensor]]) -> None:
    """weight += sum_k c_k B_k A_k, in place, as one matrix product of inner size sum_k r_k; several above `MAX_INNER_SIZE`.

    Args:
        weight: (out, in).
        terms: (c, B (out, r), A (r, in)) each; the ranks r may differ.
    """
    tall = weight.shape[0] > weight.shape[1]  # scale the smaller of B and A by c
    left: list[Tensor] = []
    right: list[Tensor] = []
    inner = 0
    for c, b, a in terms:
        if left and inner + b.shape[1] > MAX_INNER_SIZE:
            weight.addmm_(torch.cat(left, dim=1), torch.cat(right))
            left, right, inner = [], [], 0
        left.append(b if tall or c == 1.0 else c * b)
        right.append(c * a if tall and c != 1.0 else a)
        inner += b.shape[1]
    if left:
        weight.addmm_(torch.cat(left, dim=1), torch.cat(right))


def fold_reference(spec: Adapted, weight: Tensor, base: Tensor, b: Tensor, a: Tensor) -> None:
    """weight := W - s B' A': subtracts from a head's copy what the base W already contains of this head.

    Computes in the base's type; `weight` may have another, and is rounded once. Both are in the stored shape.
    """
    if weight.dtype == base.dtype and weight.is_contiguous():
        weight.copy_(base)
        as_matrix(spec, weight).addmm_(b, a, alpha=-spec.scaling)
    else:
        weight.copy_(as_stored(spec, torch.addmm(as_matrix(spec, base), b, a, alpha=-spec.scaling)))


@dataclass(frozen=True)
class Share:
    """One contribution in a merge.

    Attributes:
        weight: w, the change's weight (1/N in the paper's average).
        plan: the head's plan; ranks may differ between heads.
        contribution: flat, in the plan's contribution layout.
        reference: the factors (A', B') that the base already contains of this head, flat; None if B' = 0.
    """

    weight: float
    plan: Plan
    contribution: Tensor
    reference: Tensor | None


def add_contributions(base: Tensor, shares: Sequence[Share]) -> None:
    """W += sum_n w_n s_n (B_n A_n - B'_n A'_n), p += sum_n w_n (p_n - p'_n), in place on a flat base (LTE, eq. 7; reset-less).

    Deterministic: adds the terms in the order of `shares`, whose plans have the same base layout.
    """
    if not shares:
        return
    weights = views(shares[0].plan.base, base)
    for adapted, terms in zip(shares[0].plan.adapted, weighted_products(shares), strict=True):
        add_products(as_matrix(adapted, weights[adapted.name]), terms)
    add_replica_changes(base_replicas(shares[0].plan, base), shares)


def weighted_products(shares: Sequence[Share]) -> Iterator[list[tuple[float, Tensor, Tensor]]]:
    """Yields, for each adapted weight in the plan's order, the terms (c, B, A) of sum_n w_n s_n (B_n A_n - B'_n A'_n)."""
    parts = [views(share.plan.contribution, share.contribution) for share in shares]
    references = [None if s.reference is None else factor_views(s.plan, s.reference) for s in shares]
    for index in range(len(shares[0].plan.adapted)):
        terms = []
        for share, new, old in zip(shares, parts, references, strict=True):
            spec = share.plan.adapted[index]
            terms.append((share.weight * spec.scaling, new[spec.b_name], new[spec.a_name]))
            if old is not None:
                terms.append((-share.weight * spec.scaling, old[spec.b_name], old[spec.a_name]))
        yield terms


def add_replica_changes(replicas: Tensor, shares: Sequence[Share]) -> None:
    """p += sum_n w_n (p_n - p'_n), in place on the flat replicas of a base (`base_replicas`)."""
    for share in shares:
        replicas.add_(replica_part(share.plan, share.contribution), alpha=share.weight)


def dense_change(share: Share) -> Tensor:
    """Returns the change of one contribution as a new dense tensor, flat in the base layout."""
    change = share.contribution.new_zeros(share.plan.base.size)
    add_contributions(change, [share])
    return change


def dense_part(share: Share, name: str) -> Tensor:
    """Returns the change of one entry of the base layout as a new dense tensor in the stored shape.

    Raises:
        KeyError: the base has no such entry.
    """
    part = views(share.plan.contribution, share.contribution)
    for spec in share.plan.adapted:
        if spec.name == name:
            change = torch.mm(part[spec.b_name], part[spec.a_name]).mul_(spec.scaling)
            if share.reference is not None:
                old = factor_views(share.plan, share.reference)
                change.addmm_(old[spec.b_name], old[spec.a_name], alpha=-spec.scaling)
            return as_stored(spec, change)
    return part[name].clone()


def squared_norm(share: Share) -> float:
    """Returns the sum of squares of the entire change, from r x r products of the factors: |B A|^2 = <B^T B, A A^T>."""
    total = replica_part(share.plan, share.contribution).double().square().sum()
    return max(0.0, float(total + squared_norms(share).sum()))


def squared_norms(share: Share) -> Tensor:
    """Returns the sum of squares of the change of each adapted weight, in the order of the plan: (k,), float64."""
    part = views(share.plan.contribution, share.contribution)
    old = None if share.reference is None else factor_views(share.plan, share.reference)
    norms = []
    for spec in share.plan.adapted:
        b, a = [part[spec.b_name].double()], [part[spec.a_name].double()]
        if old is not None:
            b, a = [*b, -old[spec.b_name].double()], [*a, old[spec.a_name].double()]
        left, right = torch.cat(b, dim=1), torch.cat(a)
        norms.append(spec.scaling**2 * ((left.t() @ left) * (right @ right.t())).sum())
    return torch.stack(norms) if norms else share.contribution.new_zeros(0, dtype=torch.float64)


def new_reference(share: Share, reset: str) -> Tensor | None:
    """Returns the reference after a merge: a copy of the contributed factors, or None if B is reset to zero."""
    return None if reset == "B" else factors_part(share.plan, share.contribution).clone()


def gram_matrix(shares: Sequence[Share]) -> Tensor:
    """Returns G_ij = <D_i, D_j> of the unweighted changes D = s (B A - B' A') and replica changes: (k, k), float64.

    Needs no dense change: <B_i A_i, B_j A_j> is the sum of the elements of (B_i^T B_j) * (A_i A_j^T), r x r. Costs two products
    per layer, of R x out x R and R x in x R with R the sum of all ranks.
    """
    parts = [views(share.plan.contribution, share.contribution) for share in shares]
    references = [None if s.reference is None else factor_views(s.plan, s.reference) for s in shares]
    replicas = torch.stack([replica_part(share.plan, share.contribution) for share in shares]).double()
    total = replicas @ replicas.t()
    for index in range(len(shares[0].plan.adapted)):
        left, right, owners = [], [], []
        for owner, (share, new, old) in enumerate(zip(shares, parts, references, strict=True)):
            spec = share.plan.adapted[index]
            for sign, factors in ((1.0, new), (-1.0, old)):
                if factors is not None:
                    left.append(factors[spec.b_name].double() * (sign * spec.scaling))
                    right.append(factors[spec.a_name].double())
                    owners += [owner] * spec.rank
        b, a = torch.cat(left, dim=1), torch.cat(right)
        membership = torch.nn.functional.one_hot(torch.tensor(owners, device=b.device), len(shares)).double()
        total += membership.t() @ ((b.t() @ b) * (a @ a.t())) @ membership
    return total


def squared_distances(shares: Sequence[Share]) -> Tensor:
    """Returns |D_i - D_j|^2: (k, k), float64, never below 0."""
    products = gram_matrix(shares)
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_(min=0)
