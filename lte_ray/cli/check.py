"""``lte-ray check``: tries a worker out in this process, and says what is wrong with it. Starts no Ray."""

from __future__ import annotations

from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.flags import SECTION_TITLES, Subcommand
from lte_ray.cli.worker_argument import read_worker_and_settings
from lte_ray.config import LTEConfig, MergeConfig, PlacementConfig, TrainConfig

CHECK = Subcommand(
    "check",
    "Tries out a run with the same flags in this process, without Ray: builds and converts the model, takes a few steps, a "
    "merge, an evaluation, a save and a resume, and says what is wrong and where time goes. It leaves nothing behind.",
    {**SECTION_TITLES, CallOptions: "call"},
    ("num_heads", "lora_r", "merge_iter", "policy", "precision", "others", "gpus_per_head", "json", "quiet"),
)

FAILED = 1
"""Exit code where something is wrong."""


def check(arguments: list[str]) -> int:
    """Runs the subcommand with the arguments after ``check``. Returns the exit code.

    Raises:
        LTEError: as a run's, for settings that contradict each other.
    """
    program, worker, sections = read_worker_and_settings(arguments, CHECK)

    from lte_ray.checking import check_run
    from lte_ray.engine.settings import Settings

    call: CallOptions = sections[CallOptions]
    settings = Settings("check", sections[LTEConfig], sections[MergeConfig], sections[TrainConfig])
    placement: PlacementConfig = sections[PlacementConfig]
    with call.running():
        report = check_run(worker, settings, "cpu" if placement.gpus_per_head == 0 else "auto")
    if call.json:
        print_json(report.to_json())
    else:
        from lte_ray.cli.check_display import show

        show(report, program, quiet=call.quiet)
    return 0 if report.ok else FAILED
