"""The number that tells whether what was sent is what has arrived."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor


def buffers_checksum(buffers: Sequence[Tensor]) -> int:
    """A number of 32 bits that says whether a contribution's buffers arrived as they were sent: the CRC-32 of their bytes.

    It sees every error that spans at most 32 bits, and all but one in 2^32 of any others: each buffer's type and shape are
    counted with its bytes, so swapped, shortened and joined buffers are seen, too. It finds accidents; who changes bytes on
    purpose can make it fit. One core does several GB a second.

    Args:
        buffers: of any type, packed uint8 among them; those on a GPU are copied to the CPU.
    """
    value = 0
    for buffer in buffers:
        value = crc32(f"{buffer.dtype} {tuple(buffer.shape)}".encode(), value)
        value = crc32(buffer.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, value)
    return value


def verify_checksums(buffers: Sequence[Tensor], seals: Sequence[int]) -> None:
    """Raises ValueError unless each buffer arrived as it was sealed; without seals nothing is checked."""
    for index, (buffer, sent) in enumerate(zip(buffers, seals, strict=False)):
        found = buffers_checksum([buffer])
        if found != sent:
            raise ValueError(f"its buffer {index} didn't arrive as it was sent (checksum {found:08x}, expected {sent:08x})")


def base_checksum(flat: Tensor) -> int:
    """A number of 64 bits that says whether two tensors hold the same bits (fp32 or fp64).

    The sum, modulo 2^64, of a one-to-one function of each element's bits: exact on any device and in any order, certain to
    see a change of one element, and additive: a tensor's is the sum of its pieces' modulo 2^64. Elements that change
    places are not seen.
    """
    wide = flat.dtype == torch.float64
    words = flat.detach().contiguous().view(torch.int64 if wide else torch.int32).view(-1)
    total = 0
    for piece in words.split(1 << 16 if flat.device.type == "cpu" else 1 << 26):  # type: ignore[no-untyped-call]
        mixed = piece * (-0x61C8864680B583EB if wide else -0x61C88647)  # odd, so one to one modulo 2^32 and 2^64
        mixed ^= mixed << 13  # one to one too; not linear, so that two small changes don't cancel
        total += int(mixed.sum(dtype=torch.int64))
    return total % 2**64
