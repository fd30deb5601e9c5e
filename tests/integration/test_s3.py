"""Runs on an object store: a real S3 client against a local server of its protocol."""

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
from tests.support.checkpoint_damage import PLAN, write_checkpoint
from tests.support.ray_runs import ROOT, assert_same_model, merged_in_process
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
    """The URL for --storage of a folder in a bucket."""
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


def test_a_run_directory_works_as_on_a_disk(storage: str) -> None:
    """It is created once; files are written, appended to, listed, and removed. A wrong bucket is an immediate error."""
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
    """Incomplete checkpoints are removed and old ones pruned; a damaged one is named, and the one before it is used."""
    directory = RunDirectory.open(storage, "second")
    for version in (1, 2, 3):
        write_checkpoint(directory, version)
    checkpoint.write_base(directory, 4, PLAN, torch.zeros(PLAN.base.size))
    assert checkpoint.complete_versions(directory) == [1, 2, 3]
    checkpoint.remove_incomplete(directory)
    checkpoint.prune(directory, 2)
    assert checkpoint.complete_versions(directory) == [2, 3]
    intact = directory.read("checkpoints/000003/head-0001.safetensors")
    directory.write("checkpoints/000003/head-0001.safetensors", intact[:-1] + bytes([intact[-1] ^ 1]))
    manifest, passed = checkpoint.read_newest_intact(directory)
    assert manifest.version == 2
    assert "000003/head-0001.safetensors is damaged" in passed[0]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_an_object_store_is_trained_resumed_and_audited(storage: str, tmp_path: Path) -> None:
    """With the commands of a local run; bitwise equal to the run without interruption."""
    flags = "--num-heads 2 --lora-r 8 --lora-alpha 16 --merge-iter 5 --merge-threads 1 --seed 3 --checkpoint-every 1"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | KEYS

    def lte_ray(*arguments: str) -> str:
        command = [Path(sys.executable).parent / "lte-ray", *arguments]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    train = ["train", "workers.regression:Regression", *flags.split(), "--name", "third", "--storage", storage, "--resume"]
    lte_ray(*train, "--steps", "10")
    lte_ray(*train, "--steps", "20")
    directory = RunDirectory.open(storage, "third")
    assert checkpoint.complete_versions(directory)[-1] == 4
    folder, _, query = storage.partition("?")
    assert LTETrainer.restore(f"{folder}/third?{query}").run_config.storage == storage
    assert "0 batches lost, 0 merged twice" in lte_ray("audit", f"{folder}/third?{query}")
    lte, merge = LTEConfig(num_heads=2, lora_r=8, lora_alpha=16), MergeConfig(merge_iter=5, merge_threads=1)
    (tmp_path / "model.safetensors").write_bytes(directory.read("model.safetensors"))
    assert_same_model(tmp_path, merged_in_process(Regression(), lte, merge, TrainConfig(steps=20, seed=3)))


def test_sigterm_ends_a_command_that_waits_for_storage() -> None:
    """A server accepts the connection and never answers: the command still ends and says what to do next."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        url = f"s3://b/x?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http&region=us-east-1"
        arguments = ["train", "workers.regression:Regression", "--storage", url, "--name", "r"]
        command = [sys.executable, "-c", "from lte_ray.cli.main import entry; entry()", *arguments]
        driver = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **KEYS})
        try:
            connection, _ = server.accept()
            driver.send_signal(signal.SIGTERM)
            output = driver.communicate(timeout=120)[1]
        finally:
            driver.kill()
        connection.close()
    assert driver.returncode == 130, output
    assert "Interrupted" in output
