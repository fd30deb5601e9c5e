"""``lte-ray sweep``: trains a worker with many configurations next to each other, and says which is best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lte_ray.cli.call import CallOptions, print_json
from lte_ray.cli.comparison_folder import claimed, folder_name, open_folder, open_results, shared_settings
from lte_ray.cli.flags import HELP, HELP_ALL, Subcommand, parse_sections
from lte_ray.cli.sweep_flags import TITLES, covering, first_values, read_sweep, switches, to_arguments, training_command
from lte_ray.cli.train import with_run
from lte_ray.cli.worker_argument import make_without_settings, read_worker
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.sweep import RESULTS, SweepConfig, Values, choose_configurations
from lte_ray.errors import RunError, UserError

if TYPE_CHECKING:
    from lte_ray.ladder import Figure, ResultsFile
    from lte_ray.storage import RunDirectory
    from lte_ray.sweep import Trial, TrialResult, TrialSettings

TABLE = "sweep.md"

SWEEP = Subcommand(
    "sweep",
    "Which settings are best? Trains WORKER with many values of the flags that --over names, as many trainings at once as the "
    "cluster has room for, and ends those early that are worse than others after as many samples. Each trial is a run in the "
    "sweep's folder. Shows a table, best first. It takes the flags of train. With the --name of an earlier call it continues "
    "that.",
    TITLES,
    ("over", "num_trials", "seeds", "max_concurrent", "num_heads", "steps", "best_by", "name", "storage"),
)


@dataclass(frozen=True)
class _Command:
    """The command line of a sweep, from which those of its trials are made."""

    program: str
    kind: type
    arguments: list[str]
    switches: set[str]

    def parse(self, values: Values, seed: int | None = None) -> tuple[dict[type, Any], Any]:
        """Returns the settings of a trial by their class, and its worker.

        Raises:
            UserError: they can't be; the message begins with the configuration.
        """
        from lte_ray.sweep.trials import describe

        own = [*to_arguments(values, self.switches), *([] if seed is None else ["--seed", str(seed)])]
        try:
            sections, worker = parse_sections(self.kind, self.program, [*self.arguments, *own], SWEEP)
            return sections, make_without_settings(self.program, self.kind) if worker is None else worker
        except UserError as error:
            raise type(error)(f"With {describe(dict(values))}: {error}") from error

    def make(self, trial: Trial) -> TrialSettings:
        """Returns what a trial trains."""
        from lte_ray.sweep import TrialSettings

        sections, worker = self.parse(trial.values, trial.seed)
        storage: StorageConfig = sections[StorageConfig]
        return TrialSettings(
            worker,
            sections[LTEConfig],
            sections[MergeConfig],
            with_run(sections[TrainConfig], storage.storage),
            sections[PlacementConfig],
            sections[FailureConfig],
            storage,
        )

    def describe(self, result: TrialResult) -> str:
        """Returns the ``lte-ray train`` command that trains a trial again."""
        own = to_arguments(tuple(result.values.items()), self.switches)
        return training_command(self.program, self.arguments, [*own, "--seed", str(result.seed)])


def sweep(arguments: list[str]) -> None:
    """Runs the subcommand with the arguments after ``sweep``.

    Raises:
        UserError: a value of a flag can't be, alone or with the others; nothing was started.
        RunError: no trial was trained to its end.
    """
    program, kind, rest = read_worker(arguments, "sweep")
    if kind is None or {*HELP, HELP_ALL} & set(rest):
        parse_sections(kind, program or "WORKER", rest, SWEEP)
    assert kind is not None  # the help has ended the program
    config = read_sweep(rest, SWEEP)
    command = _Command(program, kind, rest, switches(kind, rest))
    sections, worker = command.parse(first_values(config.axes))
    with sections[CallOptions].running():
        _sweep(command, worker, sections)


def _sweep(command: _Command, worker: Any, sections: dict[type, Any]) -> None:
    """Trains what isn't trained yet, and shows the result."""
    from lte_ray.cli.sweep_display import SweepDisplay
    from lte_ray.ladder import ResultsFile
    from lte_ray.runtime.cluster import connected
    from lte_ray.sweep import Halving, SweepEngine, Trial, TrialResult
    from lte_ray.sweep.checks import check_trials
    from lte_ray.sweep.ray_trials import RayTrials

    config, storage, call = sections[SweepConfig], sections[StorageConfig], sections[CallOptions]
    console = Console(stderr=True, highlight=False, quiet=call.quiet)  # of progress and notes
    seeds = config.seeds or (sections[TrainConfig].seed,)
    configurations = choose_configurations(config.axes, config.num_trials, seeds[0])
    trials = [Trial.make(number, values, seeds[0]) for number, values in enumerate(configurations)]
    to_prepare = set(covering(config.axes, configurations))
    checked = check_trials(trials, command.make, to_prepare, config)
    for note in checked.notes:
        console.print(Text(note), soft_wrap=True)
    directory = open_folder(storage, command.program, "sweep")
    with claimed(directory, RESULTS, "sweep", storage.overwrite) as directory:
        file = ResultsFile(directory, RESULTS, _settings(command, worker, sections, seeds[0]), TrialResult)
        open_results(file, "trials", console)
        display = SweepDisplay(console, checked.figure, len(trials))
        try:
            with connected(), display.running():
                launcher = RayTrials(command.make, command.program, _place(storage, directory))
                launcher.check([trial for trial in trials if trial.values in to_prepare])
                halving = None
                if checked.halves:
                    halving = Halving(config.asha_start * checked.samples, checked.samples, config.asha_factor)
                engine = SweepEngine(file, launcher, checked.figure, display, halving, config.max_concurrent)
                results = engine.run(trials)
                more = _finalists(results, checked.figure, config.finalists, seeds)
                display.expect(len(more))
                results += engine.run(more, halves=False)
        except KeyboardInterrupt:
            console.print(
                Text(f"{len(file)} trials are done. Give --name {folder_name(directory)} to continue."), soft_wrap=True
            )
            raise
        _show(directory, file, results, checked.figure, seeds, command, call.json)


