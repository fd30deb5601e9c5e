"""Exporting merged weights from a run directory: bitwise equal, written atomically, bad input is named."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lte_ray import export
from lte_ray.engine.in_process import run_in_process
from lte_ray.errors import LTEError, StorageError, UserError, WorkerError
from lte_ray.export.run_reader import open_run, read_run
from lte_ray.export.worker_factory import make_worker
from tests.support.export_runs import (
    WORDS,
    ExportWorker,
    Wrapped,
    built,
    gpt2,
    inputs,
    logits,
    save_run,
    settings,
    write_checkpoint,
)
from tests.support.ray_runs import ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the words model with checkpoints of versions 2 and 3."""
    path, _ = save_run(tmp_path_factory.mktemp("runs"), "words", settings())
    write_checkpoint(open_run(path), settings(), run_in_process(ExportWorker("words"), settings(steps=4)))
    return path


def changed(run: Path, tmp_path: Path, name: str, text: str | None) -> Path:
    """Returns a copy of the run with one file replaced or removed."""
    copy = shutil.copytree(run, tmp_path / "copy")
    if text is None:
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    else:
        (copy / name).write_text(text)
    return copy


def test_the_final_weights_are_copied_to_a_file_or_into_a_folder(run: Path, tmp_path: Path) -> None:
    """Byte for byte, and without the worker; an empty folder may exist."""
    (tmp_path / "folder").mkdir()
    export.safetensors(run, tmp_path / "new" / "words.safetensors")
    export.safetensors(str(run), str(tmp_path / "folder"))
    final = (run / "model.safetensors").read_bytes()
    assert (tmp_path / "new" / "words.safetensors").read_bytes() == final
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == final
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "model.safetensors", "new", "words.safetensors"]
    shutil.rmtree(tmp_path / "folder")
    export.safetensors(f"file://{run}/", tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == final


def test_weights_are_exported_in_the_chosen_type(run: Path, tmp_path: Path) -> None:
    """Each of the names; by default the model's own. An unknown one is refused."""
    own = safetensors.torch.load_file(run / "model.safetensors")
    for dtype, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export.safetensors(run, tmp_path / f"{dtype}.safetensors", dtype=dtype)
        for name, tensor in safetensors.torch.load_file(tmp_path / f"{dtype}.safetensors").items():
            assert tensor.dtype == expected
            assert torch.equal(tensor, own[name].to(expected))
    with pytest.raises(UserError, match=r"--dtype is 'int8', but it must be one of: auto, fp32, bf16, fp16"):
        export.safetensors(run, tmp_path / "x.safetensors", dtype="int8")


def test_any_versions_weights_load_into_the_unconverted_model(run: Path, tmp_path: Path) -> None:
    """Those of a checkpoint, strictly and bitwise; by default the newest of an unfinished run."""
    for version, steps in ((2, 4), (3, 6)):
        written = export.safetensors(run, tmp_path / f"{version}.safetensors", version=version)
        assert written.summary == f"the merged weights of version {version}"
        base = read_run(run, version).base
        assert torch.equal(base, run_in_process(ExportWorker("words"), settings(steps=steps)).base)
        model = built("words")
        model.load_state_dict(safetensors.torch.load_file(tmp_path / f"{version}.safetensors"), strict=True)
        assert torch.equal(torch.cat([model.mid.weight.flatten(), model.embed.weight.flatten()]), base)  # type: ignore[union-attr, operator]
    running = changed(run, tmp_path, "model.safetensors", None)
    export.safetensors(running, tmp_path / "newest")
    expected = (tmp_path / "3.safetensors").read_bytes()
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == expected == (run / "model.safetensors").read_bytes()


def test_the_moving_average_is_exported_in_place_of_the_weights(tmp_path: Path) -> None:
    """The run's file byte for byte, a checkpoint's in any type, and as a model of transformers."""
    pytest.importorskip("transformers")
    run, done = save_run(tmp_path, "gpt2", settings(ema=0.9))
    assert done.coordinator.ema is not None
    export.safetensors(run, tmp_path / "final.safetensors", ema=True)
    assert (tmp_path / "final.safetensors").read_bytes() == (run / "model-ema.safetensors").read_bytes()
    assert (run / "model-ema.safetensors").read_bytes() != (run / "model.safetensors").read_bytes()
    assert torch.equal(read_run(run, ema=True).base, done.coordinator.ema)
    written = export.safetensors(run, tmp_path / "third", 3, ema=True)
    assert written.summary == "model.safetensors: the moving average of the merged weights up to version 3"
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == (run / "model-ema.safetensors").read_bytes()
    export.save_pretrained(run, tmp_path / "hf", ema=True)
    expected = built("gpt2")
    expected.load_state_dict(safetensors.torch.load_file(run / "model-ema.safetensors"), strict=True)
    x = inputs("gpt2", 1)
    with torch.no_grad():
        assert torch.equal(logits(type(expected).from_pretrained(tmp_path / "hf").eval(), x), logits(expected, x))


def test_a_run_without_an_average_has_none_to_export(run: Path, tmp_path: Path) -> None:
    """One sentence says so, for each format; a head's change is one of the merged weights."""
    for write in (export.safetensors, export.save_pretrained):
        with pytest.raises(
            StorageError, match=r"--ema needs the moving average .* version 3 in .* the run was trained without"
        ):
            write(run, tmp_path / "out", ema=True)
    pytest.importorskip("peft")
    with pytest.raises(StorageError, match="--ema needs the moving average"):
        export.peft_adapter(run, tmp_path / "out", ema=True)
    with pytest.raises(UserError, match="--ema and --head 1 contradict each other"):
        export.peft_adapter(run, tmp_path / "out", head=1, ema=True)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "resnet", "vit", "wrapped"])
