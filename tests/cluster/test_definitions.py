"""The definitions of clusters: by the schemas of Ray, Kubernetes and SkyPilot, and for what a run needs of them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

import lte_ray
from lte_ray.errors import RESUMABLE
from tests.cluster.files import CLUSTER, check_train, commands, read_yaml, strings
from tests.cluster.test_scripts import check_ray_start

KUBERAY, LAUNCHER = ("kuberay-job.yaml", "kuberay-cluster.yaml"), ("aws.yaml", "gcp.yaml")
KUBERNETES = "1.31"
"""The version of Kubernetes whose schema pods and jobs must fit."""

TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}


def fields(required: str, **properties: Any) -> dict[str, Any]:
    """Returns the schema of an object that has these fields and no others."""
    return {"type": "object", "required": required.split(), "properties": properties, "additionalProperties": False}


GROUP = {"labels": TEXTS, "rayStartParams": TEXTS, "template": {"type": "object"}}
CLUSTER_SPEC = fields(
    "rayVersion headGroupSpec workerGroupSpecs",
    rayVersion={"type": "string"},
    authOptions=fields("mode", mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=fields("", version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=COUNT),
    headGroupSpec=fields("rayStartParams template", **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName={"type": "string"}, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP,
        ),
    },
)  # fmt: skip
JOB_SPEC = fields(
    "entrypoint rayClusterSpec",
    entrypoint={"type": "string"},
    runtimeEnvYAML={"type": "string"},
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes={"type": "boolean"},
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=CLUSTER_SPEC,
)
"""The fields of KubeRay's CRDs (v1) that the definitions use. Written by hand: no registry has KubeRay's own schema, which has
more than a megabyte. Pods are checked by Kubernetes' schema."""


def ray_spec(name: str) -> dict[str, Any]:
    """Returns a KubeRay file's specification of the cluster."""
    spec = read_yaml(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def ray_groups(name: str) -> list[dict[str, Any]]:
    """Returns the head node's group, then the others."""
    spec = ray_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name: str) -> None:
    """Of the two CRDs, with their types."""
    definition = read_yaml(name)
    assert definition["apiVersion"] == "ray.io/v1"
    jsonschema.validate(definition["spec"], {"RayJob": JOB_SPEC, "RayCluster": CLUSTER_SPEC}[definition["kind"]])


@pytest.mark.parametrize("name", [*KUBERAY, "kubernetes-job.yaml"])
def test_kubernetes_accepts_pods_and_jobs(name: str) -> None:
    """By Kubernetes' own schema, without unknown fields."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (100 MB)")
    resources = [read_yaml(name)]
    if name in KUBERAY:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "node"}}
        resources = [pod | group["template"] for group in ray_groups(name)]
    for resource in resources:
        kubernetes_validate.validate(resource, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberays_driver_is_safe_and_no_head_of_a_run_is_there(name: str) -> None:
    """Ray's head node, where drivers run, has no CPUs for heads and is on an on-demand machine; the others are on spot ones."""
    safe, *others = ray_groups(name)
    assert safe["rayStartParams"]["num-cpus"] == "0"
    assert safe["labels"]["ray.io/market-type"] == "on-demand"
    assert {group["labels"]["ray.io/market-type"] for group in others} == {"spot"}
    selectors = [group["template"]["spec"]["nodeSelector"] for group in (safe, *others)]
    assert selectors[0] not in selectors[1:]
    for group in (safe, *others):
        check_ray_start([word for key, value in group["rayStartParams"].items() for word in (f"--{key}", value)])
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberays_clusters_ask_for_a_token_and_shrink(name: str) -> None:
    """Workers without a job go, also the last one."""
    spec = ray_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 600
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in spec["workerGroupSpecs"])


