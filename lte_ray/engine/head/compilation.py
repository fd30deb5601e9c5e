"""Whether torch is compiling in this process, which may take minutes in which no head moves."""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import torch

from lte_ray.config import TrainConfig
from lte_ray.errors import ConfigError


def check_compile(train: TrainConfig, version: str = torch.__version__) -> None:
    """Raises ConfigError if ``--compile`` is set, and this version of torch can't compile models with factors.

    Its Dynamo recurses without end where a model's class has weights as properties. torch 2.13 compiles them.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if train.compile and (major, minor) < (2, 8):
        raise ConfigError(
            f"--compile is set, but torch {version} fails to compile models with factors. Leave it out, or upgrade torch: 2.13 "
            "compiles them."
        )


class CompilationWatch:
    """Counts compilations that are under way, in any thread.

    Importing torch's compiler takes seconds, so `register` does nothing until something else has imported it.
    """

    def __init__(self) -> None:
        self._lock, self._running, self._registered = Lock(), 0, False

    @property
    def active(self) -> bool:
        """Whether torch compiles now."""
        return self._running > 0

    def register(self) -> None:
        """Begins to count, if the compiler has been imported; may be called often."""
        compiler = sys.modules.get("torch._dynamo.callback")
        with self._lock:
            if compiler is not None and not self._registered:
                self._registered = True
                compiler.callback_handler.register_start_callback(lambda *_: self._count(1))
                compiler.callback_handler.register_end_callback(lambda *_: self._count(-1))

    def _count(self, change: Any) -> None:
        with self._lock:
            self._running = max(0, self._running + change)


COMPILATION = CompilationWatch()
"""Of this process: its heads wait for each other's compilations."""
