"""What the run directory has of the moving average (--ema): a file at the end, and a note where it begins late."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from lte_ray import checkpoint
from lte_ray.config import StorageConfig
from lte_ray.engine.prepare import prepare
from lte_ray.run.record import write_model
from lte_ray.run.start import check_start
from lte_ray.storage import RunDirectory
from tests.support.tiny_worker import Tiny, make_settings


def test_the_final_average_is_written_next_to_the_weights(tmp_path: Path) -> None:
    """Under the model's names. Where a run ends without one, that of an earlier part of the run goes."""
    initial, directory = prepare(Tiny(), make_settings(), torch.float64), RunDirectory.open(str(tmp_path), "run")
    directory.create()
    write_model(directory, initial, initial.base, 2 * initial.base)
    weights, average = (load_file(tmp_path / "run" / name) for name in ("model.safetensors", "model-ema.safetensors"))
    assert weights.keys() == average.keys()
    assert all(torch.equal(2 * weights[name], average[name]) for name in weights)
    write_model(directory, initial, initial.base)
    assert not (tmp_path / "run" / "model-ema.safetensors").exists()


def test_a_run_that_is_resumed_without_an_average_is_told_where_it_begins(tmp_path: Path) -> None:
    """Unless its checkpoint has one, or the run has none."""
    settings, directory = make_settings(), RunDirectory.open(str(tmp_path), "test")
    averaged = dataclasses.replace(settings, train=dataclasses.replace(settings.train, ema=0.9))
    initial = prepare(Tiny(), settings, torch.float64)
    directory.create()
    directory.write("run.toml", b"")
    files = [checkpoint.write_base(directory, 2, initial.plan, initial.base)]
    facts = {"step": 3, "lte": dataclasses.asdict(settings.lte), "standings": {}}
    checkpoint.commit(directory, 2, (), files, facts)
    resume = StorageConfig(name="test", resume=True)
    assert check_start(directory, resume, settings)[1] == []
    (note,) = check_start(directory, resume, averaged)[1]
    assert note.endswith("has no moving average yet (--ema): it begins with the merged weights of version 2.")
    files.append(checkpoint.write_ema(directory, 2, initial.plan, initial.base))
    checkpoint.commit(directory, 2, (), files, facts)
    assert check_start(directory, resume, averaged)[1] == []