@torch.no_grad()
def test_from_pretrained_gives_the_merged_model_bitwise(tmp_path: Path, kind: str) -> None:
    """The same logits, and shared weights are one parameter again."""
    pytest.importorskip("transformers")
    with torch.enable_grad():
        run, _ = save_run(tmp_path, kind, settings())
    written = export.save_pretrained(run, tmp_path / "out")
    expected = built(kind)
    expected.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"), strict=True)
    inner: Any = expected.net if isinstance(expected, Wrapped) else expected
    loaded = type(inner).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(loaded, inputs(kind, 9)), logits(expected, inputs(kind, 9)))
    assert len(list(loaded.parameters())) == len(list(expected.parameters()))
    assert written.summary == f"{type(inner).__name__} with the merged weights of version 3"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cnn", "needs a model of transformers, but the worker builds a Cnn, which is none and contains none"),
        ("headed", r"would lose what the worker's model trains outside of its GPT2LMHeadModel: head.weight, head.bias\."),
        ("pair", "a Pair, which contains several"),
    ],
)
def test_only_one_whole_model_of_transformers_can_be_saved_so(tmp_path: Path, kind: str, message: str) -> None:
    """Else the error says what would be lost, and nothing is written."""
    pytest.importorskip("transformers")
    run, _ = save_run(tmp_path, "cnn" if kind == "pair" else kind, settings())
    given = Paired() if kind == "pair" else None
    if given:
        run, _ = save_run(tmp_path, "cnn", settings(), name="pair", worker=given)
    with pytest.raises(UserError, match=message):
        export.save_pretrained(run, tmp_path / "out", worker=given)
    assert not (tmp_path / "out").exists()


class Pair(nn.Module):
    """Two models of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gpt2(), gpt2()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.first(words).logits + self.second(words).logits


class Paired(ExportWorker):
    def __init__(self) -> None:
        super().__init__("gpt2")

    def build_model(self) -> nn.Module:
        return Pair()


@pytest.mark.parametrize("write", [export.safetensors, export.save_pretrained, export.peft_adapter])
def test_out_must_be_free(run: Path, tmp_path: Path, write: Any) -> None:
    """A non-empty folder, a file, a dangling link and a URI are refused, and not modified."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file.safetensors").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageError, match=r"OUT is '.*/full', a folder that isn't empty"):
        write(run, tmp_path / "full")
    for name in ("file.safetensors", "link"):
        with pytest.raises(StorageError, match=rf"OUT is '.*/{name}', which exists already"):
            write(run, tmp_path / name)
    with pytest.raises(StorageError, match=r"OUT is 's3://bucket/out', but it must be a local path"):
        write(run, "s3://bucket/out")
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file.safetensors").read_text() == "kept"


