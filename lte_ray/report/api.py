"""Makes a report: reads runs, ladders and sweeps, renders the page, and writes the file."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lte_ray.config import check_run_name
from lte_ray.config.ladder import RESULTS
from lte_ray.config.sweep import RESULTS as SWEEP_RESULTS
from lte_ray.errors import ConfigError, StorageError
from lte_ray.report.charts import make_charts
from lte_ray.report.ladder_data import LadderData, read_ladder, read_sweep
from lte_ray.report.page import MARK, render
from lte_ray.report.run_data import RunData, read_run
from lte_ray.run.inspect import PATIENCE
from lte_ray.storage import RUN, RunDirectory, split_run_path


@dataclass(frozen=True)
class Report:
    """A report that was written: its file, its size in bytes, and by run what is missing in it."""

    path: Path
    size: int
    missing: dict[str, tuple[str, ...]]


def write_report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, force: bool = False
) -> Report:
    """Writes a page about one run or several, which may still be going on. It is one file that needs no network.

    Args:
        runs: directories or URIs of runs, as in ``Result.path``, or folders of ladders or sweeps.
        out: the file. An earlier report is replaced.
        force: whether another file is replaced, too.

    Raises:
        ConfigError: the file is no earlier report, can't be written, or a run is given twice.
        StorageError: there is no run, ladder or sweep, or it can't be read.
    """
    paths = [os.fspath(runs)] if isinstance(runs, str | os.PathLike) else [os.fspath(run) for run in runs]
    return report_directories([_open(path) for path in paths], out, force=force)


def report_directories(directories: Sequence[RunDirectory], out: str | os.PathLike[str], *, force: bool) -> Report:
    """As `write_report`, for open directories."""
    if not directories:
        raise ConfigError("A report needs at least one run.")
    repeated = [each.display for index, each in enumerate(directories) if each.display in _places(directories[:index])]
    if repeated:
        raise ConfigError(f"{repeated[0]} is given twice. Give each run once.")
    path = _check_out(os.fspath(out), force)
    sources = [_read(directory) for directory in directories]
    _make_names_unique(sources)
    loaded = [source for source in sources if isinstance(source, RunData)]
    ladders = [source for source in sources if isinstance(source, LadderData)]
    content = render(loaded, ladders, make_charts(loaded, ladders)).encode(errors="replace")
    _write(path, content)
    return Report(path, len(content), {source.place: tuple(source.missing) for source in sources if source.missing})


def _places(directories: Sequence[RunDirectory]) -> set[str]:
    return {each.display for each in directories}


def _open(path: str) -> RunDirectory:
    place, name = split_run_path(path if "://" in path else str(Path(path).expanduser().absolute()))
    check_run_name(name, "path")
    return RunDirectory.open(place, name, patience=PATIENCE)


def _read(directory: RunDirectory) -> RunData | LadderData:
    if directory.exists(RUN):
        return read_run(directory)
    if directory.exists(RESULTS):
        return read_ladder(directory)
    if directory.exists(SWEEP_RESULTS):
        return read_sweep(directory)
    raise StorageError(
        f"There is no run in {directory.display}: it has no {RUN}, and no {RESULTS} or {SWEEP_RESULTS}, as ladders and sweeps "
        "have. Correct --storage or the name."
    )


def _make_names_unique(sources: Sequence[RunData | LadderData]) -> None:
    """Calls those whose name another one has by their path."""
    names = [source.name for source in sources]
    for source, name in zip(sources, names, strict=True):
        if names.count(name) > 1:
            source.name = source.place


# -- the file ---------------------------------------------------------------------------------------------------------------


def _check_out(out: str, force: bool) -> Path:
    """The file that may be written.

    Raises:
        ConfigError: it may not.
    """
    if "://" in out:
        raise ConfigError(f"--out is {out!r}, but a report is written to a local file. Copy it from there.")
    path = Path(out).expanduser()
    if not out or path.is_dir():
        raise ConfigError(f"--out is {out!r}, but it must be a file, such as report.html.")
    if not path.parent.is_dir():
        raise ConfigError(f"--out is {out}, but there is no folder {path.parent}.")
    if not force and path.exists():
        try:
            with path.open("rb") as file:
                is_report = file.read(len(MARK)) == MARK.encode()
        except OSError as error:
            raise ConfigError(f"{path} exists and can't be read: {error.strerror}.") from error
        if not is_report:
            raise ConfigError(f"{path} exists and isn't a report of lte-ray. Give another --out, or --force to replace it.")
    return path


def _write(path: Path, content: bytes) -> None:
    """Writes the file, completely or not at all."""
    try:
        target = path.resolve()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}.") from error


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
