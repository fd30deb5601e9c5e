"""MergeCondition: when it merges and what it calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lte_ray.errors import ConfigError
from lte_ray.misc.merge import MergeCondition


class Layer(nn.Module):
    """Counts its merges; fails if gradients are enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.merges = 0
        self.child = nn.Linear(2, 2)

    def merge_parameters(self) -> None:
        assert not torch.is_grad_enabled()
        self.merges += 1


@pytest.mark.parametrize("merge_steps", [1, 2, 3])
def test_it_merges_every_merge_steps_steps(merge_steps: int) -> None:
    """peek tells what step will do, step returns what it did, and the layer was merged accordingly."""
    layer = Layer()
    condition = MergeCondition(nn.Sequential(nn.ReLU(), layer), merge_steps)
    for clock in range(1, 8):
        due = clock % merge_steps == 0
        assert condition.peek() == condition.peek() == due
        assert condition.step() == due
        assert condition.clock == clock
        assert layer.merges == clock // merge_steps


def test_the_condition_can_be_replaced() -> None:
    """cond_fn decides and merges, as step_condition does; reset_opt exists."""
    layer = Layer()
    condition = MergeCondition(layer, 2)
    assert condition.reset_opt
    condition.cond_fn = lambda: condition.clock == 3
    assert [condition.step() for _ in range(4)] == [False, False, True, False]
    assert layer.merges == 0
    assert condition.step_condition()
    assert layer.merges == 1


def test_each_module_merges_once() -> None:
    """A layer at two places, one inside a container, and a `merge_parameters` that isn't callable."""
    shared, inner = Layer(), Layer()
    odd = nn.ReLU()
    odd.merge_parameters = "not callable"
    model = nn.Sequential(shared, shared, nn.ModuleDict({"module": inner}), odd)
    condition = MergeCondition(model)
    condition.merge()
    assert (shared.merges, inner.merges) == (1, 1)
    assert condition.clock == 0


def test_a_model_can_be_registered_later() -> None:
    """Without a model, step and merge raise and count no step; peek needs none."""
    condition = MergeCondition(None)
    for call in (condition.step, condition.merge):
        with pytest.raises(ConfigError, match=r"no model to merge; pass one, or call register_model\(model\) first"):
            call()
    assert condition.clock == 0
    assert condition.peek()
    layer = Layer()
    condition.register_model(layer)
    assert condition.step()
    assert layer.merges == 1


def test_unknown_settings_are_one_clear_error() -> None:
    """The message names what is known."""
    with pytest.raises(ConfigError, match=r"method = 'steps' is unknown; known: step\. Did you mean step\?"):
        MergeCondition(None, method="steps")
    with pytest.raises(ConfigError, match="merge_steps = 0 must be at least 1"):
        MergeCondition(None, 0)
