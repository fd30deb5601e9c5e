"""The settings of a simulated cluster: the speed of its heads, links and coordinator, and its failures."""

from __future__ import annotations

from dataclasses import dataclass

from lte_ray.config.units import read_units
from lte_ray.config.validation import check_at_least, setting
from lte_ray.errors import ConfigError


@dataclass(frozen=True)
class ClusterModel:
    """A simulated cluster. The defaults describe an ordinary one: ten local steps per second, links of 10 Gbit/s."""

    step_seconds: float = setting(0.1, "Time of a local step on a head of speed 1.", unit="time")
    speeds: tuple[float, ...] = setting(
        (),
        "Duration of a head's steps relative to --step-seconds (4: four times slower), one per head; fewer are repeated.",
    )
    jitter: float = setting(0.0, "Spread of the step time: the standard deviation of its logarithm. The mean stays.")
    straggler_rate: float = setting(0.0, "Probability that all steps of a head's round are slow.")
    straggler_factor: float = setting(4.0, "How many times slower the steps of such a round are.")
    bandwidth: float = setting(
        1.25e9, "Bandwidth of each head's link in each direction, e.g. 10Gbit or 1.25GB a second; 0: unlimited.", unit="rate"
    )
    coordinator_bandwidth: float = setting(
        0.0,
        "Bandwidth of the coordinator's link (of each shard's, with --shards); 0: the same as a head's.",
        unit="rate",
    )
    machines: int = setting(
        0,
        "Machines that the heads are divided over, the coordinator being on the first; 0: one for each head, and one for the "
        "coordinator.",
    )
    latency: float = setting(0.0005, "Time that a message takes in addition to the transfer of its bytes.", unit="time")
    message_seconds: float = setting(0.0005, "Time that the coordinator spends on each message it receives.", unit="time")
    merge_flops: float = setting(
        2e11, "Floating-point operations per second of the coordinator's matrix products; 0: unlimited."
    )
    merge_memory: float = setting(
        2.5e10, "Rate at which the coordinator reads and writes contributions and weights; 0: unlimited.", unit="rate"
    )
    rebase_seconds: float = setting(0.0, "Time that a head stops training to adopt a newer base.", unit="time")
    evaluate_seconds: float = setting(0.0, "Time of an evaluation that a policy requests.", unit="time")
    faults_per_hour: float = setting(0.0, "Failures of a head per hour on average, at exponentially distributed intervals.")
    restart_seconds: float = setting(30.0, "Time until a failed head requests the base again.", unit="time")

    def __post_init__(self) -> None:
        read_units(self)
        check_at_least(self, 0, "jitter", "straggler_rate", "bandwidth", "coordinator_bandwidth", "latency", "message_seconds")
        check_at_least(self, 0, "step_seconds", "merge_flops", "merge_memory", "rebase_seconds", "evaluate_seconds")
        check_at_least(self, 0, "faults_per_hour", "restart_seconds", "straggler_factor")
        check_at_least(self, 0, "machines")
        if self.machines and self.coordinator_bandwidth:
            raise ConfigError(
                f"--machines {self.machines} puts the coordinator on a machine with heads, whose link is --bandwidth, so "
                f"--coordinator-bandwidth {self.coordinator_bandwidth:g} has no effect. Leave one of the two out."
            )
        object.__setattr__(self, "speeds", tuple(self.speeds))
        if self.step_seconds <= 0 or not all(isinstance(s, int | float) and 0 < s < float("inf") for s in self.speeds):
            raise ConfigError(
                f"--step-seconds is {self.step_seconds} and --speeds {list(self.speeds)}, but they must be above 0 and finite."
            )
        if self.straggler_rate > 1:
            raise ConfigError(f"--straggler-rate is {self.straggler_rate}, but it is a probability: at most 1.")

    def speed(self, head: int) -> float:
        """How many times slower than nominal this head is."""
        return float(self.speeds[head % len(self.speeds)]) if self.speeds else 1.0
