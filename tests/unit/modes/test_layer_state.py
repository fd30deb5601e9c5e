"""State of the modes' layers: copies, state dicts, pickles, draws of A, types, and devices."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import lte_ray
from lte_ray import prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.mode_models import (
    LAYERS,
    MODES,
    UNIFORM,
    ModelCase,
    Tied,
    factors,
    one_linear,
    perturb,
    prepare,
)
from tests.support.numerics import assert_near


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["linear", "embedding", "batch-norm", "attention", "tied"])
def test_state_dict_deepcopy_and_pickle_keep_all(kind: str, mode: str) -> None:
    """After merges and changes since, each way of copying computes the same in training and after another merge."""
    case = LAYERS[kind]
    x, _ = case.batch(0)
    model = prepare(case, mode)
    for _ in range(2):
        perturb(model)
        MergeCondition(model).merge()
    perturb(model)
    loaded = prepare(case, mode)
    loaded.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [loaded, copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    expected = [model(x)]
    MergeCondition(model).merge()
    expected += [model(x), model.eval()(x)]
    for other in copies:
        assert torch.equal(other(x), expected[0])
        MergeCondition(other).merge()
        assert torch.equal(other(x), expected[1])
        assert torch.equal(other.eval()(x), expected[2])


@pytest.mark.parametrize("mode", MODES)
def test_another_type_later(mode: str) -> None:
    """A model prepared in float32 that becomes float64 computes as it did, and shared weights are still merged once."""
    single = perturb(prepare(ModelCase(Tied, (3,), words=True), mode, UNIFORM).float())
    x, _ = LAYERS["tied"].batch(0)
    double = copy.deepcopy(single).double()
    # 1e-5: float32 sums of a few terms, and values of order 1.
    assert_near(double(x), single(x), 1e-5)
    for m in (double, single):
        MergeCondition(m).merge()
    assert_near(double.eval()(x), single.eval()(x), 1e-5)
    assert all(p.dtype == torch.float64 for p in double.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_reset_after_a_resume_draws_what_an_uninterrupted_run_draws(mode: str) -> None:
    """The seed and the number of draws are in the state dict; a state dict without them loads too."""
    model = one_linear(mode)
    model[0].reset_lora_parameters()
    torch.manual_seed(5)
    resumed = prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)).double(), UNIFORM, mode=mode)
    resumed.load_state_dict(model.state_dict())
    for m in (model, resumed):
        m[0].reset_lora_parameters()
    assert torch.equal(factors(model)[0], factors(resumed)[0])
    state = {name: value for name, value in one_linear(mode).state_dict().items() if ".draws." not in name}
    resumed.load_state_dict(state)
    with pytest.raises(lte_ray.LTEError, match="must fit into 64 bits"):
        prepare_model_for_lte(nn.Sequential(nn.Linear(5, 4)), UNIFORM, mode=mode, seed=2**63)


def test_wrappers_add_nothing_to_names_of_merged_weights() -> None:
    """DataParallel's and `torch.compile`'s modules are looked through."""
    model = perturb(prepare(LAYERS["attention"], "ddp"))
    expected = merged_state_dict(model)
    assert set(expected) == set(LAYERS["attention"].build().state_dict())
    compiled = nn.Module()  # as torch.compile wraps a model; compiling itself takes seconds
    compiled._orig_mod = nn.DataParallel(model)
    for wrapped in (nn.DataParallel(model), compiled):
        state = merged_state_dict(wrapped)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_merged_weights_of_compiled_models() -> None:
    """The wrapper of the real `torch.compile` is looked through, too."""
    model = perturb(prepare(LAYERS["attention"], "ddp"))
    for wrapped in (torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert list(merged_state_dict(wrapped)) == list(merged_state_dict(model))
