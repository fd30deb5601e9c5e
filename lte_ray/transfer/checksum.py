"""Checksums of what is transferred: a CRC of a contribution's buffers, and an additive one of a base."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor


def buffers_checksum(buffers: Sequence[Tensor]) -> int:
    """Returns the CRC-32 of a contribution's buffers, to verify that they arrived as they were sent.

    Detects every error that spans at most 32 bits, and all but one in 2^32 of other errors. The checksum includes each buffer's
    type and shape, so it also detects swapped, shortened and joined buffers. It protects against accidents, not against an
    attacker, who could forge it. One core processes several GB per second.

    Args:
        buffers: of any type, including packed uint8; those on a GPU are copied to the CPU.
    """
    value = 0
    for buffer in buffers:
        value = crc32(f"{buffer.dtype} {tuple(buffer.shape)}".encode(), value)
        value = crc32(buffer.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, value)
    return value


def verify_checksums(buffers: Sequence[Tensor], checksums: Sequence[int]) -> None:
    """Raises ValueError unless each buffer has its checksum; without checksums, verifies nothing."""
    for index, (buffer, expected) in enumerate(zip(buffers, checksums, strict=False)):
        actual = buffers_checksum([buffer])
        if actual != expected:
            raise ValueError(
                f"its buffer {index} didn't arrive as it was sent (checksum {actual:08x}, expected {expected:08x})"
            )


def base_checksum(flat: Tensor) -> int:
    """Returns a 64-bit checksum of a tensor's bits (fp32 or fp64), to compare copies of a base.

    It is the sum, modulo 2^64, of a one-to-one function of each element's bits. So it is exact on any device, certain to detect
    a change of one element, and additive: a tensor's checksum is the sum of its pieces' checksums modulo 2^64. It doesn't
    detect elements that were swapped.
    """
    wide = flat.dtype == torch.float64
    words = flat.detach().contiguous().view(torch.int64 if wide else torch.int32).view(-1)
    total = 0
    for piece in words.split(1 << 16 if flat.device.type == "cpu" else 1 << 26):  # type: ignore[no-untyped-call]
        mixed = piece * (-0x61C8864680B583EB if wide else -0x61C88647)  # odd, so one to one modulo 2^32 and 2^64
        mixed ^= mixed << 13  # also one to one; not linear, so that two small changes don't cancel
        total += int(mixed.sum(dtype=torch.int64))
    return total % 2**64
