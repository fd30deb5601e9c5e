"""LoRA-Muon against its formulas in float64, and its invariances."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.optim import LoRAMuon
from lte_ray.optim.orthogonalization import NOISE

SHAPES = [(1, 12, 12), (4, 24, 10), (4, 10, 24), (8, 8, 30), (1, 16, 1), (1, 1, 1)]
"""(r, out, in); the last but one is that of a vector, whose A is a number."""


def draw_pair(
    r: int, out: int, in_features: int, seed: int = 0, b_scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Any:
    """Factors A (r x in) and B (out x r) as parameters."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, in_features, generator=generator, dtype=torch.float64)
    b = torch.randn(out, r, generator=generator, dtype=torch.float64) * b_scale
    return nn.Parameter(a.to(dtype)), nn.Parameter(b.to(dtype))


def build(pairs: list[Any], scalings: list[float], replicas: tuple[nn.Parameter, ...] = (), **options: Any) -> LoRAMuon:
    groups = [{"params": [p for pair in pairs for p in pair], "name": "lora", "scalings": scalings}]
    return LoRAMuon(groups + ([{"params": list(replicas), "name": "replica"}] if replicas else []), **options)


def set_gradients(pair: Any, scaling: float, seed: int) -> None:
    """The gradients of <G, s B A> for a drawn G (out x in)."""
    a, b = pair
    generator = torch.Generator().manual_seed(1000 + seed)
    g = torch.randn(*a.shape[:-2], b.shape[-2], a.shape[-1], generator=generator, dtype=torch.float64).to(a.dtype)
    a.grad, b.grad = scaling * b.detach().mT @ g, scaling * g @ a.detach().mT


def product(pair: Any, scaling: float) -> Tensor:
    a, b = (p.detach().double() for p in pair)
    return scaling * b @ a


def step(pair: Any, scaling: float, seed: int = 0, **options: Any) -> Tensor:
    """The change of s B A in one step."""
    before, optimizer = product(pair, scaling), build([pair], [scaling], **options)
    set_gradients(pair, scaling, seed)
    optimizer.step()
    return product(pair, scaling) - before


