"""``lte-ray ladder``: trains a worker in the ordinary way and with heads, and says where heads fall behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.comparison_folder import claimed, folder_name, open_folder, open_results, shared_settings
from lte_ray.cli.flags import SECTION_TITLES, Subcommand, parse_sections
from lte_ray.cli.worker_argument import make_without_settings, read_worker
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.ladder import RESULTS, LadderConfig
from lte_ray.errors import ConfigError

if TYPE_CHECKING:
    from lte_ray.ladder import Arm, ArmResult, Figure, Listener, ResultsFile, RungResult
    from lte_ray.storage import RunDirectory

TABLE, PICTURE = "ladder.md", "ladder.svg"

LADDER = Subcommand(
    "ladder",
    "Is it as good as ordinary training? Trains WORKER in the ordinary way, as mhlora, and with heads that merge after every "
    "step and then less often, all on equally many samples and at several learning rates. Shows a table, draws a picture, and "
    "says what to change where heads fall behind. It takes the flags of train. With the --name of an earlier call it continues "
    "that.",
    {LadderConfig: "ladder", **SECTION_TITLES, CallOptions: "call"},
    ("num_heads", "steps", "rungs", "merge_iters", "rates", "figure", "on", "quick", "name", "storage"),
)

OF_ARMS = ("merge_iter", "lr_scale", "baseline")
"""Settings that differ between arms."""


def ladder(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``ladder``.

    Raises:
        LTEError: as a run's, and for settings that can't be compared.
    """
    program, kind, rest = read_worker(arguments, "ladder")
    sections, worker = parse_sections(kind, program or "WORKER", rest, LADDER)
    assert kind is not None  # the help has ended the program
    with sections[CallOptions].running():
        _climb(program, worker if worker is not None else make_without_settings(program, kind), sections)


def _climb(program: str, worker: Any, sections: dict[type, Any]) -> None:
    """Trains what isn't trained yet, and shows the result."""
    from lte_ray.cli.ladder_display import LadderDisplay
    from lte_ray.ladder import ResultsFile, check_arms, climb
    from lte_ray.ladder.rungs import make_rungs

    call: CallOptions = sections[CallOptions]
    console = Console(stderr=True, highlight=False, quiet=call.quiet)  # of progress and notes
    config, train = sections[LadderConfig], sections[TrainConfig]
    arms = make_rungs(config, sections[LTEConfig], sections[MergeConfig], train)
    seeds = config.seeds or (train.seed,)
    tuning_seed = seeds[0] if config.tuning_seed is None else config.tuning_seed
    checked = check_arms(worker, arms, config.rates, config.figure)
    directory = open_folder(sections[StorageConfig], program, "ladder")
    settings = _shared_settings(program, worker, sections, arms[0])
    with claimed(directory, RESULTS, "ladder", sections[StorageConfig].overwrite) as directory:
        file: ResultsFile[ArmResult] = ResultsFile(directory, RESULTS, settings)
        open_results(file, "trainings", console)
        display = LadderDisplay(console, checked.figure)
        results: list[RungResult] = []
        try:
            with _runner(program, worker, sections, directory) as run_arm, display.running():

                def run(arm: Arm) -> ArmResult:
                    earlier = file.get(arm)
                    if earlier is None:
                        display.begin(arm)
                        file.add(run_arm(arm, display.advance))
                    result = file.get(arm)
                    assert result is not None
                    display.end(result, arm.label, earlier is not None)
                    return result

                for index, arm in enumerate(arms):
                    display.expect((len(arms) - index) * (len(config.rates) + len({*seeds} - {tuning_seed})))
                    options = {"tuning_seed": tuning_seed, "extend": config.extend}
                    results.append(climb(arm, config.rates, seeds, run, checked.figure, **options))
        except KeyboardInterrupt:
            console.print(
                Text(f"{len(file)} trainings are done. Give --name {folder_name(directory)} to continue."), soft_wrap=True
            )
            raise
        file.write(figure=checked.figure.name, best={result.name: result.rate for result in results})
        _show(directory, results, checked, _title(program, arms[0], results, config), call.json)


def _shared_settings(program: str, worker: Any, sections: dict[type, Any], arm: Arm) -> dict[str, Any]:
    """The settings that all arms of a ladder share, as JSON has them; without secrets."""
    train = dataclasses.replace(sections[TrainConfig], steps=arm.train.steps)
    shared = shared_settings(program, worker, {**sections, TrainConfig: train}, OF_ARMS)
    return {**shared, "on": sections[LadderConfig].on}


@contextlib.contextmanager
def _runner(
    program: str, worker: Any, sections: dict[type, Any], directory: RunDirectory
) -> Iterator[Callable[[Arm, Listener], ArmResult]]:
    """What trains an arm, where `--on` says; on Ray connected for the block."""
    from lte_ray.ladder import ProcessRunner

    if sections[LadderConfig].on == "process":
        yield ProcessRunner(worker)
        return
    from lte_ray.ladder.ray_runner import RayRunner
    from lte_ray.runtime.cluster import connected

    with connected():
        yield RayRunner(worker, program, directory, sections[PlacementConfig], sections[FailureConfig], sections[StorageConfig])


def _title(program: str, arm: Arm, results: Sequence[RungResult], config: LadderConfig) -> str:
    samples = max((p.samples for r in results for a in r.best.values() for p in a.points), default=0)
    quick = ", quick" if config.quick else ""
    return f"{program}: {arm.lte.num_heads} heads, {arm.train.steps} steps, {samples:,} samples{quick}"


def _show(directory: RunDirectory, results: Sequence[RungResult], checked: Any, title: str, as_json: bool) -> None:
    """Prints the table and the advice, or the results as JSON, and writes both, and the picture, into the folder."""
    from lte_ray.ladder import advise, summarize
    from lte_ray.ladder.picture import draw
    from lte_ray.ladder.table import explain, make_markdown, make_table

    figure: Figure = checked.figure
    summaries = summarize(results, figure)
    advice, explanation = advise(summaries, checked.facts), explain(summaries, checked.facts.optimizers)
    console = Console(highlight=False, quiet=as_json)
    console.print()
    console.print(make_table(summaries, title))
    console.print()
    for line in explanation:
        console.print(Text(line, style="dim"))
    console.print()
    console.print(Panel(Text("\n".join(advice)), title="advice", title_align="left"))
    picture = PICTURE
    try:
        directory.write(PICTURE, draw(summaries, title))
    except ConfigError as error:
        picture = ""
        console.print(Text(str(error)), soft_wrap=True)
    directory.write(TABLE, make_markdown(summaries, title, explanation, advice, picture).encode())
    files = ", ".join(filter(None, [RESULTS, TABLE, picture]))
    console.print(Text(f"{directory.display}: {files}"), soft_wrap=True)
    if as_json:
        print_json({"run": directory.display, "title": title, "advice": advice, **json.loads(directory.read(RESULTS))})
