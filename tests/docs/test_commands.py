"""Every command in the documentation runs as written, or is listed with the reason why a test can't run it.

The ordinary tests parse what they can in this process. `slow` ones give each command to a shell, in a folder with the README's
`mine.py` and an empty home directory, in the environment that `make` builds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import lte_ray
from lte_ray.cli.main import COMMANDS, main
from lte_ray.worker import build_model
from tests.docs.pages import LANGUAGES, ROOT, blocks, commands, inline_code, page_blocks, write_files
from tests.support import export_runs

MINE = "lte-ray train mine.py:Net --num-heads 4 --name mine --resume"
"""Makes the run `mine`, which other commands read."""

AVERAGED = "lte-ray train mine.py:Net --num-heads 4 --name averaged --ema 0.999"
"""Makes a run with a moving average, which another command exports."""

NEW = "lte-ray new my_net"
"""Writes a worker, which another command trains."""

LADDER = "lte-ray ladder mine.py:Net --num-heads 4 --steps 200 --name net-ladder"
"""Makes the ladder `net-ladder`."""

SWEEP = "lte-ray sweep mine.py:Net --num-heads 4 --over lora-r=4,8,16 --over lr=log:0.005:0.5 --num-trials 12 --name net-sweep"
"""Makes the sweep `net-sweep`."""

NEVER = "lte-ray train mine.py:Net --num-heads 4 --name adapters --never-merge --others frozen"
"""Makes the run `adapters`."""

SIMULATE = "lte-ray simulate --num-heads 4 --step-seconds 0.5 --steps 1000 --merge-iter 50 --bandwidth 1Gbit"

TOKEN = "ray get-auth-token --generate > /dev/null"
LOCAL_CLUSTER = "cluster/local.sh"
JOB_SERVER = 8265
"""The port that the documentation names."""


@dataclass(frozen=True)
class Runs:
    """A command that a test runs.

    Attributes:
        after: a command that must have run before in the same home directory.
        quick: whether the ordinary tests run it, too, in their own process.
        cluster: whether it needs the cluster that `cluster/local.sh` starts.
        root: whether it runs in the repository's root instead of the user's folder.
        environment: what the test sets to make it shorter.
    """

    after: str = ""
    quick: bool = False
    cluster: bool = False
    root: bool = False
    environment: dict[str, str] = field(default_factory=dict)


# Without --assume-old, make would install the environment again whenever pyproject.toml is newer.
MAKE = {"VENV": sys.prefix, "MAKEFLAGS": "--assume-old=pyproject.toml --assume-old=constraints.txt", "ARGS": "--steps 20"}

HUB = "it needs a model of the hub; tests/integration/test_recipes.py has a tiny one"

DOCKER = "it needs Docker and images from its registry; tests/cluster checks the file"
KUBERNETES = "it needs Kubernetes; tests/cluster checks the files"
CLOUD = "it needs an account, and costs money; tests/cluster checks the files"

DECISIONS: dict[str, Runs | str] = {
    "make train": Runs(root=True, environment=MAKE),
    "make test": "it runs these tests",
    ". .venv/bin/activate": Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --merge-iter 10 --steps 200": Runs(),
    MINE: Runs(),
    "lte-ray resume mine --no-wait": Runs(after=MINE),
    "lte-ray resume mine --steps 800": Runs(after=MINE),
    "lte-ray audit mine --json": Runs(after=MINE, quick=True),
    "lte-ray runs": Runs(after=MINE, quick=True),
    "lte-ray status mine": Runs(after=MINE, quick=True),
    "lte-ray watch mine": Runs(after=MINE, quick=True),
    "lte-ray logs mine": Runs(after=MINE, quick=True),
    "lte-ray report mine": Runs(after=MINE, quick=True),
    "lte-ray report mine mine-baseline -o both.html": "it needs two runs; tests/unit/report compares such",
    "lte-ray report net-ladder -o ladder.html": Runs(after=LADDER),
    "lte-ray stop mine": "no process trains the run; tests/integration/test_stops.py stops one",
    "lte-ray train mine.py:Net --help": Runs(quick=True),
    'eval "$(lte-ray completion bash)"': Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --print-config": Runs(quick=True),
    "lte-ray train mine.py:Net --num-heads 4 --name mine-baseline --baseline": Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --name mine-parallel --baseline --baseline-processes 2": Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --log tensorboard csv": Runs(),
    "tensorboard --logdir ~/ray_results": "it runs until Ctrl-C, and needs tensorboard",
    "WANDB_MODE=offline lte-ray train mine.py:Net --num-heads 4 --name mine-logged --log wandb mlflow": Runs(),
    "wandb sync ~/ray_results/mine-logged/wandb/offline-run-*": "it needs a login of Weights & Biases",
    "MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri ~/ray_results/mine-logged/mlflow": "it runs until Ctrl-C",
    AVERAGED: Runs(),
    "lte-ray export ~/ray_results/averaged out-ema --to safetensors --ema": Runs(after=AVERAGED),
    "lte-ray train mine.py:Net --num-heads 4 --name watched --callback watch.py:Watch": (
        "it needs the page's class in watch.py, as tests/integration/test_stops.py has one"
    ),
    "lte-ray train mine.py:Net --num-heads 4 --name mine-3h --max-time 3h --stop-when 'validation_loss<0.1' "
    "--patience 5": Runs(),
    "lte-ray audit ~/ray_results/mine": Runs(after=MINE, quick=True),
    "lte-ray export ~/ray_results/mine out --to safetensors": Runs(after=MINE, quick=True),
    "lte-ray export ~/ray_results/mine out-mine --to peft": Runs(after=MINE),
    "lte-ray export ~/ray_results/mine out-head-1 --to peft --head 1": Runs(after=MINE),
    "lte-ray export ~/ray_results/mine out-1 --to safetensors --head 1": Runs(after=MINE, quick=True),
    NEVER: Runs(),
    "lte-ray export ~/ray_results/adapters out-adapter-2 --to peft --head 2": Runs(after=NEVER),
    "lte-ray export ~/ray_results/bert out-bert --to pretrained": Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --when arrival --no-wait": Runs(),
    "lte-ray train mine.py:Net --num-heads 4 --name mine-traced --profile 20:30": Runs(),
    "lte-ray train mine.py:Net --lora-r 32 --layers '@linear: lora_r=16' '0: lora_r=8 lr=0.5' '2: adapt=false lr=0.1'": Runs(),
    "lte-ray train mine.py:Net --num-heads 3 --steps 40 --policy my_policies.py:by_loss --policy.power 2": Runs(),
    "lte-ray simulate --num-heads 4 --speeds 1 1 1 4 --steps 200 --when arrival --no-wait": Runs(quick=True),
    "lte-ray simulate mine.py:Net --num-heads 4 --speeds 1 1 1 4 --steps 100 --policy stale --when arrival --no-wait": Runs(
        quick=True
    ),
    "lte-ray simulate --num-heads 1000 --merge-iter 100 --steps 500 --lora-r 32 --jitter 0.1": Runs(),
    "lte-ray check mine.py:Net --num-heads 4": Runs(quick=True),
    "lte-ray plan gpt --gpu 24GB --num-gpus 8 --link 1Gbit": Runs(),
    "lte-ray plan mine.py:Net --num-heads 4 --json": Runs(quick=True),
    "lte-ray plan llama.py:Llama --num-heads 8 --lora-r 16 --others frozen --precision bf16-mixed --gpu 80GB --num-gpus 8 "
    "--link 1Gbit": Runs(),
    "lte-ray ladder mine.py:Net --num-heads 4 --quick": Runs(),
    "lte-ray ladder mine.py:Net --num-heads 4 --merge-iters 10 50 --steps 500 --name is-it-worth-it": Runs(),
    f"{SIMULATE} --policy orthogonal": Runs(),
    f"{SIMULATE} --policy orthogonal --transfer int8 --send-down int8": Runs(),
    f"{SIMULATE} --transfer int8 --send-down int8 --no-wait --when arrival": Runs(),
    LADDER: Runs(),
    SWEEP: Runs(),
    **{f"lte-ray {command} --help-all": Runs(quick=True) for command in COMMANDS if command != "resume"},
    "lte-ray --help": Runs(quick=True),
    TOKEN: Runs(),
    "export RAY_AUTH_MODE=token": Runs(),
    LOCAL_CLUSTER: "it runs until Ctrl-C; the fixture `cluster` starts it",
    "lte-ray submit --address http://127.0.0.1:8265 train mine.py:Net --num-heads 2 --steps 100": Runs(cluster=True),
    "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 lte-ray submit train mine.py:Net --num-heads 2 --steps 100": Runs(
        cluster=True
    ),
    "lte-ray submit train mine.py:Net --num-heads 4 --merge-iter 10 --steps 200": Runs(cluster=True),
    f"ray job submit --working-dir . -- {MINE}": Runs(cluster=True),
    "RAY_ADDRESS=auto lte-ray train mine.py:Net --num-heads 2 --steps 100": Runs(cluster=True),
    "RAY_ADDRESS=auto lte-ray train mine.py:Net --num-heads 2 --steps 100 --head-labels ray.io/market-type=spot "
    "--coordinator-labels ray.io/market-type=on-demand": "it needs labeled nodes; tests/integration/test_nodes.py has some",
    "ray job submit --address http://HEAD-NODE:8265 --working-dir . -- lte-ray train mine.py:Net --num-heads 8 "
    "--storage s3://bucket/runs --name net-8 --resume": "it needs a cluster on other machines and a bucket",
    "lte-ray submit --address http://HEAD-NODE:8265 train mine.py:Net --num-heads 8 --storage s3://bucket/runs --name net-8 "
    "--resume": "it needs a cluster on other machines and a bucket",
    'ray job submit --address http://HEAD-NODE:8265 --working-dir . --runtime-env-json \'{"pip": ["lte-ray"]}\' -- '
    "lte-ray train mine.py:Net --num-heads 8 --storage s3://bucket/runs --name net-8 --resume": "it needs a cluster on other "
    "machines and a bucket",
    'ray job submit --address http://HEAD-NODE:8265 --working-dir . --runtime-env-json \'{"py_modules": '
    '["PATH/TO/lte_ray"]}\' -- python -m lte_ray train mine.py:Net --num-heads 8 --storage s3://bucket/runs --name net-8 '
    "--resume": "it needs a cluster on other machines and a bucket; tests/integration/test_submit.py has one",
    "cluster/local-nodes.sh 3": "it runs until Ctrl-C; tests/cluster has a program in Ray's place",
    "docker build -f cluster/Dockerfile -t lte-ray:0.1.0 .": DOCKER,
    "docker run --rm --shm-size 1g lte-ray:0.1.0 lte-ray train regression --num-heads 2 --steps 20": DOCKER,
    "docker build -f cluster/Dockerfile -t lte-ray:0.1.0-gpu --build-arg BASE=rayproject/ray:2.60.0-py311-gpu "
    "--build-arg TORCH_INDEX=https://pypi.org/simple .": DOCKER,
    "docker run --rm --shm-size 1g --gpus all lte-ray:0.1.0-gpu lte-ray train regression --num-heads 2 --gpus-per-head 0.5 "
    "--steps 20": DOCKER,
    "kubectl apply -f cluster/kuberay-job.yaml": KUBERNETES,
    "kubectl logs --follow --selector job-name=lte-ray": KUBERNETES,
    "kubectl apply -f cluster/kuberay-cluster.yaml": KUBERNETES,
    "kubectl port-forward service/lte-ray-head-svc 8265:8265": KUBERNETES,
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret lte-ray -o jsonpath='{.data.auth_token}' | "
    "base64 -d)": KUBERNETES,
    "ray job submit --address http://127.0.0.1:8265 --working-dir . -- lte-ray train mine.py:Net --num-heads 4 "
    "--gpus-per-head 1 --resource-timeout 30m --storage s3://bucket/runs --name net --resume": "it needs GPUs and a bucket",
    "kubectl apply -f cluster/kubernetes-job.yaml": KUBERNETES,
    "ray up cluster/aws.yaml": CLOUD,
    "ray dashboard cluster/aws.yaml": CLOUD,
    "ray down cluster/aws.yaml": CLOUD,
    "sbatch cluster/slurm.sh mine.py:Net --num-heads 8 --storage /shared/runs --name net-8": "it needs Slurm; tests/cluster "
    "has programs in its place",
    "sky jobs launch cluster/skypilot.yaml --env STORAGE=s3://bucket/runs": CLOUD,
    "prometheus --config.file=cluster/prometheus.yaml": "it runs until Ctrl-C; tests/cluster checks the file",
    "lte-ray train regression --num-heads 2 --steps 200": Runs(),
    NEW: Runs(quick=True),
    "lte-ray train my_net.py:MyNet --num-heads 2 --steps 200": Runs(after=NEW),
    "lte-ray new my_lm --from causal-lm": Runs(quick=True),
    "lte-ray train causal-lm --worker.model gpt2 --worker.data my.jsonl --num-heads 2 --name my-lm": HUB,
    "lte-ray train causal-lm --worker.model gpt2 --worker.data my.jsonl --others frozen --lora-r 16 --name mine-lora": HUB,
    "lte-ray export mine-lora adapter --to peft": HUB,
    "lte-ray export ~/ray_results/my-lm out-lm --to pretrained": HUB,
    "lte-ray train classify --worker.model bert-base-uncased --worker.data reviews.csv --num-heads 2": HUB,
    "lte-ray train image --worker.data FOLDER --worker.network resnet --worker.image-size 64 --num-heads 2": "it needs images; "
    "tests/unit/workers has some",
    "lte-ray train vit --num-heads 2 --lr 0.0125": "it needs Fashion-MNIST; tests/unit/workers has smaller images",
    "lte-ray train vit --config workers/configs/vit-gpu.toml": "it needs a GPU",
    "lte-ray train vit --config workers/configs/vit-paper.toml --worker.data FOLDER": "it needs GPUs, and ImageNet",
    "lte-ray train workers.gpt:GPT --num-heads 2 --gpus-per-head 0.5 --precision bf16-mixed --lora-r 32 --steps 60 "
    "--eval-every 0 --worker.width 768 --worker.depth 12 --worker.attention-heads 12 --worker.context 512 "
    "--worker.batch-size 32": "it needs a GPU",
}

RUN = {command: how for command, how in DECISIONS.items() if isinstance(how, Runs)}
PROGRAMS = {
    "lte-ray",
    "ray",
    "make",
    "python",
    "pip",
    "cluster/local.sh",
    "cluster/local-nodes.sh",
    "docker",
    "kubectl",
    "sbatch",
}

OTHER_FLAGS = {
    "--pairs", "--part",  # of benchmarks
    "--address", "--backend-store-uri", "--dashboard-host", "--generate", "--head", "--runtime-env-json", "--working-dir",
    "--block", "--deadline-remaining-seconds", "--exclusive", "--labels", "--node-id", "--node-ip-address",
    "--reason", "--reason-message",
}  # fmt: skip
"""Flags of programs other than lte-ray."""


def test_every_command_has_a_decision() -> None:
    """A new command must be listed in DECISIONS, and a command that is gone must be removed."""
    assert set(commands()) == set(DECISIONS)


def test_commands_stand_in_blocks_of_their_own() -> None:
    """Each code block says what it is, and no block but those of commands begins a line with a program."""
    for block in blocks():
        assert block.language in LANGUAGES, f"{block.page}: a code block of {block.language or 'no language'}"
        if block.language != "sh":
            begun = {line.split()[0] for line in block.text.splitlines() if line.strip()} & (PROGRAMS - {"lte-ray"})
            assert not begun, f"{block.page}: {begun} in a block of {block.language}"


def test_targets_and_modules_within_sentences_exist() -> None:
    """`make NAME` is a target, `python -m NAME` a module of this repository, `lte-ray NAME` a command."""
    makefile = (ROOT / "Makefile").read_text()
    for code, page in inline_code().items():
        if found := re.match(r"make ([a-z-]+)", code):
            assert re.search(rf"^{found[1]}:", makefile, flags=re.MULTILINE), f"{page}: {code}"
        if found := re.match(r"python -m (benchmarks[\w.]*)", code):
            assert (ROOT / f"{found[1].replace('.', '/')}.py").exists(), f"{page}: {code}"
        if found := re.match(r"lte-ray ([a-z]+)", code):
            assert found[1] in COMMANDS, f"{page}: {code}"


def test_flags_within_sentences_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag that a sentence or a table names is lte-ray's, or listed as another program's."""
    known = set(OTHER_FLAGS)
    for arguments in ([name] for name in COMMANDS):
        with contextlib.suppress(SystemExit):
            assert main([*arguments, "--help-all"]) == 0
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    for code, page in inline_code().items():
        for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)(?![\w.-])", code):
            assert flag in known, f"{page}: {code}"


