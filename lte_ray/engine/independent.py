"""Independent adapters (``--never-merge``): the weights W_0 + s B A of each head, and their evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lte_ray.layout import Plan
from lte_ray.merging.low_rank import Share, add_contributions


def head_weights(plan: Plan, base: Tensor, factors: Tensor | None) -> Tensor:
    """Returns W_0 + s B A of one head, flat in the base layout.

    Args:
        plan: the head's, which trains nothing but factors.
        base: W_0, flat in the base layout.
        factors: the head's, flat; None where B = 0. Then `base` itself is returned.
    """
    if factors is None:
        return base
    weights = base.clone()
    add_contributions(weights, [Share(1.0, plan, factors.to(weights.dtype), None)])
    return weights


def evaluate_heads(
    plans: Sequence[Plan], base: Tensor, adapters: Mapping[int, Tensor], evaluate: Callable[[Tensor], Mapping[str, float]]
) -> dict[str, float]:
    """Evaluates each head.

    Args:
        plans: each head's.
        base: W_0, flat in the base layout.
        adapters: the factors of the heads that have contributed, flat; B = 0 in all others.
        evaluate: returns figures of weights, flat in the base layout.

    Returns:
        The means over the heads under the figures' own names; and each head's as ``head_0_loss``. Before any head has
        contributed, all are equal, and only the former.
    """
    untrained = evaluate(base) if len(adapters) < len(plans) else {}
    if not adapters:
        return dict(untrained)
    by_head = [
        evaluate(head_weights(plan, base, adapters[head])) if head in adapters else untrained for head, plan in enumerate(plans)
    ]
    names = dict.fromkeys(name for values in by_head for name in values)
    figures = {name: [values[name] for values in by_head if name in values] for name in names}
    means = {name: sum(values) / len(values) for name, values in figures.items()}
    return means | {f"head_{head}_{name}": value for head, values in enumerate(by_head) for name, value in values.items()}
