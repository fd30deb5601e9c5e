"""Matrix products of an optimizer's step in full float32, whatever the model is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch

_lock = Lock()
_steps = 0
_before: tuple[str, ...] = ()


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Within the block float32 matrices are multiplied in float32: without autocast, TF32 or bfloat16.

    With products in TF32, iterations of `inverse_square_root` on ill-conditioned matrices diverge, because the rounding makes
    them indefinite. torch has these settings once per process, so of several threads the first changes them and the last
    restores them.
    """
    global _steps, _before  # noqa: PLW0603  # torch's setting is global, too
    with _lock:
        if not _steps:
            _before = _read()
            _write(tuple("none" if value == "none" else _EXACT for value in _before))
        _steps += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _steps -= 1
            if not _steps:
                _write(_before)


_BY_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")
"""Whether torch has a setting for each backend, as from 2.9 on; reading the older one then fails if the new ones were used."""

_EXACT = "ieee" if _BY_BACKEND else "highest"


def _backends() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


def _read() -> tuple[str, ...]:
    if _BY_BACKEND:
        return tuple(backend.fp32_precision for backend in _backends())
    return (torch.get_float32_matmul_precision(),)


def _write(values: tuple[str, ...]) -> None:
    if values == _read():
        return
    if _BY_BACKEND:
        for backend, value in zip(_backends(), values, strict=True):
            backend.fp32_precision = value
    else:
        torch.set_float32_matmul_precision(values[0])
