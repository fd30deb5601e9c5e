"""Groups of entries: how heads receive them, and the balance of shards."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config.merge import MergeConfig
from lte_ray.errors import ConfigError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.low_rank import Share, add_contributions
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups, subplan
from tests.support.codecs import FORMATS
from tests.support.numerics import assert_near
from tests.support.plans import plan_from_shapes, random_flat

shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(1)), min_size=1, max_size=8)
replicas = st.lists(st.lists(st.integers(0, 9), max_size=2).map(tuple), max_size=3)
ranks = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def plans_of(shapes: list[tuple[int, int, int]], replicas: list[tuple[int, ...]], ranks: list[int]) -> list[Plan]:
    """Returns one plan per rank; all have the same base."""
    return [plan_from_shapes([(out, inner, rank) for out, inner, _ in shapes], replicas) for rank in ranks]


@given(shapes, replicas, ranks, st.sampled_from(FORMATS))
def test_a_weight_goes_down_the_way_that_is_fewer_bytes(shapes: list, replicas: list, ranks: list, transfer: str) -> None:
    """Compares, summed over the heads, the other heads' factors with the dense base in fp32."""
    plans = plans_of(shapes, replicas, ranks)
    found = make_groups(plans, MergeConfig(transfer=transfer))
    by_factors = {name for group in found if group.by_factors for name in group.names}
    width = {"fp32": Fraction(4), "bf16": Fraction(2), "int8": 1 + Fraction(4, 512)}[transfer]
    expected = set()
    for spec, (out, inner, _) in zip(plans[0].adapted, shapes, strict=True):
        factors = sum(rank * (out + inner) * width for head in range(len(ranks)) for n, rank in enumerate(ranks) if n != head)
        if factors < len(ranks) * out * inner * 4:
            expected.add(spec.name)
    assert by_factors & {spec.name for spec in plans[0].adapted} == expected


@pytest.mark.parametrize(
    ("heads", "replica", "transfer", "expected"),
    [
        (2, 9000, "fp32", True),  # one other head's changes are as many bytes as the base
        (4, 60, "fp32", True),  # 480 bytes more, of 3 x 2000 x 4 that the factors take
        (4, 61, "fp32", False),
        (4, 9000, "int8", True),  # three bytes and their scales are fewer than four
        (5, 9000, "int8", False),
    ],
)
def test_replicas_go_down_as_changes_where_that_costs_little(heads: int, replica: int, transfer: str, expected: bool) -> None:
    """If that is no more bytes, or at most 2% of the factors', so that heads need only contributions."""
    plans = plans_of([(100, 100, 10)], [(replica,)], [10] * heads)
    (found,) = [group for group in make_groups(plans, MergeConfig(transfer=transfer)) if "p0" in group.names]
    assert found.by_factors == expected


def test_either_way_can_be_forced() -> None:
    """`send_down` applies to all weights and replicas."""
    plans = plans_of([(64, 64, 1), (2, 2, 1)], [(3,)], [2, 2])
    for way in ("factors", "dense"):
        found = make_groups(plans, MergeConfig(send_down=way))
        assert {(g.by_factors, g.names) for g in found} == {(way == "factors", ("w0", "w1", "p0"))}


@given(shapes, replicas, ranks, st.integers(1, 8), st.sampled_from(["auto", "dense", "factors"]))
def test_shards_hold_each_entry_once(shapes: list, replicas: list, ranks: list, shards: int, send_down: str) -> None:
    """Each name is in one group, in the plan's order; no shard is empty or has two groups of a kind; replicas are together."""
    plans = plans_of(shapes, replicas, ranks)
    shards = min(shards, len(shapes))
    found = make_groups(plans, MergeConfig(shards=shards, send_down=send_down))
    order = [entry.name for entry in plans[0].base.entries]
    assert sorted(name for group in found for name in group.names) == sorted(order)
    assert all(group.names and list(group.names) == sorted(group.names, key=order.index) for group in found)
    assert {group.shard for group in found} == set(range(shards))
    assert len({(group.shard, group.by_factors) for group in found}) == len(found)
    of_replicas = {group for group in found if set(group.names) & {r.name for r in plans[0].replicas}}
    assert len(of_replicas) == bool(replicas)
    assert found == make_groups(plans, MergeConfig(shards=shards, send_down=send_down))


