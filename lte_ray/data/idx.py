"""Reads IDX files, the format of MNIST and its relatives, plain or compressed with gzip.

An IDX file is a header and the values: two zero bytes, a byte for the type (8: unsigned bytes), a byte for the number of
dimensions, each dimension as a big-endian 32-bit integer, and then the values in row-major order.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lte_ray.errors import DataError

UNSIGNED_BYTES = 0x08
GZIP = b"\x1f\x8b"


def read_idx(path: Path, dimensions: tuple[int, ...]) -> NDArray[np.uint8]:
    """Reads a whole IDX file of unsigned bytes; the array is read-only.

    Args:
        path: of the file; it may be compressed, whatever its name.
        dimensions: the numbers of dimensions that the array may have, e.g. (3,) for gray images and (1,) for labels.

    Raises:
        DataError: the file can't be read, isn't such a file, or has fewer or more values than its header says.
    """
    content = _read_bytes(path)
    magic, expected = content[:4], [bytes([0, 0, UNSIGNED_BYTES, n]) for n in dimensions]
    if magic not in expected:
        raise DataError(
            f"{path} isn't an IDX file of {' or '.join(map(str, dimensions))} dimension(s) of unsigned bytes: it begins with "
            f"{magic.hex(' ') or '(nothing)'}, not {' or '.join(m.hex(' ') for m in expected)}. Give the files as they are "
            "distributed, images and labels under their own names."
        )
    start = 4 + 4 * magic[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4", count=len(content[4:start]) // 4))
    values = math.prod(shape) if len(shape) == magic[3] else -1
    if values != len(content) - start:
        promised = f"{' x '.join(map(str, shape))} = {values} bytes" if values >= 0 else f"{magic[3]} dimensions"
        raise DataError(
            f"{path} is damaged: its header announces {promised}, but {max(0, len(content) - start)} bytes follow. Copy or "
            "download the file again."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: gzip can't decompress it ({error}). Copy or download the file again.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}.") from error
