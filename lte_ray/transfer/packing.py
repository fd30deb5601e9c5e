"""How one group's values lie in its buffer of bytes.

    values     of every adapted weight (A, then B), then of the replicas; in the transfer format
    steps      int8 only: one fp32 step per block of 512 consecutive values; a weight, and the replicas, begin a new block
    indices    where only some replica elements travel: int32, ascending; or
    bitmap     a bit an element, where that is fewer bytes (more than one element in 32)

The fields lie end to end, those of wider numbers first, so that each is aligned. There is no header: both sides know the plan.

Rounding of what travels to bf16 and to int8 in blocks, and back.

Each operation is one IEEE rounding of each element, so the result depends neither on how the work is cut up nor, as far as
the devices keep to IEEE 754, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer.groups import BLOCK

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


SAMPLE = 1 << 14
"""Elements that are looked at to guess which are the largest."""


class Packing:
    """The buffer of one (part of a) plan's contribution.

    Attributes:
        counts: values that travel of each segment: each adapted weight's factors, then all replicas, if there are any.
        size: bytes of the buffer.
    """

    def __init__(self, plan: Plan, merge: MergeConfig, dtype: torch.dtype = torch.float32) -> None:
        self.format = merge.transfer
        self._replicas = plan.contribution.size - plan.factors_size
        self._kept = kept(self._replicas, merge)
        self.counts = [a.rank * sum(a.matrix) for a in plan.adapted] + [self._kept] * bool(self._replicas)
        fields = [
            ("values", {"fp32": dtype, "bf16": torch.bfloat16, "int8": torch.int8}[self.format], sum(self.counts)),
            ("steps", torch.float32, sum(-(-n // BLOCK) for n in self.counts) if self.format == "int8" else 0),
            ("indices", torch.int32, self._kept if self._sparse and not as_bitmap(self._replicas, self._kept) else 0),
            ("bitmap", torch.uint8, -(-self._replicas // 8) if self._sparse and as_bitmap(self._replicas, self._kept) else 0),
        ]
        self._fields: dict[str, tuple[torch.dtype, int, int]] = {}
        self.size = 0
        for name, kind, count in sorted(fields, key=lambda field: -field[1].itemsize):
            self._fields[name] = kind, self.size, self.size + kind.itemsize * count
            self.size += kind.itemsize * count

    @property
    def _sparse(self) -> bool:
        return self._kept < self._replicas

    def encode(self, segments: Sequence[Tensor], references: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Packs the segments, less their references, into a new buffer (uint8).

        Args:
            segments: flat each, as `counts` but with all replica elements.
            references: of each segment; None: nothing is taken off.
        """
        buffer = torch.empty(self.size, dtype=torch.uint8, device=device)
        segments = list(segments)
        if self._sparse:
            where = largest(segments[-1], self._kept)
            segments[-1] = segments[-1][where]
            self._write_where(buffer, where)
        for x, reference, codes, steps in zip(segments, references, *self._codes(buffer), strict=True):
            to_codes(x, reference, codes, steps)
        return buffer

    def decode(self, buffer: Tensor, references: Sequence[Tensor | None], outs: Sequence[Tensor]) -> None:
        """Writes what `encode` packed, plus the references, into `outs` (flat each, all replica elements).

        Raises:
            ValueError: the buffer has another length or type, or names replica elements that aren't there.
        """
        buffer = self.checked(buffer)
        outs = list(outs)
        if self._sparse:
            where, replicas = self._read_where(buffer), outs[-1]
            outs[-1] = replicas.new_empty(self._kept)
        for codes, steps, reference, out in zip(*self._codes(buffer), references, outs, strict=True):
            from_codes(codes, steps, reference, out)
        if self._sparse:
            replicas.zero_()[where] = outs[-1]

    def checked(self, buffer: Tensor) -> Tensor:
        """The buffer, so that it can be viewed as other types.

        Raises:
            ValueError: it has another length or type.
        """
        if buffer.dtype != torch.uint8 or buffer.shape != (self.size,):
            found = f"{tuple(buffer.shape)} of {buffer.dtype}"
            raise ValueError(f"expected a contribution's buffer of {self.size} bytes ({self.format}), found shape {found}")
        return buffer.contiguous() if buffer.storage_offset() % 8 == 0 else buffer.clone()

    def _codes(self, buffer: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Views of each segment's values and steps in the buffer."""
        steps = [-(-n // BLOCK) if self.format == "int8" else 0 for n in self.counts]
        return torch.split(self._field(buffer, "values"), self.counts), torch.split(self._field(buffer, "steps"), steps)

    def _field(self, buffer: Tensor, name: str) -> Tensor:
        kind, begin, end = self._fields[name]
        return buffer[begin:end].view(kind)

    def _write_where(self, buffer: Tensor, where: Tensor) -> None:
        bitmap = self._field(buffer, "bitmap")
        if not bitmap.numel():
            self._field(buffer, "indices").copy_(where)
            return
        bits = torch.zeros(8 * bitmap.numel(), dtype=torch.uint8, device=buffer.device)
        bits[where] = 1
        torch.sum(bits.view(-1, 8) * _powers(buffer.device), 1, dtype=torch.uint8, out=bitmap)

    def _read_where(self, buffer: Tensor) -> Tensor:
        bitmap = self._field(buffer, "bitmap")
        if not bitmap.numel():
            where = self._field(buffer, "indices").long()
            if bool((where[:-1] >= where[1:]).any()) or int(where[0]) < 0 or int(where[-1]) >= self._replicas:
                raise ValueError(f"expected {self._kept} ascending indices of replica elements below {self._replicas}")
            return where
        where = (bitmap.unsqueeze(1) & _powers(buffer.device)).view(-1).nonzero().view(-1)
        if where.numel() != self._kept or int(where[-1]) >= self._replicas:
            found = f"{where.numel()}{f', up to {int(where[-1])}' if where.numel() else ''}"
            raise ValueError(f"expected {self._kept} replica elements below {self._replicas}, found {found}")
        return where


def kept(replicas: int, merge: MergeConfig) -> int:
    """How many of so many replica elements travel: their share, or all where that is no more bytes."""
    count = min(replicas, max(1, round(merge.replica_topk * replicas)))
    width = {"fp32": 4, "bf16": 2, "int8": 1}[merge.transfer]
    return count if count * width + where_bytes(replicas, count) < replicas * width else replicas


def where_bytes(replicas: int, count: int) -> int:
    """Bytes that say which `count` of the replica elements travel, if not all."""
    if count >= replicas:
        return 0
    return -(-replicas // 8) if as_bitmap(replicas, count) else 4 * count


def as_bitmap(replicas: int, count: int) -> bool:
    """Whether a bit an element says in fewer bytes which travel than an int32 each that does, or alone can."""
    return -(-replicas // 8) < 4 * count or replicas >= 2**31


def largest(x: Tensor, count: int) -> Tensor:
    """The ascending indices of the `count` elements of largest |value|; NaN counts as the largest.

    Where few of many are wanted, what is below a bound that a sample suggests is dropped first: exact, and several times
    faster on a CPU.
    """
    size = x.abs()
    if len(size) > max(16 * SAMPLE, 4 * count):
        sample = size[:: len(size) // SAMPLE | 1]  # an odd stride, so that it meets all columns of most matrices
        share = count / len(size) * len(sample)
        rank = min(len(sample), int(share + 6 * share**0.5) + 6)
        found = (size < sample.topk(rank).values[-1]).logical_not_().nonzero().view(-1)
        if len(found) >= count:
            return found[size[found].topk(count, sorted=False).indices].sort().values
    return size.topk(count, sorted=False).indices.sort().values


def _powers(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
