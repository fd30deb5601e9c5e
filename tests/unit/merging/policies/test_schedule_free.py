"""Schedule-free averaging, compared with its formulas on whole iterates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lte_ray.errors import ConfigError
from lte_ray.merging import ScheduleFree
from tests.support.numerics import assert_near
from tests.support.plans import random_flat
from tests.support.policies import PLAN, Executor, dense_changes, make_pending, make_roster

NEAR = 1e-13
"""Some ten float64 operations an element over a few merges."""

REPLICAS = 5
"""Elements of the base's replicas, its last."""


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("resumes", [False, True])
def test_the_base_is_y_and_at_the_end_the_mean_of_all_z(beta: float, resumes: bool) -> None:
    """Also where a run that has ended is continued with more steps, by another process."""
    policy = ScheduleFree(lr=1.5, beta=beta, replica_lr=0.5)
    z = random_flat(PLAN.base.size, 1)
    executor, iterates, rates = Executor(z.clone()), [], torch.full_like(z, 1.5)
    rates[-REPLICAS:] = 0.5
    for version in range(8):
        pending = make_pending(2, seed=version)
        z = z + rates * dense_changes(pending).sum(dim=0) / 2
        iterates.append(z)
        x = torch.stack(iterates).mean(dim=0)
        ends = version == 7 or (resumes and version == 3)
        progress = 1.0 if ends else (version + 1) / (4 if resumes and version < 3 else 8)
        executor.execute(policy.merge(pending, make_roster(2, version=version, progress=progress)), pending)
        assert_near(executor.base, x if ends else (1 - beta) * z + beta * x, NEAR)
        state, policy = policy.state(), ScheduleFree(lr=1.5, beta=beta, replica_lr=0.5)
        policy.load_state(state)
    assert executor.momentum is not None
    assert_near(executor.momentum, z - x, NEAR)


def test_the_first_merge_needs_no_momentum() -> None:
    """z and x are the same then: the base moves by lr D."""
    step = ScheduleFree(lr=1.5).merge(make_pending(2), make_roster(2, version=0)).step
    assert step is not None
    assert not step.uses_momentum


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ScheduleFree(lr=0.0), "--policy.lr is 0.0, but it must be above 0 and finite."),
        (lambda: ScheduleFree(beta=1.5), "--policy.beta is 1.5, but it must be at least 0 and at most 1."),
        (lambda: ScheduleFree(replica_lr=-1.0), "--policy.replica-lr is -1.0, but it must be above 0 and finite."),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    """The error names the flag, the value and the range."""
    with pytest.raises(ConfigError) as raised:
        make()
    assert str(raised.value) == says