def _finalists(results: Sequence[TrialResult], figure: Figure, number: int, seeds: Sequence[int]) -> list[Trial]:
    """The trials of the best configurations with the other seeds."""
    from lte_ray.sweep import Trial, rank

    best = [each.first for each in rank(results, figure) if each.finished][:number]
    return [Trial.make(r.number, tuple(r.values.items()), seed, first=False) for r in best for seed in seeds[1:]]


def _place(storage: StorageConfig, directory: RunDirectory) -> str:
    """The folder or URI of the sweep, as the storage of its trials: parameters of a URI stay at its end."""
    uri = storage.storage or ""
    if "://" not in uri:
        return directory.path
    place, mark, query = uri.partition("?")
    return f"{place.rstrip('/')}/{folder_name(directory)}{mark}{query}"


def _settings(command: _Command, worker: Any, sections: dict[type, Any], seed: int) -> dict[str, Any]:
    """The settings that all trials share, and those of the sweep that decide what they are."""
    config: SweepConfig = sections[SweepConfig]
    names = [axis.flag.replace("-", "_") for axis in config.axes]
    shared = shared_settings(command.program, worker, sections, names)
    for name in names:
        table, _, own = name.partition(".")
        shared.get({"policy": "policy_args"}.get(table, table), {}).pop(own, None) if own else None
    kept = ("scheduler", "asha_start", "asha_factor")
    return {**shared, "over": list(config.over), "first_seed": seed, **{name: getattr(config, name) for name in kept}}


def _show(
    directory: RunDirectory,
    file: ResultsFile[TrialResult],
    results: Sequence[TrialResult],
    figure: Figure,
    seeds: Sequence[int],
    command: _Command,
    as_json: bool,
) -> None:
    """Prints the table and the best configuration, or both as JSON, and writes them into the folder.

    Raises:
        RunError: no trial was trained to its end.
    """
    from lte_ray.run.display import format_duration
    from lte_ray.sweep import rank
    from lte_ray.sweep.table import explain, make_markdown, make_table

    ranked = rank(results, figure)
    best = ranked[0].first if ranked[0].finished else None
    again = command.describe(best) if best is not None else ""
    took = format_duration(sum(each.seconds for each in results))
    title = f"{command.program}: {len(ranked)} configurations, {took} of training"
    text = explain(ranked, figure, seeds)
    chosen = None if best is None else {"name": best.name, "values": dict(best.values), "command": again}
    file.write(figure=figure.name, higher_is_better=figure.higher_is_better, best=chosen)
    directory.write(TABLE, make_markdown(ranked, figure, title, text, again).encode())
    console = Console(highlight=False, quiet=as_json)
    console.print()
    console.print(make_table(ranked, figure, title))
    console.print()
    for line in text:
        console.print(Text(line, style="dim"), soft_wrap=True)
    if best is not None:
        console.print(Text(f"\nThe best is {best.name}:"), Text(f"\n{again}\n", style="bold"), soft_wrap=True)
    console.print(Text(f"{directory.display}: {RESULTS}, {TABLE}, and a run for each trial"), soft_wrap=True)
    if best is None:
        raise RunError("No trial was trained to its end.")
    if as_json:
        print_json({"run": directory.display, "title": title, **json.loads(directory.read(RESULTS))})
