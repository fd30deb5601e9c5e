"""Runs on an object store: a real client of S3, against a server of its protocol on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig, checkpoint
from lte_ray.errors import StorageError
from lte_ray.storage import PART_SUFFIX, RunDirectory
from tests.support.checkpoint_damage import PLAN, write
from tests.support.ray_runs import ROOT, assert_same_model, simulated
from workers.regression import Regression

moto = pytest.importorskip("moto.server")

BUCKET = "lte-ray"
KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """A bucket with a folder for runs, as --storage takes it."""
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KEYS.items():
            environment.setenv(name, value)
        server.start()
        host, port = server.get_host_and_port()
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}/runs?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        server.stop()


def test_a_run_directory_is_what_it_is_on_a_disk(storage: str) -> None:
    """Made once, written whole, added to, listed and removed; a wrong bucket is said at once."""
    directory = RunDirectory.open(storage, "first")
    directory.create(exclusive=True)
    with pytest.raises(StorageError, match="another run has just taken this name"):
        directory.create(exclusive=True)
    directory.write("a/b", b"one")
    directory.write("a/b", b"other")
    directory.append("rows", b"1\n")
    directory.append("rows", b"2\n")
    assert (directory.read("a/b"), directory.read("rows"), directory.size("rows")) == (b"other", b"1\n2\n", 4)
    assert [name for name in directory.list_names() if not name.startswith(".")] == ["a", "rows"]
    assert not any(name.endswith(PART_SUFFIX) for name in directory.list_names("a"))
    directory.delete("a")
    assert not directory.exists("a/b")
    directory.delete()
    assert not directory.exists()
    with pytest.raises(StorageError, match="can't be written"):
        RunDirectory.open(storage.replace(BUCKET, "no-such-bucket"), "r", patience=1.0).create()


def test_checkpoints_are_written_read_and_pruned(storage: str) -> None:
    """Manifest last; one that has none isn't there; an altered one is named, and the one before it is used."""
    directory = RunDirectory.open(storage, "second")
    for version in (1, 2, 3):
        write(directory, version)
    checkpoint.write_base(directory, 4, PLAN, torch.zeros(PLAN.base.size))
    assert checkpoint.complete_versions(directory) == [1, 2, 3]
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 2)
    assert checkpoint.complete_versions(directory) == [2, 3]
    whole = directory.read("checkpoints/000003/head-0001.safetensors")
    directory.write("checkpoints/000003/head-0001.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    manifest, passed = checkpoint.read_newest_intact(directory)
    assert manifest.version == 2
    assert "000003/head-0001.safetensors is damaged" in passed[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_is_trained_stopped_resumed_and_audited_there(storage: str, tmp_path: Path) -> None:
    """With the commands of a local run; bitwise the run that never stopped."""
    flags = "--num-heads 2 --lora-r 8 --lora-alpha 16 --merge-iter 5 --merge-threads 1 --seed 3 --checkpoint-every 1"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | KEYS

    def lte_ray(*arguments: str) -> str:
        command = [Path(sys.executable).parent / "lte-ray", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    train = ["train", "workers.regression:Regression", *flags.split(), "--name", "third", "--storage", storage, "--resume"]
    lte_ray(*train, "--steps", "10")
    lte_ray(*train, "--steps", "20")
    directory = RunDirectory.open(storage, "third")
    assert checkpoint.complete_versions(directory)[-1] == 4
    place, _, query = storage.partition("?")
    assert LTETrainer.restore(f"{place}/third?{query}").run_config.storage == storage
    assert "0 batches lost, 0 merged twice" in lte_ray("audit", f"{place}/third?{query}")
    lte, merge = LTEConfig(num_heads=2, lora_r=8, lora_alpha=16), MergeConfig(merge_iter=5, merge_threads=1)
    (tmp_path / "model.safetensors").write_bytes(directory.read("model.safetensors"))
    assert_same_model(tmp_path, simulated(Regression(), lte, merge, TrainConfig(steps=20, seed=3)))


def test_sigterm_is_heard_while_a_store_does_not_answer() -> None:
    """A server takes the connection and says nothing: the command ends all the same, and says what one may do next."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        place = f"s3://b/x?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http&region=us-east-1"
        arguments = ["train", "workers.regression:Regression", "--storage", place, "--name", "r"]
        command = [sys.executable, "-c", "from lte_ray.cli.main import entry; entry()", *arguments]
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **KEYS})
        try:
            held, _ = server.accept()
            driver.send_signal(signal.SIGTERM)
            said = driver.communicate(timeout=30)[1]
        finally:
            driver.kill()
        held.close()
    assert driver.returncode == 130, said
    assert "Interrupted" in said