@given(shapes, ranks, st.integers(1, 8))
def test_shards_are_balanced(shapes: list, ranks: list, shards: int) -> None:
    """Their work, out x in x sum of ranks, differs by at most the largest weight's."""
    plans = plans_of(shapes, [], ranks)
    shards = min(shards, len(shapes))
    cost = {a.name: a.matrix[0] * a.matrix[1] * sum(ranks) for a in plans[0].adapted}
    load = [0] * shards
    for group in make_groups(plans, MergeConfig(shards=shards)):
        load[group.shard] += sum(cost[name] for name in group.names)
    assert max(load) - min(load) <= max(cost.values())


def test_the_costliest_weights_are_spread_first() -> None:
    """Four small weights and one as large as all of them: 4 and 1, wherever the large one is."""
    for at in range(5):
        shapes = [(8, 8, 1)] * 4
        shapes.insert(at, (16, 16, 1))
        found = make_groups(plans_of(shapes, [], [1]), MergeConfig(shards=2, send_down="dense"))
        assert sorted(len(group.names) for group in found) == [1, 4]


def test_replicas_count_as_work() -> None:
    """The shard with large replicas gets fewer weights."""
    plans = plans_of([(8, 8, 1)] * 4, [(10_000,)], [1, 1])
    found = make_groups(plans, MergeConfig(shards=2, send_down="dense"))
    assert [len(group.names) for group in found] == [1, 4]
    assert found[0].names == (plans[0].replicas[0].name,)


def test_more_shards_than_weights_are_refused() -> None:
    """The error names both numbers."""
    with pytest.raises(ConfigError, match=r"--shards is 3, but the model has 2 adapted weights"):
        make_groups(plans_of([(4, 4, 1)] * 2, [(3,)], [1]), MergeConfig(shards=3))


def test_a_part_has_only_known_entries() -> None:
    """Its layouts are those of the plan without the other entries; unknown names are refused."""
    (plan,) = plans_of([(4, 3, 1), (2, 5, 1)], [(3,), (2, 2)], [2])
    second, last = plan.adapted[1], plan.replicas[1]
    assert subplan(plan, [last.name, second.name]) == Plan((second,), (last,))
    with pytest.raises(ValueError, match=r"no entries .*nowhere"):
        subplan(plan, ["nowhere"])


@pytest.mark.parametrize("transfer", FORMATS)
@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_shards_change_no_bit_of_what_travels(transfer: str, topk: float) -> None:
    """However the entries are distributed, a contribution is decoded to the same values."""
    plans = plans_of([(40, 30, 1), (7, 200, 1), (90, 5, 1)], [(700,), (5,)], [3, 3])
    contribution = random_flat(plans[0].contribution.size, 1, torch.float32)
    reference = random_flat(plans[0].factors_size, 2, torch.float32)
    merge = MergeConfig(transfer=transfer, replica_topk=topk)
    decoded = []
    for shards in (1, 2, 3):
        for send_down in ("auto", "dense", "factors"):
            settings = replace(merge, shards=shards, send_down=send_down)
            decoded.append(Codec(plans[0], make_groups(plans, settings), settings).encode(contribution, reference)[1])
    assert all(torch.equal(each, decoded[0]) for each in decoded)


@pytest.mark.parametrize("transfer", FORMATS)
def test_parts_merge_as_the_whole(transfer: str) -> None:
    """Groups merged separately, each from its own buffers, result in the base of one merge."""
    plans = plans_of([(12, 9, 1), (7, 20, 1), (9, 5, 1)], [(70,), (5,)], [3, 2])
    merge = MergeConfig(transfer=transfer, replica_topk=0.3, shards=2)
    split = make_groups(plans, merge)
    whole = random_flat(plans[0].base.size, 9)
    before = views(plans[0].base, whole.clone())
    shares, bases = [], [torch.cat([before[e.name].flatten() for e in subplan(plans[0], g.names).base.entries]) for g in split]
    for head, plan in enumerate(plans):
        codec = Codec(plan, split, merge, torch.float64)
        reference = random_flat(plan.factors_size, 10 + head)
        buffers, decoded = codec.encode(random_flat(plan.contribution.size, head), reference)
        shares.append(Share(0.5, plan, decoded, reference))
        for index, base in enumerate(bases):
            old = codec.slice_factors(index, reference)
            add_contributions(base, [Share(0.5, codec.group_plans[index], codec.decode_group(index, buffers[index], old), old)])
    add_contributions(whole, shares)
    for group, base in zip(split, bases, strict=True):
        own = subplan(plans[0], group.names).base
        for name, value in views(own, base).items():
            assert_near(value, views(plans[0].base, whole)[name], 1e-14)  # the products of two heads, in one sum or two
