"""The folder of a ladder or a sweep: its results, and the trainings in it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.config.toml import DATA
from lte_ray.errors import StorageError

if TYPE_CHECKING:
    from lte_ray.ladder import ResultsFile
    from lte_ray.storage import RunDirectory

NOT_COMPARED = ("name", "storage", "seed", "omitted", DATA)
"""Settings that may differ between calls for one folder."""


def open_folder(storage: StorageConfig, program: str, what: str) -> RunDirectory:
    """Returns the folder --name in --storage; by default it is named by the worker, `what` it is, and the time."""
    from lte_ray.storage import RunDirectory, default_storage

    kind = program.rpartition(":")[2].lower()
    name = storage.name or f"{kind}-{what}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    directory = RunDirectory.open(storage.storage or default_storage(), name, patience=storage.storage_patience)
    directory.check_lasting()
    return directory


def folder_name(directory: RunDirectory) -> str:
    """The name of a folder."""
    return directory.path.rpartition("/")[2]


@contextlib.contextmanager
def claimed(directory: RunDirectory, results: str, what: str, overwrite: bool) -> Iterator[RunDirectory]:
    """Creates the folder, or checks that it is one of this kind, and holds its lock for the block.

    Yields:
        The directory that the block must write through.

    Args:
        results: the file that such a folder has.
        what: it is, for messages: "ladder" or "sweep".
        overwrite: whether to remove what is there.

    Raises:
        StorageError: another process trains there, or the folder has other content.
    """
    from lte_ray.storage import LEASE, LOCK, exclusive_lock

    if directory.exists() and not (directory.exists(results) or set(directory.list_names()) <= {LOCK, LEASE}):
        raise StorageError(f"{directory.display} has no {results}, so it isn't a {what}'s. Choose another --name.")
    directory.create()
    with exclusive_lock(directory) as owned:
        for name in owned.list_names() if overwrite else ():
            if name not in (LOCK, LEASE):
                owned.delete(name)
        yield owned


def open_results(file: ResultsFile[Any], what: str, console: Console) -> None:
    """Reads what an earlier call has left in the file, and says so; else creates it.

    Args:
        what: it holds, for messages: "trainings" or "trials".

    Raises:
        StorageError: as `ResultsFile.load`, or it can't be written.
    """
    file.load()
    if len(file):
        console.print(Text(f"{file.directory.display} continues: {len(file)} {what} are done."), soft_wrap=True)
    else:
        file.write()


def shared_settings(program: str, worker: Any, sections: dict[type, Any], left_out: Collection[str] = ()) -> dict[str, Any]:
    """The settings that all trainings of a folder share, as JSON has them; without secrets, and without `left_out`.

    What has no influence on what is trained isn't among them.
    """
    from lte_ray.engine.settings import Settings
    from lte_ray.ladder.arms import WITHOUT_INFLUENCE
    from lte_ray.run.record import make_record

    settings = Settings("comparison", sections[LTEConfig], sections[MergeConfig], sections[TrainConfig])
    record = make_record(worker, program, settings, PlacementConfig(), StorageConfig(), FailureConfig())
    others = {f.name for kind in (PlacementConfig, StorageConfig, FailureConfig) for f in dataclasses.fields(kind)}
    left_out = {*others, *NOT_COMPARED, *WITHOUT_INFLUENCE, *left_out}
    shared = {name: value for name, value in record.items() if name not in left_out}
    return json.loads(json.dumps(shared, default=str))  # type: ignore[no-any-return]
