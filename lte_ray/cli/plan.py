"""``lte-ray plan``: says what a run would train, need and send, and which settings suit given GPUs. Starts nothing."""

from __future__ import annotations

from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.flags import SECTION_TITLES, Subcommand
from lte_ray.cli.worker_argument import read_worker_and_settings
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.hardware import Hardware

PLAN = Subcommand(
    "plan",
    "Says what a run with the same flags would train, how much memory its processes need, and what its merges send; with "
    "--gpu, also which settings suit these GPUs. It starts nothing, and makes no weights: shapes are enough.",
    {**SECTION_TITLES, Hardware: "hardware", CallOptions: "call"},
    ("num_heads", "lora_r", "base_dtype", "others", "merge_iter", "transfer", "precision", "gpu", "num_gpus", "link", "json"),
)


def plan(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``plan``.

    Raises:
        LTEError: as a run's, for settings that contradict each other or don't fit the model.
    """
    program, worker, sections = read_worker_and_settings(arguments, PLAN)

    from lte_ray.engine.settings import Settings
    from lte_ray.planning import plan_run

    call: CallOptions = sections[CallOptions]
    settings = Settings("plan", sections[LTEConfig], sections[MergeConfig], sections[TrainConfig])
    with call.running():
        planned = plan_run(worker, settings, sections[Hardware])
    if call.json:
        print_json(planned.to_json())
        return
    from lte_ray.cli.plan_display import show

    show(planned, program)
