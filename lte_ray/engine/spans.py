"""Names of parts of the work in the traces of torch's profiler (``--profile``)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.autograd import profiler


def span(name: str) -> AbstractContextManager[Any]:
    """Names the block in a trace; costs nothing while none is recorded."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else nullcontext()