def msign(x: Tensor) -> Tensor:
    """U V^T, with the damping of small singular values."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return (u * (s / (s.square() + NOISE * s.pow(4).sum().sqrt() + 1e-300).sqrt())) @ vt


def power(x: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.pow(exponent)) @ vectors.mT


class Reference:
    """LoRA-Muon of one pair in float64, with inverse square roots and singular value decompositions."""

    def __init__(self, pair: Any, scaling: float, lr: float, mu: float, nesterov: bool, damping: float, limit: float) -> None:
        self.a, self.b = (p.detach().double().clone() for p in pair)
        self.scaling, self.lr, self.mu, self.nesterov, self.damping, self.limit = scaling, lr, mu, nesterov, damping, limit
        self.momenta = [torch.zeros_like(self.a), torch.zeros_like(self.b)]

    def step(self, gradients: list[Tensor]) -> None:
        self.momenta = [self.mu * m + g for m, g in zip(self.momenta, gradients, strict=True)]
        m_a, m_b = (g + self.mu * m if self.nesterov else m for m, g in zip(self.momenta, gradients, strict=True))
        size = self.lr * math.sqrt(max(1, self.b.shape[0] / self.a.shape[1])) / (2 * abs(self.scaling))
        eye = torch.eye(len(self.a), dtype=torch.float64)
        gram = self.a @ self.a.mT
        gram = gram + self.damping * gram.norm() * eye
        r_a = power(gram, -0.5)
        root = power(gram, 0.5)
        gram_b = root @ self.b.mT @ self.b @ root
        t_squared = (size / self.limit) ** 2
        r_b = power(self.b.mT @ self.b + (t_squared + self.damping * gram_b.norm()) * torch.linalg.inv(gram), -0.5)
        self.b = self.b - size * msign(m_b @ r_a) @ r_a
        self.a = self.a - size * r_b @ msign(r_b @ m_a)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("r", "out", "in_features"), SHAPES)
def test_steps_follow_the_formulas(r: int, out: int, in_features: int, nesterov: bool) -> None:
    """Five steps from B = 0 match those computed by eigenvalues and singular values."""
    pair = draw_pair(r, out, in_features, b_scale=0.0)
    options = {"lr": 0.3, "nesterov": nesterov, "damping": 1e-2, "limit": 0.2}
    optimizer = build([pair], [2.0], momentum=0.8, **options)  # type: ignore[arg-type]
    reference = Reference(pair, 2.0, mu=0.8, **options)  # type: ignore[arg-type]
    for seed in range(5):
        set_gradients(pair, 2.0, seed)
        reference.step([p.grad for p in pair])
        optimizer.step()
        torch.testing.assert_close(pair[0].detach(), reference.a, rtol=0, atol=2e-5)
        torch.testing.assert_close(pair[1].detach(), reference.b, rtol=0, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from([0.5, 4.0, 128.0]), st.sampled_from([1e-3, 1.0, 30.0]), st.integers(0, 5),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_the_rate_is_the_norm_of_the_products_change(
    shape: tuple[int, int, int], scaling: float, scale: float, seed: int, dtype: torch.dtype
) -> None:
    """From half the rate to the whole, times sqrt(max(1, out / in)), less or more by the limit, whatever the pair."""
    pair = draw_pair(*shape, seed=seed, dtype=dtype)
    with torch.no_grad():
        pair[0].mul_(scale)
    # The new factors are rounded to their type, and their product inherits that.
    norms = [float(torch.linalg.matrix_norm(factor.detach())) for factor in pair]
    rounding = scaling * torch.finfo(dtype).eps * norms[0] * norms[1]
    change = step(pair, scaling, seed, lr=0.01)
    size = 0.01 * math.sqrt(max(1, shape[1] / shape[2]))
    assert 0.47 * size - rounding < float(torch.linalg.svdvals(change)[0]) < 1.03 * size + rounding


@pytest.mark.parametrize(("r", "out", "in_features"), SHAPES)
def test_from_b_zero_the_product_moves_by_half_the_rate(r: int, out: int, in_features: int) -> None:
    """All its singular values do, and A stays, since it has no influence yet."""
    pair = draw_pair(r, out, in_features, b_scale=0.0)
    a = pair[0].detach().clone()
    values = torch.linalg.svdvals(step(pair, 2.0, lr=0.1, damping=1e-6))[:r]
    torch.testing.assert_close(values, torch.full_like(values, 0.05 * math.sqrt(max(1, out / in_features))), rtol=1e-3, atol=0)
    assert torch.equal(pair[0], a)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from([1e-3, 0.1, 50.0]), st.sampled_from([0.0, 1e-3, 1.0]), st.integers(0, 5))
def test_the_scale_between_factors_does_not_matter(shape: tuple[int, int, int], k: float, b_scale: float, seed: int) -> None:
    """(A, B) and (k A, B / k), whose product is the same, change it alike; so do (Q A, B Q^T) for an orthogonal Q."""
    pair, scaled, rotated = (draw_pair(*shape, seed=seed, b_scale=b_scale) for _ in range(3))
    q = torch.linalg.qr(torch.randn(shape[0], shape[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    with torch.no_grad():
        scaled[0].mul_(k)
        scaled[1].div_(k)
        rotated[0].copy_(q @ rotated[0])
        rotated[1].copy_(rotated[1] @ q.T)
    change = step(pair, 4.0, seed)
    torch.testing.assert_close(step(scaled, 4.0, seed), change, rtol=0, atol=1e-6)
    torch.testing.assert_close(step(rotated, 4.0, seed), change, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(SHAPES), st.sampled_from([1e-8, 1e-4, 1e-2, 1.0]), st.integers(0, 5))
def test_a_turns_by_at_most_the_limit(shape: tuple[int, int, int], b_scale: float, seed: int) -> None:
    """In coordinates where its rows are orthonormal, its change has at most that norm, however small B is."""
    pair = draw_pair(*shape, seed=seed, b_scale=b_scale)
    a = pair[0].detach().clone()
    step(pair, 1.0, seed, lr=1.0, limit=0.05, damping=0.0)
    assert float(torch.linalg.svdvals(power(a @ a.mT, -0.5) @ (pair[0].detach() - a))[0]) < 0.0501


def test_stacked_heads_are_separate_heads() -> None:
    """Factors with a leading dimension, also with rows and columns of zeros beyond a head's rank."""
    ranks = [4, 4, 2]
    heads = [draw_pair(r, 12, 9, seed=n, dtype=torch.float32) for n, r in enumerate(ranks)]
    stacked = nn.Parameter(torch.zeros(3, 4, 9)), nn.Parameter(torch.zeros(3, 12, 4))
    with torch.no_grad():
        for n, (r, (a, b)) in enumerate(zip(ranks, heads, strict=True)):
            stacked[0][n, :r], stacked[1][n, :, :r] = a, b
    optimizer, each = build([stacked], [3.0]), build(heads, [3.0] * 3)
    for seed in range(3):
        for head in heads:
            set_gradients(head, 3.0, seed)
        for p, parts in zip(stacked, zip(*heads, strict=True), strict=True):
            p.grad = torch.zeros_like(p)
            for n, part in enumerate(parts):
                p.grad[n, : part.shape[0], : part.shape[1]] = part.grad
        optimizer.step()
        each.step()
    for n, (r, (a, b)) in enumerate(zip(ranks, heads, strict=True)):
        torch.testing.assert_close(stacked[0][n, :r], a, rtol=0, atol=1e-5)
        torch.testing.assert_close(stacked[1][n, :, :r], b, rtol=0, atol=1e-5)
        assert not stacked[0][n, r:].any() and not stacked[1][n, :, r:].any()


