"""Shared by all tests: torch uses one thread, and nothing knows any chance or clock."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.support import LONG_RUN

settings.register_profile("lte-ray", deadline=None, max_examples=25 if LONG_RUN else 10, derandomize=True)
settings.load_profile("lte-ray")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skips files without Ray tests when only those are selected: importing the others takes half a minute."""
    if re.match(r"ray\b", config.option.markexpr) and collection_path.name.startswith("test_"):
        return "mark.ray" not in collection_path.read_text() or None
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow the cases of a `sweep` that `make test` can leave out.

    Cases are kept in order while they bring a parameter value that no kept case has. `sweep("name", ...)` looks at these
    parameters only.
    """
    kept: dict[str, set[tuple[str, str]]] = {}
    for item in items:
        marker = item.get_closest_marker("sweep")
        if marker is None or not hasattr(item, "callspec"):
            continue
        values = {(name, repr(value)) for name, value in item.callspec.params.items() if name in (marker.args or (name,))}
        seen = kept.setdefault(item.nodeid.partition("[")[0], set())
        if values <= seen:
            item.add_marker(pytest.mark.slow)
        seen |= values


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """Results depend on the thread count in their last bits, and small tensors are fastest with one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same alone, in any order, and in any of several processes."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[None]:
    """A local Ray that says it has 4 CPUs, without dashboard."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture
def local_ray(shared_ray: None) -> None:
    """The shared Ray; started with the first test that asks for it."""


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """The tests run in two parts (`make unit`, `make integration`): that ARGS selects none of one part is no failure."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.option.markexpr:
        session.exitstatus = pytest.ExitCode.OK
