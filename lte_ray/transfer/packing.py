"""The layout of one group's values in its buffer of bytes, and their rounding to bf16 or to int8 in blocks.

    exact      running statistics among the replicas, in the type of merging: a rounded variance could become negative
    values     of each adapted weight (A, then B), then of the other replicas; in the transfer format
    steps      int8 only: one fp32 step per block of 512 consecutive values; each weight, and the replicas, start a new block
    indices    if only some replica elements are sent: int32, ascending; or
    bitmap     one bit per element, if that is fewer bytes (more than one element in 32)

The fields follow each other, wider numbers first, so that each is aligned. There is no header: both sides know the plan.

Each operation rounds each element once, as IEEE 754 specifies. So the result depends neither on how the work is divided nor,
as far as devices follow IEEE 754, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer.groups import BLOCK

CHUNK = 128 * BLOCK
"""Values processed at once on a CPU, so that inputs and outputs stay in its cache."""

VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes of one value in each transfer format, without scales."""

SAMPLE_SIZE = 1 << 14
"""Elements sampled to estimate which are the largest."""


def encode_values(x: Tensor, reference: Tensor | None, codes: Tensor, steps: Tensor) -> None:
    """codes := x - reference, rounded to the type of `codes`; in int8, codes := round((x - reference) / step), |code| <= 127.

    A block's step is its largest magnitude / 127, so the error is at most step / 2; the step is 0 if all values are. The step
    of a block with NaN or infinity is not finite, and so neither are the decoded values.
    """
    for at, blocks, columns in _chunks(x, codes):
        change = x[at] if reference is None else x[at] - reference[at]
        if codes.dtype != torch.int8:
            codes[at] = change
            continue
        rows = change.view(-1, columns)
        low, high = torch.aminmax(rows, dim=1)
        step = steps[blocks].copy_(torch.maximum(high, -low) * (1 / 127))  # as a GPU divides by a number
        step = torch.where(step == 0, 1.0, step).unsqueeze(1)
        codes[at] = (rows / step).round_().clamp_(-127, 127).view(-1)


def decode_values(codes: Tensor, steps: Tensor, reference: Tensor | None, out: Tensor) -> None:
    """out := codes [x the block's step in int8] + reference."""
    for at, blocks, columns in _chunks(out, codes):
        piece = out[at].copy_(codes[at])
        if codes.dtype == torch.int8:
            piece.view(-1, columns).mul_(steps[blocks].unsqueeze(1))
        if reference is not None:
            piece.add_(reference[at])


