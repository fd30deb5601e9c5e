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

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig, checkpoint
from lte_ray.storage import RunDirectory
from tests.support.object_stores import KEYS, s3_server, s3_storage
from tests.support.ray_runs import ROOT, assert_same_model, merged_in_process
from workers.regression import Regression


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """The URL for --storage of a folder in a bucket."""
    with s3_server() as server:
        yield s3_storage(server)


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