def test_pairs_of_several_shapes_ranks_and_scalings_are_independent() -> None:
    """One optimizer of all takes the steps of one optimizer each."""
    scalings = [0.5, 2.0, 2.0, 16.0, 1.0, -3.0, 2.0]
    together = [draw_pair(*shape, seed=n) for n, shape in enumerate([*SHAPES, SHAPES[1]])]
    alone = copy.deepcopy(together)
    optimizers = [build(together, scalings), *(build([pair], [s]) for pair, s in zip(alone, scalings, strict=True))]
    for seed in range(3):
        for pairs in (together, alone):
            for pair, scaling in zip(pairs, scalings, strict=True):
                set_gradients(pair, scaling, seed)
        for optimizer in optimizers:
            optimizer.step()
    for pair, other in zip(together, alone, strict=True):
        torch.testing.assert_close(pair, other, rtol=0, atol=1e-10)


def test_a_negative_scaling_descends_too() -> None:
    """-s and -B give the same product as s and B, and the same change."""
    pair, negated = draw_pair(4, 12, 8), draw_pair(4, 12, 8)
    with torch.no_grad():
        negated[1].neg_()
    torch.testing.assert_close(step(negated, -2.0), step(pair, 2.0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_any_size_give_finite_steps(dtype: torch.dtype) -> None:
    """Tiny, huge and zero gradients; a zero gradient without momentum changes nothing."""
    for size in (1e-30, 1e30, 0.0):
        pair = draw_pair(4, 12, 8, dtype=dtype)
        before = [p.detach().clone() for p in pair]
        optimizer = build([pair], [2.0])
        set_gradients(pair, 2.0, 0)
        for p in pair:
            p.grad.mul_(size)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in pair)
        assert all(torch.equal(p, q) == (size == 0) for p, q in zip(pair, before, strict=True))


def test_factors_without_gradients_stay() -> None:
    """A pair that the loss doesn't use is left alone; so is a frozen A, while its B trains."""
    unused, half = draw_pair(4, 12, 8), draw_pair(4, 12, 8, seed=1)
    before, a, b = copy.deepcopy(unused), half[0].detach().clone(), half[1].detach().clone()
    optimizer = build([unused, half], [1.0, 1.0], weight_decay=0.1)
    set_gradients(half, 1.0, 0)
    half[0].grad = None
    optimizer.step()
    torch.testing.assert_close(unused, before, rtol=0, atol=0)
    assert torch.equal(half[0], a)
    assert not torch.equal(half[1], b)
    assert not optimizer.state[half[0]]


def test_weight_decay_shrinks_the_product() -> None:
    """By lr weight_decay; the step through each factor stays the same (arXiv 2606.12921)."""
    pair, plain = draw_pair(4, 12, 8), draw_pair(4, 12, 8)
    before = product(pair, 2.0)
    change, expected = step(pair, 2.0, lr=0.01, weight_decay=5.0), step(plain, 2.0, lr=0.01)
    torch.testing.assert_close(change, expected - 0.05 * before, rtol=0, atol=2e-4)


def test_replicas_train_with_adamw() -> None:
    """Bitwise as torch's AdamW with the replicas' own rate."""
    replica, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = build([draw_pair(1, 2, 2)], [1.0], (replica,), replica_lr=3e-3, weight_decay=0.1)
    adamw = torch.optim.AdamW([other], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for seed in range(4):
        replica.grad = other.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        adamw.step()
    assert torch.equal(replica, other)
    assert optimizer.state[replica].keys() == adamw.state[other].keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_saved_state_continues_exactly(dtype: torch.dtype) -> None:
    """Also where the parameters have fewer bits than their momenta, which torch's `load_state_dict` would round."""
    pair = draw_pair(4, 12, 8, dtype=dtype)
    optimizer = build([pair], [2.0], nesterov=True)
    for seed in range(3):
        set_gradients(pair, 2.0, seed)
        optimizer.step()
    saved, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(pair)
    resumed = build([other], [2.0])
    resumed.load_state_dict(saved)
    for seed in range(3, 5):
        for one, optimize in ((pair, optimizer), (other, resumed)):
            set_gradients(one, 2.0, seed)
            optimize.step()
    assert all(torch.equal(p, q) for p, q in zip(pair, other, strict=True))
    assert optimizer.state[pair[0]]["momentum"].dtype == torch.float32


def test_a_cleared_state_is_that_of_a_new_optimizer() -> None:
    """As a head does when its progress is dropped."""
    pair = draw_pair(4, 12, 8)
    optimizer = build([pair], [2.0])
    set_gradients(pair, 2.0, 0)
    optimizer.step()
    optimizer.state.clear()
    other = copy.deepcopy(pair)
    for one, optimize in ((pair, optimizer), (other, build([other], [2.0]))):
        set_gradients(one, 2.0, 1)
        optimize.step()
    assert all(torch.equal(p, q) for p, q in zip(pair, other, strict=True))


def test_a_rate_of_zero_changes_nothing() -> None:
    """As at the start of a warm-up; the momentum counts the step."""
    pair = draw_pair(4, 12, 8)
    before = [p.detach().clone() for p in pair]
    optimizer = build([pair], [2.0], lr=0.0)
    set_gradients(pair, 2.0, 0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(pair, before, strict=True))
    assert torch.equal(optimizer.state[pair[0]]["momentum"], pair[0].grad)


def test_groups_get_their_rates() -> None:
    """`lr` for what is orthogonalized, `replica_lr` for the rest, unless a group brings its own."""
    (a, b), weight = draw_pair(1, 2, 2), nn.Parameter(torch.ones(3))
    groups = [
        {"params": [a, b], "name": "lora", "scalings": [1.0]},
        {"params": [weight], "name": "replica"},
        {"params": [nn.Parameter(torch.ones(2, 2))], "name": "weight"},
        {"params": [nn.Parameter(torch.ones(3))], "name": "replica", "lr": 7.0},
    ]
    optimizer = LoRAMuon(groups, lr=0.1, replica_lr=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.1, 7.0]


def test_training_converges_on_a_regression_of_low_rank() -> None:
    """From B = 0 to a product of rank 4, to within 2% with a rate that falls to zero."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(20, 4, generator=generator) @ torch.randn(4, 16, generator=generator) / 4
    a, b = draw_pair(6, 20, 16, b_scale=0.0, dtype=torch.float32)
    optimizer = build([(a, b)], [2.0], lr=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 300)
    for _ in range(300):
        optimizer.zero_grad()
        (2.0 * b @ a - target).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert float((product((a, b), 2.0) - target).norm() / target.norm()) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scalings": None}, "has 2 parameters and no scalings"),
        ({"scalings": [1.0, 2.0]}, "has 2 parameters and 2 scalings"),
        ({"scalings": [0.0]}, "a scaling other than 0"),
        ({"scalings": [[1.0, 2.0]]}, r"has \[1.0, 2.0\] for A of shape \(1, 2\)"),
        ({"params": [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(2, 3))]}, r"shapes \(4, 2\) and \(2, 3\)"),
        ({"params": [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]}, r"shapes \(4,\) and \(4,\)"),
        ({"name": "factors"}, "needs parameter groups named"),
    ],
)
def test_groups_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    """One error says what the group has and what to pass on."""
    group = {"params": list(draw_pair(1, 2, 2)), "name": "lora", "scalings": [1.0], **change}
    with pytest.raises(ConfigError, match=message):
        LoRAMuon([group])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": 1.0}, "at least 0 and below 1"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"limit": 0.0}, "limit is 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"lr": 0.1, "weight_decay": 10.0}, "lr times weight_decay is 1.0, but it must be at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    """The error names the option and its range."""
    with pytest.raises(ConfigError, match=message):
        build([draw_pair(1, 2, 2)], [1.0], **options)


def test_a_list_of_parameters_is_refused() -> None:
    """Nothing says then which of them are pairs."""
    with pytest.raises(ConfigError, match="it was given parameters"):
        LoRAMuon(nn.Linear(2, 2).parameters())