def _chunks(x: Tensor, codes: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Yields chunks of full blocks, then the last, shorter block: slice of the values, slice of the blocks, block length."""
    full = len(x) // BLOCK * BLOCK if codes.dtype == torch.int8 else len(x)
    chunk = CHUNK if x.device.type == "cpu" else max(1, full)
    for begin, end in pairwise([*range(0, full, chunk), full]):
        yield slice(begin, end), slice(begin // BLOCK, end // BLOCK), BLOCK
    if full < len(x):
        yield slice(full, len(x)), slice(full // BLOCK, full // BLOCK + 1), len(x) - full


class BufferFields:
    """Where the fields of a buffer of bytes lie: wider numbers first, so that each is aligned.

    Args:
        fields: by name, the type of the numbers and how many there are.

    Attributes:
        size: bytes of the buffer.
    """

    def __init__(self, **fields: tuple[torch.dtype, int]) -> None:
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        self.size = 0
        for name, (kind, count) in sorted(fields.items(), key=lambda field: -field[1][0].itemsize):
            self._places[name] = kind, self.size, self.size + kind.itemsize * count
            self.size += kind.itemsize * count

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """Returns the numbers of a field in a buffer, whose memory they share."""
        kind, begin, end = self._places[name]
        return buffer[begin:end].view(kind)

    def check_buffer(self, buffer: Tensor, what: str, transfer: str) -> Tensor:
        """Returns the buffer, aligned so that it can be viewed as other types.

        Raises:
            ValueError: the buffer has the wrong length or type.
        """
        if buffer.dtype != torch.uint8 or buffer.shape != (self.size,):
            found = f"{tuple(buffer.shape)} of {buffer.dtype}"
            raise ValueError(f"expected a {what}'s buffer of {self.size} bytes ({transfer}), found shape {found}")
        return buffer.contiguous() if buffer.storage_offset() % 8 == 0 else buffer.clone()


def value_type(transfer: str, dtype: torch.dtype) -> torch.dtype:
    """The type of values in a transfer format; `dtype`, that of merging, in fp32."""
    return {"fp32": dtype, "bf16": torch.bfloat16, "int8": torch.int8}[transfer]


def count_steps(transfer: str, counts: Sequence[int]) -> list[int]:
    """The steps of segments with these numbers of values: one per block in int8, else none."""
    return [-(-count // BLOCK) if transfer == "int8" else 0 for count in counts]


class Packing:
    """Packs the contribution of a group's plan into one buffer, and unpacks it.

    Attributes:
        counts: values sent of each segment: each adapted weight's factors, then the replicas, if there are any; no statistics.
        size: bytes of the buffer.
    """

    def __init__(self, plan: Plan, merge: MergeConfig, dtype: torch.dtype = torch.float32) -> None:
        self.format = merge.transfer
        self._exact, self._rounded = split_statistics(plan)
        self._replicas = count_rounded_replicas(plan)
        self._num_sent = replica_elements_sent(self._replicas, merge)
        self.counts = [a.rank * sum(a.matrix) for a in plan.adapted] + [self._num_sent] * bool(self._replicas)
        as_bitmap = use_bitmap(self._replicas, self._num_sent)
        self._fields = BufferFields(
            exact=(dtype, sum(lengths(self._exact))),
            values=(value_type(self.format, dtype), sum(self.counts)),
            steps=(torch.float32, sum(count_steps(self.format, self.counts))),
            indices=(torch.int32, self._num_sent if self._sparse and not as_bitmap else 0),
            bitmap=(torch.uint8, -(-self._replicas // 8) if self._sparse and as_bitmap else 0),
        )
        self.size = self._fields.size

    @property
    def _sparse(self) -> bool:
        return self._num_sent < self._replicas

    def encode(self, segments: Sequence[Tensor], references: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Packs the segments, minus their references, into a new buffer (uint8).

        Args:
            segments: flat tensors, one per entry of `counts`, but with all replica elements.
            references: the reference of each segment; None subtracts nothing.
        """
        buffer = torch.empty(self.size, dtype=torch.uint8, device=device)
        segments = list(segments)
        if self._exact:
            replicas = segments.pop()
            torch.cat([replicas[part] for part in self._exact], out=self._fields.view(buffer, "exact"))
            segments += [torch.cat([replicas[part] for part in self._rounded])] if self._rounded else []
            references = references[: len(segments)]
        if self._sparse:
            indices = largest_indices(segments[-1], self._num_sent)
            segments[-1] = segments[-1][indices]
            self._write_indices(buffer, indices)
        for x, reference, codes, steps in zip(segments, references, *self._codes_and_steps(buffer), strict=True):
            encode_values(x, reference, codes, steps)
        return buffer

    def decode(self, buffer: Tensor, references: Sequence[Tensor | None], outs: Sequence[Tensor]) -> None:
        """Writes what `encode` packed, plus the references, into `outs` (flat tensors, with all replica elements).

        Raises:
            ValueError: the buffer has the wrong length or type, or names replica elements that don't exist.
        """
        buffer = self.check_buffer(buffer)
        outs = list(outs)
        if self._exact:
            whole = outs.pop()
            scatter(self._fields.view(buffer, "exact"), whole, self._exact)
            outs += [whole.new_empty(self._replicas)] if self._rounded else []
            references = references[: len(outs)]
            others = outs[-1] if self._rounded else whole[:0]
        if self._sparse:
            indices, replicas = self._read_indices(buffer), outs[-1]
            outs[-1] = replicas.new_empty(self._num_sent)
        for codes, steps, reference, out in zip(*self._codes_and_steps(buffer), references, outs, strict=True):
            decode_values(codes, steps, reference, out)
        if self._sparse:
            replicas.zero_()[indices] = outs[-1]
        if self._exact:
            scatter(others, whole, self._rounded)

    def check_buffer(self, buffer: Tensor) -> Tensor:
        """Returns the buffer, aligned so that it can be viewed as other types.

        Raises:
            ValueError: the buffer has the wrong length or type.
        """
        return self._fields.check_buffer(buffer, "contribution", self.format)

    def _codes_and_steps(self, buffer: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Returns views of each segment's values and steps in the buffer."""
        values, steps = self._fields.view(buffer, "values"), self._fields.view(buffer, "steps")
        return torch.split(values, self.counts), torch.split(steps, count_steps(self.format, self.counts))

    def _write_indices(self, buffer: Tensor, indices: Tensor) -> None:
        bitmap = self._fields.view(buffer, "bitmap")
        if not bitmap.numel():
            self._fields.view(buffer, "indices").copy_(indices)
            return
        bits = torch.zeros(8 * bitmap.numel(), dtype=torch.uint8, device=buffer.device)
        bits[indices] = 1
        torch.sum(bits.view(-1, 8) * _powers_of_two(buffer.device), 1, dtype=torch.uint8, out=bitmap)

    def _read_indices(self, buffer: Tensor) -> Tensor:
        bitmap = self._fields.view(buffer, "bitmap")
        if not bitmap.numel():
            indices = self._fields.view(buffer, "indices").long()
            if bool((indices[:-1] >= indices[1:]).any()) or int(indices[0]) < 0 or int(indices[-1]) >= self._replicas:
                raise ValueError(f"expected {self._num_sent} ascending indices of replica elements below {self._replicas}")
            return indices
        indices = (bitmap.unsqueeze(1) & _powers_of_two(buffer.device)).view(-1).nonzero().view(-1)
        if indices.numel() != self._num_sent or int(indices[-1]) >= self._replicas:
            found = f"{indices.numel()}{f', up to {int(indices[-1])}' if indices.numel() else ''}"
            raise ValueError(f"expected {self._num_sent} replica elements below {self._replicas}, found {found}")
        return indices


def split_statistics(plan: Plan) -> tuple[list[slice], list[slice]]:
    """Returns where running statistics lie in a plan's flat replicas, and where the other replicas do; no empty ones."""
    parts: tuple[list[slice], list[slice]] = ([], [])
    begin = 0
    for replica in plan.replicas:
        end = begin + math.prod(replica.shape)
        if end > begin:
            parts[0 if replica.buffer else 1].append(slice(begin, end))
        begin = end
    return parts


def count_rounded_replicas(plan: Plan) -> int:
    """Returns the number of replica elements that aren't running statistics."""
    return sum(lengths(split_statistics(plan)[1]))


def lengths(parts: Sequence[slice]) -> list[int]:
    """Returns how many elements of a flat tensor each of these parts has."""
    return [part.stop - part.start for part in parts]


def scatter(values: Tensor, into: Tensor, parts: Sequence[slice]) -> None:
    """Writes consecutive values to these parts of a flat tensor."""
    for piece, part in zip(torch.split(values, lengths(parts)), parts, strict=True):
        into[part] = piece


def replica_elements_sent(replicas: int, merge: MergeConfig) -> int:
    """Returns how many replica elements are sent: the fraction `replica_topk`, or all if that takes no more bytes.

    `replicas` is how many there are, without running statistics, which are always sent.
    """
    count = min(replicas, max(1, round(merge.replica_topk * replicas)))
    width = VALUE_BYTES[merge.transfer]
    return count if count * width + index_bytes(replicas, count) < replicas * width else replicas


def index_bytes(replicas: int, count: int) -> int:
    """Returns the bytes that encode which `count` replica elements are sent; 0 if all are."""
    if count >= replicas:
        return 0
    return -(-replicas // 8) if use_bitmap(replicas, count) else 4 * count


def use_bitmap(replicas: int, count: int) -> bool:
    """Returns whether a bitmap of all elements takes fewer bytes than an int32 index per sent element, or is the only way."""
    return -(-replicas // 8) < 4 * count or replicas >= 2**31


def largest_indices(x: Tensor, count: int) -> Tensor:
    """Returns the indices, ascending, of the `count` elements of largest |value|; NaN counts as the largest.

    For few of many elements, first drops the elements below a bound estimated from a sample: exact, and several times faster
    on a CPU.
    """
    size = x.abs()
    if len(size) > max(16 * SAMPLE_SIZE, 4 * count):
        sample = size[:: len(size) // SAMPLE_SIZE | 1]  # an odd stride covers all columns of most matrices
        expected = count / len(size) * len(sample)
        rank = min(len(sample), int(expected + 6 * expected**0.5) + 6)
        candidates = (size < sample.topk(rank).values[-1]).logical_not_().nonzero().view(-1)
        if len(candidates) >= count:
            return candidates[size[candidates].topk(count, sorted=False).indices].sort().values
    return size.topk(count, sorted=False).indices.sort().values


def _powers_of_two(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