@pytest.mark.ray
def test_quick_commands_run(
    mine: Path, home: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, after the README's first command; then the Python block that loads the run's weights."""
    train_mine()
    for quick, how in RUN.items():
        if how.quick:
            with contextlib.suppress(SystemExit):  # --help
                assert lte_ray_main(quick) == 0, quick
            assert capsys.readouterr().out, quick
    assert (mine / "out" / "model.safetensors").exists()
    monkeypatch.chdir(home / "ray_results" / "mine")
    names = {"worker": new_worker(), "safetensors": safetensors}
    exec(page_blocks("docs/runs.md", "python")[0], names)


@pytest.mark.slow
@pytest.mark.ray
def test_python_blocks_read_a_run(mine: Path, home: Path, local_ray: None) -> None:
    """They load its adapter, which gives the merged model's outputs, and continue it."""
    import peft

    train_mine()
    assert lte_ray_main("lte-ray export ~/ray_results/mine out-mine --to peft") == 0
    names = {"peft": peft, "model": build_model(new_worker(), seed=0)}
    exec(page_blocks("docs/export.md", "python")[0], names)
    run, batch = home / "ray_results" / "mine", torch.ones(2, 64)
    merged = new_worker().build_model()
    merged.load_state_dict(safetensors.torch.load_file(run / "model.safetensors"))
    torch.testing.assert_close(names["model"](batch), merged(batch))
    continued = {"lte_ray": lte_ray}
    exec(page_blocks("docs/faults.md", "python")[0], continued)
    assert Path(continued["result"].path) == run


def train_mine() -> None:
    """Runs the README's first training command in this process, under the name that other commands read."""
    assert lte_ray_main(f"{page_blocks('README.md', 'sh')[1].splitlines()[-1]} --name mine") == 0


def lte_ray_main(command: str) -> int:
    """Runs a command of lte-ray in this process."""
    return main([os.path.expanduser(word) for word in shlex.split(command)[1:]])


def new_worker() -> Any:
    """Returns an object of the README's class."""
    return importlib.import_module("mine").Net()


def save_bert(home: Path) -> None:
    """Leaves a run of a model of transformers, made without Ray."""
    export_runs.save_run(home / "ray_results", "bert", export_runs.settings(), name="bert")


@dataclass
class Shell:
    """Runs commands as a user would, in one folder and one home directory."""

    folder: Path
    environment: dict[str, str]
    done: set[str] = field(default_factory=set)

    def run(self, command: str, **environment: str) -> None:
        """Runs a command, after the one that it needs. Fails with its output unless it exits with 0."""
        how = RUN[command]
        if how.after and how.after not in self.done:
            self.run(how.after)
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT if how.root else self.folder,
            env={**self.environment, **how.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"
        self.done.add(command)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A user's folder with the documentation's files, and an empty home directory."""
    folder, home = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("home")
    write_files(folder)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".gitignore").write_text(".venv\n")
    save_bert(home)
    environment = {name: os.environ[name] for name in ("LANG", "PYTHONPATH", "TMPDIR") if name in os.environ}
    paths = [environment.get("PYTHONPATH"), str(ROOT)]  # the run `bert` names a worker of the tests
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"])
    return Shell(folder, {**environment, "HOME": str(home), "PATH": path})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [command for command, how in RUN.items() if not how.cluster])
def test_a_command_runs_as_written(shell: Shell, command: str) -> None:
    """In a shell, to its end."""
    shell.run(command)


@dataclass(frozen=True)
class Cluster:
    """A local cluster: the port of its job server, and what finds it."""

    port: int
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster(shell: Shell) -> Iterator[Cluster]:
    """The cluster that `cluster/local.sh` starts, on ports that are free, in the same home directory."""
    port = JOB_SERVER if is_free(JOB_SERVER) else free_port()
    # Ray's sockets lie in this folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        ray = Path(folder) / "start-ray"
        ports = f"--port {free_port()} --dashboard-port {port} --dashboard-agent-listen-port {free_port()} --num-cpus 4"
        ray.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent}/ray" "$@" {ports}\n')
        ray.chmod(0o755)
        shell.run(TOKEN)
        found = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        environment = {**shell.environment, **found, "RAY": str(ray)}
        process = subprocess.Popen(["bash", "-c", LOCAL_CLUSTER], cwd=ROOT, env=environment, start_new_session=True)
        try:
            end = time.monotonic() + 120
            while is_free(port):
                assert process.poll() is None, "cluster/local.sh ended"
                assert time.monotonic() < end, "cluster/local.sh has no job server"
                time.sleep(0.5)
            yield Cluster(port, found)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", [command for command, how in RUN.items() if how.cluster])
def test_a_command_for_a_cluster_runs_as_written(shell: Shell, cluster: Cluster, command: str) -> None:
    """Against a local cluster that a user would have started."""
    if str(JOB_SERVER) in command and cluster.port != JOB_SERVER:
        pytest.skip(f"another program uses port {JOB_SERVER}")
    shutil.rmtree(Path(shell.environment["HOME"], "ray_results", "mine"), ignore_errors=True)  # other commands took more steps
    shell.run(command, **cluster.environment)


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    """Returns a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
