"""Reads the definitions in `cluster/`, and finds the programs that check them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lte_ray.cli.main import main

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


def read_yaml(name: str) -> dict[str, Any]:
    """Returns the content of a YAML file in `cluster/`."""
    return yaml.safe_load((CLUSTER / name).read_text())


def check_with(program: str, *arguments: str | Path, package: str) -> None:
    """Runs a checker, which must exit with 0. Skips the test if the checker isn't installed."""
    path = shutil.which(program, path=Path(sys.executable).parent) or shutil.which(program)
    if path is None:
        pytest.skip(f"{program} isn't installed ({package})")
    result = subprocess.run([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert result.returncode == 0, result.stdout


def check_train(arguments: list[str]) -> None:
    """Fails unless `lte-ray train` accepts these arguments, and needs no Ray to say so."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments, "--print-config"])
    assert ended.value.code == 0


def strings(value: Any) -> Iterator[str]:
    """Yields every string in the values of a YAML file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def commands(program: str) -> list[tuple[str, str]]:
    """Returns each command that begins with these words, in a value or a comment, and the file that has it."""
    found = []
    for path in sorted(CLUSTER.iterdir()):
        if path.suffix == ".json":
            continue
        comments = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
        texts = ["\n".join(comments)]
        if path.suffix == ".yaml":
            texts += [*strings(read_yaml(path.name)), *_as_one_command(read_yaml(path.name))]
        for text in texts:
            lines = text.replace("\\\n", " ").splitlines()
            matches = (re.search(rf"(?:^|-- |:[\w.-]+ ){program} (.*)", line.strip()) for line in lines)
            found += [(path.name, match[1]) for match in matches if match and "`" not in match[1]]
    return sorted(set(found))


def _as_one_command(definition: dict[str, Any]) -> Iterator[str]:
    """Yields the commands of a Kubernetes Job, which are lists."""
    if definition.get("kind") == "Job":
        for container in definition["spec"]["template"]["spec"]["containers"]:
            yield " ".join([*container["command"], *container["args"]])
