"""Rounding of what travels to bf16 and to int8 in blocks, and back.

Each operation is one IEEE rounding of each element, so the result depends neither on how the work is cut up nor, as far as
the devices keep to IEEE 754, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from lte_ray.merging.groups import BLOCK

CHUNK = 128 * BLOCK
"""Values worked on at once on a CPU: what is read and written stays in its cache."""


def to_codes(x: Tensor, reference: Tensor | None, codes: Tensor, steps: Tensor) -> None:
    """codes := x - reference, rounded to the type of `codes`; in int8, codes := round(that / step), |code| <= 127.

    A block's step is its largest magnitude / 127, so the error is at most step / 2; it is 0 where all values are. A block
    with NaN or infinity gets such a step, and so comes out non-finite.
    """
    for at, of_steps, columns in _chunks(x, codes):
        change = x[at] if reference is None else x[at] - reference[at]
        if codes.dtype != torch.int8:
            codes[at] = change
            continue
        rows = change.view(-1, columns)
        low, high = torch.aminmax(rows, dim=1)
        step = steps[of_steps].copy_(torch.maximum(high, -low) * (1 / 127))  # a GPU divides by a number so too
        step = torch.where(step == 0, 1.0, step).unsqueeze(1)
        codes[at] = (rows / step).round_().clamp_(-127, 127).view(-1)


def from_codes(codes: Tensor, steps: Tensor, reference: Tensor | None, out: Tensor) -> None:
    """out := codes [x step of the block] + reference."""
    for at, of_steps, columns in _chunks(out, codes):
        piece = out[at].copy_(codes[at])
        if codes.dtype == torch.int8:
            piece.view(-1, columns).mul_(steps[of_steps].unsqueeze(1))
        if reference is not None:
            piece.add_(reference[at])


def _chunks(x: Tensor, codes: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Pieces of whole blocks, then the last, shorter one: where they lie, which blocks they are, and a block's length."""
    whole = len(x) // BLOCK * BLOCK if codes.dtype == torch.int8 else len(x)
    chunk = CHUNK if x.device.type == "cpu" else max(1, whole)
    for begin, end in pairwise([*range(0, whole, chunk), whole]):
        yield slice(begin, end), slice(begin // BLOCK, end // BLOCK), BLOCK
    if whole < len(x):
        yield slice(whole, len(x)), slice(whole // BLOCK, whole // BLOCK + 1), len(x) - whole
