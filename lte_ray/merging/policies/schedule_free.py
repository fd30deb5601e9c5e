"""Schedule-free averaging as outer optimizer: heads train near the newest iterate, and the run ends with the mean of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lte_ray.merging.policies.weighted import average_weights
from lte_ray.merging.policy import Merge, Pending, Roster
from lte_ray.merging.policy_args import check_range
from lte_ray.messages import OuterStep, StepCoefficients


class ScheduleFree:
    """z := z + lr D, x := mean of all z; the base is y = (1 - beta) z + beta x, and x after the last merge (arXiv 2405.15682).

    D = 1/N sum of the merge's changes. As an outer optimizer: arXiv 2509.10439, which found it the one that suffers least from
    many local steps between merges, with the defaults here. It needs no decay of lr: the mean does its work. The merge with the
    run's last steps sets the base to x; before that, evaluations see y. Needs one more tensor as large as the base.

    As an outer step with m = z - x, where c = 1 / (v + 1) is the weight of the newest z in x after v merges, and beta' is beta,
    or 1 in the last merge: m := (1 - c) (m + lr D), and W := W + lr D + beta m_before - beta' m.

    Args:
        lr: outer learning rate.
        beta: weight of the mean in what heads train on.
        replica_lr: outer learning rate of the replica parameters; None: lr.
    """

    def __init__(self, *, lr: float = 2.0, beta: float = 0.2, replica_lr: float | None = None) -> None:
        check_range("lr", lr, 0, above=True)
        check_range("replica_lr", 1.0 if replica_lr is None else replica_lr, 0, above=True)
        check_range("beta", beta, 0, 1)
        self.lr, self.beta, self.replica_lr = lr, beta, replica_lr
        self._at_mean = False  # whether the base is x: the run had ended, and continues with more steps

    def merge(self, pending: Sequence[Pending], roster: Roster) -> Merge:
        before = 1.0 if self._at_mean else self.beta
        self._at_mean = roster.progress >= 1
        after = 1.0 if self._at_mean else self.beta
        kept = roster.version / (roster.version + 1)  # 1 - c

        def coefficients(lr: float) -> StepCoefficients:
            if not kept:  # z and x are the initial base, and then both the first z
                return StepCoefficients(change=lr)
            return StepCoefficients(keep=kept, add=kept * lr, change=lr * (1 - before), momentum=before / kept - after)

        step = OuterStep(coefficients(self.lr), coefficients(self.lr if self.replica_lr is None else self.replica_lr))
        return Merge(average_weights(pending, roster), step)

    def state(self) -> dict[str, Tensor]:
        return {"at_mean": torch.tensor(1)} if self._at_mean else {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self._at_mean = "at_mean" in tensors
