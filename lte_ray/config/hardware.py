"""The machines for which a run is planned: GPUs by their memory or name, and links."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.config.units import read_units, size_in_bytes
from lte_ray.config.validation import check_at_least, check_integers, setting, suggest
from lte_ray.errors import ConfigError

GPUS = {
    "B200": 180e9, "H200": 141e9, "H100": 80e9, "A100-80GB": 80e9, "A100-40GB": 40e9, "L40S": 48e9, "A10": 24e9, "L4": 24e9,
    "V100-32GB": 32e9, "V100-16GB": 16e9, "T4": 16e9,
}  # fmt: skip
"""Bytes of memory of GPUs that are known by name."""


@dataclass(frozen=True)
class Hardware:
    """The machines for which a run is planned."""

    gpu: str = setting("", "GPU to plan for: its memory, e.g. 80GB or 24GiB, or its name: " + ", ".join(GPUS) + ".")
    num_gpus: int = setting(1, "Number of such GPUs.")
    link: float = setting(
        1.25e9, "Bandwidth of each machine's link in each direction, e.g. 1Gbit or 1.25GB a second.", unit="rate"
    )
    step_time: float = setting(
        0.0, "Time of a local step, if you have measured it; 0: estimated from its operations and the GPU.", unit="time"
    )

    def __post_init__(self) -> None:
        read_units(self)
        check_integers(self, "num_gpus")
        check_at_least(self, 1, "num_gpus", "link")
        check_at_least(self, 0, "step_time")
        if not isinstance(self.gpu, str):
            raise ConfigError(f"--gpu is {self.gpu!r}, but it must be text: a size such as 80GB, or a name such as H100.")
        if self.num_gpus > 1 and not self.gpu:
            raise ConfigError(f"--num-gpus is {self.num_gpus}, but --gpu doesn't say how large each is. Give e.g. --gpu 80GB.")
        _ = self.gpu_bytes

    @property
    def gpu_bytes(self) -> float:
        """Memory of each GPU; 0 without one.

        Raises:
            ConfigError: `gpu` is neither a size above 0 nor a known name.
        """
        if not self.gpu:
            return 0.0
        known = {name.lower(): size for name, size in GPUS.items()}
        if self.gpu.lower() in known:
            return known[self.gpu.lower()]
        size = size_in_bytes(self.gpu)
        if not size or size < 1:
            longer = next((f" Did you mean {name}?" for name in GPUS if name.startswith(self.gpu.upper())), "")
            raise ConfigError(
                f"--gpu is {self.gpu!r}, but it must be the memory of a GPU, such as 80GB or 24GiB, or one of the names "
                f"{', '.join(GPUS)}.{longer or suggest(self.gpu, GPUS)}"
            )
        return size