def test_a_rayjob_ends() -> None:
    """Whatever happens, its cluster is deleted, and it isn't tried without end."""
    spec = read_yaml("kuberay-job.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] <= 5
    assert spec["activeDeadlineSeconds"] <= 7 * 86_400


def test_kubernetes_repeats_only_what_can_be_resumed() -> None:
    """Exit code 75 and a lost node are repeated without limit; 1 and 2 fail the job."""
    spec = read_yaml("kubernetes-job.yaml")["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    codes = {code: rule["action"] for rule in rules for code in rule.get("onExitCodes", {}).get("values", ())}
    assert codes == {RESUMABLE: "Ignore", 1: "FailJob", 2: "FailJob"}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_cluster_launcher_accepts_the_file(name: str) -> None:
    """Ray fills in its defaults and applies its own schema, as `ray up` does."""
    validate_config(prepare_config(read_yaml(name)))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_cluster_launchers_driver_is_safe(name: str) -> None:
    """No head of a run is placed on Ray's head node, which isn't a spot machine. The others are, and go when they are idle."""
    config = read_yaml(name)
    safe = config["available_node_types"].pop(config["head_node_type"])
    assert safe["resources"] == {"CPU": 0}
    assert safe["labels"] == {"ray.io/market-type": "on-demand"}
    assert not is_spot(safe["node_config"])
    for kind in config["available_node_types"].values():
        assert kind["labels"] == {"ray.io/market-type": "spot"}
        assert is_spot(kind["node_config"])
        assert kind["min_workers"] == 0 < kind["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "~/.ray/auth_token" in config["file_mounts"]


def is_spot(machine: dict[str, Any]) -> bool:
    """Whether the cloud may take the machine back."""
    market = machine.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or any(rule.get("preemptible") for rule in machine.get("scheduling", ()))


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_cluster_launchers_commands_have_flags_of_ray(name: str) -> None:
    """Those that start Ray's head node and the other nodes."""
    config = read_yaml(name)
    started = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    flags = [command.removeprefix("ray start ") for command in started if command != "ray stop"]
    assert len(flags) == 2
    for line in flags:
        check_ray_start(shlex.split(line))


def test_skypilot_accepts_its_task() -> None:
    """By SkyPilot itself, where it is installed: its dependencies don't fit with Ray's in one environment."""
    sky = pytest.importorskip("sky", reason="pip install skypilot, in an environment of its own")
    task = sky.Task.from_yaml_config(read_yaml("skypilot.yaml"), env_overrides={"STORAGE": "s3://bucket/runs"})
    assert task.num_nodes > 1
    assert all(resource.use_spot for resource in task.resources)


def test_skypilot_recovers_what_can_be_resumed() -> None:
    """A preempted job starts again by itself; exit code 75 does, too."""
    task = read_yaml("skypilot.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [RESUMABLE]
    assert task["resources"]["use_spot"]
    assert set(re.findall(r"\$\{?([A-Z]\w*)", task["run"])) <= {
        "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", *task["envs"],
    }  # fmt: skip


TRAIN = commands("lte-ray train")


def test_every_definition_trains() -> None:
    """The commands in values and in comments are found."""
    files = {"Dockerfile", "aws.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "kubernetes-job.yaml", "local-nodes.sh",
             "local.sh", "skypilot.yaml"}  # fmt: skip
    assert files <= {name for name, _ in TRAIN}


@pytest.mark.parametrize(("name", "arguments"), TRAIN)
def test_lte_ray_accepts_every_command(name: str, arguments: str) -> None:
    """With a worker that comes with lte-ray instead of the user's, and a number for a shell's variable."""
    given = shlex.split(re.sub(r'"?\$\w+"?', "4", arguments).replace("mine.py:Net", "regression"))
    check_train(given)


@pytest.mark.parametrize("name", [*KUBERAY, *LAUNCHER])
def test_what_is_kept_can_be_continued(name: str) -> None:
    """Runs on clusters have a name, a storage that outlives the nodes, --resume, and wait for the nodes to come."""
    for file, command in TRAIN:
        if file == name:
            assert {"--name", "--storage", "--resume", "--resource-timeout", "--gpus-per-head"} <= set(command.split())


def test_versions_are_those_of_this_checkout() -> None:
    """Images are tagged with lte-ray's version, and Ray is the one that constraints.txt pins."""
    ray = re.search(r"^ray==(\S+)$", (CLUSTER.parent / "constraints.txt").read_text(), flags=re.MULTILINE)[1]  # type: ignore[index]
    assert {ray_spec(name)["rayVersion"] for name in KUBERAY} == {ray}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert set(re.findall(r"rayproject/ray:([\d.]+)", dockerfile)) == {ray}
    texts = [text for path in CLUSTER.glob("*.yaml") for text in strings(read_yaml(path.name))]
    tags = {tag for text in [*texts, dockerfile] for tag in re.findall(r"lte-ray:(\d[\w.]*)", text)}
    assert tags == {lte_ray.__version__}


def test_the_image_gets_every_file_that_it_copies() -> None:
    """The files exist, and .dockerignore, which leaves out everything else, lets them through."""
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]}
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert all((CLUSTER.parent / name).exists() for name in copied)
