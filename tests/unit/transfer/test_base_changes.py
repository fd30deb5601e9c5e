"""Rounded changes of a base: close, of the size that is said, and exact where a rounded value could be wrong."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lte_ray.transfer.base_changes import ChangePacking
from lte_ray.transfer.groups import BLOCK
from tests.support.plans import plan_from_shapes, random_flat


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(1)), max_size=3),
    st.lists(st.tuples(st.integers(1, 1200)), min_size=1, max_size=3),
    st.sampled_from(["bf16", "int8"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(-30, 30),
)
def test_a_change_is_rounded_to_half_a_step(
    shapes: list, replicas: list, transfer: str, dtype: torch.dtype, power: float
) -> None:
    """bf16: by at most 2^-8 of a value; int8: by 1/254 of the largest in its block. Running statistics keep their bits."""
    plan = plan_from_shapes(shapes, replicas, statistics=[0])
    packing, change = ChangePacking(plan, transfer, dtype), (2**power * random_flat(plan.base.size, 1)).to(dtype)
    buffer = packing.encode(change)
    decoded = packing.decode(buffer)
    assert buffer.nbytes == packing.size
    for entry in plan.base.entries:
        place = slice(entry.offset, entry.offset + entry.size)
        exact, found = change[place], decoded[place]
        if entry.name == plan.replicas[0].name:
            assert torch.equal(found, exact)
            continue
        for block, rounded in zip(exact.double().split(BLOCK), found.double().split(BLOCK), strict=True):
            bound = block.abs() / 256 if transfer == "bf16" else block.abs().max() / 254
            assert ((rounded - block).abs() <= 1.001 * bound).all()


def test_the_size_is_that_of_the_formula() -> None:
    """One byte a value and four for each started block of 512 of each entry; statistics take four bytes a value."""
    plan = plan_from_shapes([(30, 20, 2), (4, 4, 1)], [(7,), (513,)], statistics=[0])
    assert ChangePacking(plan, "int8").size == (600 + 16 + 513) + 4 * (2 + 1 + 2) + 4 * 7
    assert ChangePacking(plan, "bf16").size == 2 * (600 + 16 + 513) + 4 * 7


def test_a_buffer_of_another_size_is_refused() -> None:
    """The error names the expected size and what was found."""
    packing = ChangePacking(plan_from_shapes([(4, 4, 1)], [(3,)]), "int8")
    with pytest.raises(ValueError, match=rf"expected a change's buffer of {packing.size} bytes .int8., found shape .5,."):
        packing.decode(torch.zeros(5, dtype=torch.uint8))
