"""Bad storage and damaged runs, for `benchmarks.rejected`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.rejected_runner import ROOT, Row, Run, shorten_paths

GOOD = "workers.regression:Regression"
RUN = ROOT / "tests" / "fixtures" / "checkpoint-1"
"""A finished run with one checkpoint."""

AS_IT_WAS = ["--num-heads", "2", "--lora-r", "2", "--lora-alpha", "4", "--worker.width", "4", "--worker.batch-size", "4"]

NAMES = {
    "--name ../up": "../up",
    "--name /etc": "/etc",
    "--name a/b": "a/b",
    "--name ..": "..",
    "--name .hidden": ".hidden",
    "--name=--overwrite": "--overwrite",
    "--name with a line end": "a\nb",
    "--name with an escape sequence": "a\x1b[2J",
    "--name with a fullwidth slash": "a\uff0fb",
    "--name that writes backwards": "a\u202eb",
    "--name with a space behind": "a ",
    "--name of 300 letters": "a" * 300,
    "--name of nothing": "",
}

PLACES = {
    "--storage nowhere://bucket": "nowhere://bucket",
    "--storage s3://KEY:HIDDEN/WITH/SLASHES@bucket?what=1": "s3://KEY:HIDDEN/WITH/SLASHES@bucket?what=1",
    "--storage s3://bucket?secret_key=HIDDEN": "s3://bucket?secret_key=HIDDEN",
}


def storage(run: Run, folder: Path) -> Iterator[Row]:
    """Names and storages of runs."""
    from lte_ray.errors import StorageError
    from lte_ray.storage import RunDirectory

    for given, name in NAMES.items():
        yield Row(given, *run("train", GOOD, f"--name={name}", "--storage", str(folder / "runs")))
    for given, place in PLACES.items():
        yield Row(given, *run("train", GOOD, "--storage", place))
    shutil.copytree(RUN, folder / "runs" / "taken")
    (folder / "runs" / "other").mkdir()
    (folder / "runs" / "other" / "thesis.tex").write_text("")
    at = ["--storage", str(folder / "runs")]
    yield Row("--name taken", *run("train", GOOD, "--name", "taken", *at))
    yield Row("--name other --overwrite, where no run is", *run("train", GOOD, "--name", "other", "--overwrite", *at))
    yield Row("--name new --resume", *run("train", GOOD, "--name", "new", "--resume", *at))
    (folder / "file").write_text("")
    for given, place in {"a file as storage": folder / "file", "/proc as storage": Path("/proc")}.items():
        try:
            RunDirectory.open(str(place), "a").create(exclusive=True)
        except StorageError as error:  # the command line reports it once Ray has the resources
            yield Row(given, str(error.exit_code), shorten_paths(str(error).splitlines()[0], folder))


def checkpoints(run: Run, folder: Path) -> Iterator[Row]:
    """Damaged and forged runs, and runs of another model, exported and resumed."""
    run_at, out = folder / "runs" / "a", folder / "out.safetensors"
    at = run_at / "checkpoints" / "000002"

    def fresh() -> None:
        shutil.rmtree(run_at, ignore_errors=True)
        shutil.copytree(RUN, run_at)
        (run_at / "model.safetensors").unlink()  # an export would use it as it is

    def exported(*flags: str, run_of: Path = run_at, to: str = "safetensors") -> tuple[str, str]:
        out.unlink(missing_ok=True)
        return run("export", str(run_of), str(out), "--to", to, *flags)

    def resumed(*flags: str) -> tuple[str, str]:
        return run(
            "train", GOOD, "--name", "a", "--resume", "--storage", str(folder / "runs"), "--steps", "20", *AS_IT_WAS, *flags
        )

    for given, damage in damages(run_at, at).items():
        if "facts" not in given:  # an export needs no facts
            fresh()
            damage()
            yield Row(f"export: {given}", *exported())
    for given, damage in damages(run_at, at).items():
        if "run.toml" not in given:
            fresh()
            damage()
            yield Row(f"--resume: {given}", *resumed())
    fresh()
    yield Row("--resume: other heads than before", *resumed("--lora-r", "3"))
    yield Row("--resume: another model", *resumed("--worker.width", "5"))
    yield Row("--resume: no step left", *resumed("--steps", "2"))
    yield Row("export --version 7", *exported("--version", "7"))
    yield Row("export --to zip", *exported(to="zip"))
    yield Row("export --dtype int8", *exported("--dtype", "int8"))
    yield Row("export --to peft --dtype bf16", *exported("--dtype", "bf16", to="peft"))
    yield Row("export --rank 1, without --to peft", *exported("--rank", "1"))
    yield Row("export of a folder that isn't there", *exported(run_of=folder / "b"))
    yield Row("export of a folder that is no run", *exported(run_of=folder))
    out.write_text("")
    yield Row("export to a file that is there", *run("export", str(run_at), str(out), "--to", "safetensors"))


def damages(run_at: Path, at: Path) -> dict[str, Callable[[], object]]:
    """What can be wrong with a run, and how to damage it so."""
    manifest, base, toml = at / "manifest.json", at / "base.safetensors", run_at / "run.toml"

    def edited(**values: object) -> None:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))

    def flipped(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))

    def folder_instead(file: Path) -> None:
        file.unlink()
        file.mkdir()

    outside = [{"name": "../../../../outside", "size": 0, "sha256": ""}]
    return {
        "one bit of base.safetensors flipped": lambda: flipped(base),
        "base.safetensors cut off": lambda: base.write_bytes(base.read_bytes()[:-9]),
        "base.safetensors is gone": base.unlink,
        "base.safetensors is a folder": lambda: folder_instead(base),
        "manifest.json is empty": lambda: manifest.write_bytes(b""),
        "manifest.json cut off": lambda: manifest.write_bytes(manifest.read_bytes()[:99]),
        "manifest.json is binary": lambda: manifest.write_bytes(bytes(range(256))),
        "manifest.json nested 100,000 deep": lambda: manifest.write_bytes(b"[" * 100_000),
        "manifest.json of format 99": lambda: edited(format=99),
        "manifest.json lists ../../../../outside": lambda: edited(files=outside),
        "manifest.json says heads: 5": lambda: edited(heads=5),
        "manifest.json has no facts": lambda: edited(facts={}),
        "no complete checkpoint": manifest.unlink,
        "run.toml cut off": lambda: toml.write_bytes(toml.read_bytes()[:20]),
        "run.toml nested 50,000 deep": lambda: toml.write_bytes(b"a = " + b"[" * 50_000),
        "run.toml names os:system": lambda: toml.write_text(
            toml.read_text().replace("workers.regression:Regression", "os:system")
        ),
        "run.toml names a worker that is gone": lambda: toml.write_text(
            toml.read_text().replace("workers.regression:Regression", "gone:Worker")
        ),
        "run.toml says num_heads = 'two'": lambda: toml.write_text(
            toml.read_text().replace("num_heads = 2", "num_heads = 'two'")
        ),
    }


CATEGORIES: dict[str, Callable[[Run, Path], Iterator[Row]]] = {"Storage": storage, "Checkpoints": checkpoints}