def test_what_fails_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk during writing is a StorageError, and neither OUT nor a temporary file remains."""

    def full(saved: Any, folder: Path, *_: Any) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lte_ray.export.pretrained.write_pretrained", full)
    with pytest.raises(StorageError, match=r"OUT '.*/out' can't be written: .*No space left on device"):
        export.save_pretrained(run, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't be written"):
        export.safetensors(run, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_others_may_read_what_is_written(tmp_path: Path, umask: int) -> None:
    """A run and its exports have the permissions of new files and folders, not only their owner's; or as umask says."""
    before = os.umask(umask)
    try:
        run, _ = save_run(tmp_path, "gpt2", settings())
        export.safetensors(run, tmp_path / "weights")
        export.safetensors(run, tmp_path / "weights.safetensors")
        export.save_pretrained(run, tmp_path / "model")
        export.peft_adapter(run, tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert len(modes) > 10
    assert modes == {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in modes}


def test_a_run_that_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    """A missing folder, another folder, and an unsupported scheme."""
    (tmp_path / "other").mkdir()
    for place, message in (
        (tmp_path / "none", "RUN is '.*/none', which doesn't exist"),
        (tmp_path / "other", r"RUN is '.*/other', which has no run\.toml"),
        (run / "checkpoints" / "000003", r"which has no run\.toml. It must be a run directory"),
        ("nothing://bucket/run", r"RUN is 'nothing://bucket/run', which can't be opened"),
    ):
        with pytest.raises(StorageError, match=message):
            export.safetensors(place, tmp_path / "out")
    with pytest.raises(StorageError, match="has no complete checkpoint"):
        read_run(changed(run, tmp_path, "checkpoints", None))


def test_a_version_that_is_not_there_is_named_with_those_that_are(run: Path, tmp_path: Path) -> None:
    """Before the worker is constructed."""
    for write in (export.safetensors, export.peft_adapter):
        with pytest.raises(StorageError, match=r"--version is 7, but the complete checkpoints in .* are of: 2, 3\."):
            write(run, tmp_path / "out", version=7, worker="no.such:Worker")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not toml", r"run\.toml is damaged"),
        (
            'program = "no.such:Worker"',
            r"run.toml names, 'no.such:Worker': there is no module no.* folder in which .* --worker",
        ),
        (
            'program = "tests.support.export_runs:ExportWorker"\n[worker]\nkind = "none"',
            r"build_model\(\) raised KeyError: 'none'",
        ),
        (
            'lora_r = 2\nprogram = "tests.support.export_runs:ExportWorker"\n[worker]\nkind = "cnn"',
            r"holds another model than the worker builds",
        ),
        ('program = "tests.support.export_runs:Words"', "Words can't be used as a worker"),
        ('program = "tests.support.export_runs:Needy"', "Needy can't be constructed with the settings in run.toml"),
        ('lora_r = "many"\nprogram = "tests.support.export_runs:ExportWorker"', "lora_r is 'many'"),
        ("", "The worker that run.toml names, is ''"),
    ],
)
def test_a_run_that_cannot_be_made_again_is_an_error(run: Path, tmp_path: Path, text: str, message: str) -> None:
    """The error names what is wrong in run.toml, as bad input (exit code 2)."""
    with pytest.raises(LTEError, match=message) as caught:
        read_run(changed(run, tmp_path, "run.toml", text))
    assert caught.value.exit_code == 2


@dataclass
class Odd:
    """A worker with settings of types that TOML lacks."""

    sizes: tuple[int, ...] = (1, 2)
    data: Path | None = None
    names: list[str] | str = "none"
    build_model = train_batches = loss = evaluate = lambda self: None


def test_the_worker_has_the_settings_that_it_had() -> None:
    """Tuples and paths are restored; unknown settings are ignored; a given worker is used as it is."""
    record = {"program": f"{__name__}:Odd", "worker": {"sizes": [3], "data": "/data", "names": ["a"], "gone": 1}}
    assert make_worker(record) == Odd((3,), Path("/data"), ["a"])
    assert make_worker(record, Odd) == Odd((3,), Path("/data"), ["a"])
    assert make_worker(record, Odd()) == Odd()
    kept = {**record, "worker": {"data": "None", "names": "None"}}  # as run.toml writes None, which only `data` can be
    assert make_worker(kept) == Odd(data=None, names="None")
    with pytest.raises(WorkerError, match=r"--worker 'no.such:Worker': there is no module no"):
        make_worker(record, "no.such:Worker")


def test_what_is_no_worker_is_not_made(tmp_path: Path) -> None:
    """A class that run.toml names is called only if it has a worker's methods."""
    record = {"program": "subprocess:Popen", "worker": {"args": ["touch", str(tmp_path / "made")]}}
    with pytest.raises(WorkerError, match=r"Popen can't be used as a worker: it lacks build_model\(\)"):
        make_worker(record)
    assert not (tmp_path / "made").exists()


def test_reading_a_run_draws_none_of_the_callers_random_numbers(run: Path) -> None:
    """The model is built with the run's seed, without touching the global generators."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    saved = read_run(run)
    assert torch.equal(torch.rand(3), expected)
    assert saved.initial.numel() == saved.base.numel() == 16 * 16 + WORDS * 16


@pytest.mark.slow
def test_no_ray_is_loaded(run: Path, tmp_path: Path) -> None:
    """Every format is written without Ray."""
    pytest.importorskip("peft")
    code = (
        "import sys; from lte_ray import export; run, out = sys.argv[1:]\n"
        "export.safetensors(run, out + '/a', version=3); export.peft_adapter(run, out + '/b')\n"
        "print('ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(run), str(tmp_path)]
    found = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT / "tests", env={"PYTHONPATH": str(ROOT)}
    )
    assert found.stdout == "False\n"
