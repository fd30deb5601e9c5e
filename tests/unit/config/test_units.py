"""Times and rates with units are read exactly, or are one clear error that names the flag."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lte_ray.cli.flags import parse
from lte_ray.config import SECTIONS, FailureConfig, MergeConfig, PlacementConfig, StorageConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.config.units import READERS, bytes_per_second, seconds
from lte_ray.errors import ConfigError

TIMES = {
    "30s": 30, "5m": 300, "2h": 7200, "1d": 86400, "250ms": 0.25, "1h30m": 5400, "1h 5 s": 3605, "1.5m": 90, ".5s": 0.5,
    "30": 30, "0.5": 0.5, "1e3": 1000, "-1": -1, 30: 30, 0.25: 0.25,
}  # fmt: skip

RATES = {
    "10Gbit": 1.25e9, "10Gbps": 1.25e9, "10 Gbit/s": 1.25e9, "1.25GB": 1.25e9, "1.25GB/s": 1.25e9, "100Mbit": 12.5e6,
    "1MiB": 2**20, "8kbit": 1000, "500B": 500, "1.25e9": 1.25e9, 0: 0,
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), TIMES.items())
def test_times(text: str | float, value: float) -> None:
    """A number with a unit, several of them, or a plain number of seconds."""
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), RATES.items())
def test_rates(text: str | float, value: float) -> None:
    """Bits or bytes, in powers of 1000 or 1024, or a plain number of bytes per second."""
    assert bytes_per_second(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "s", "5 parsecs", "1h30", "5M", "-5m", "1,5m", "0x1", "30s x"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """The error names the setting, and shows the forms."""
    with pytest.raises(ConfigError, match=r"--grace is '.*', but it must be a time such as 30s, 5m, 1h30m, or a number of"):
        seconds(text, "--grace")


@pytest.mark.parametrize("text", ["", "10Gb", "10G", "fast", "10gbit", "-1GB", "10Gbps/s", "10GB/min"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    """Among them 10Gb, which may be bits or bytes."""
    with pytest.raises(ConfigError, match=r"--bandwidth is '.*', but it must be a rate such as 10Gbit or 1\.25GB"):
        bytes_per_second(text, "--bandwidth")


@pytest.mark.parametrize("kind", [*SECTIONS, ClusterModel])
def test_every_setting_with_a_unit_takes_text_and_becomes_a_number(kind: type) -> None:
    """In Python, too; a text without sense is an error that names the flag."""
    for field in dataclasses.fields(kind):
        if "unit" in field.metadata:
            text = {"time": "2m", "rate": "2MB"}[field.metadata["unit"]]
            given = {"when": "quorum"} if field.name == "deadline" else {}
            made = kind(**{field.name: text}, **given)
            assert getattr(made, field.name) == READERS[field.metadata["unit"]](text, "") > 0
            with pytest.raises(ConfigError, match=f"--{field.name.replace('_', '-')} is 'soon', but it must be a "):
                kind(**{field.name: "soon"}, **given)


def test_flags_and_files_take_units(tmp_path: Path) -> None:
    """`--grace 2m`, and grace = "2m" in TOML; plain numbers count in seconds in both."""
    path = tmp_path / "settings.toml"
    path.write_text('backoff = "500ms"\nresource_timeout = "1h"\nstorage_patience = 5\nmerge_every = "1m30s"\n')
    parsed = parse(None, "WORKER", ["--config", str(path), "--grace", "2m", "--when", "quorum", "--deadline", "30"])
    assert parsed.failure == FailureConfig(backoff=0.5, grace=120)
    assert parsed.placement == PlacementConfig(resource_timeout=3600)
    assert parsed.storage == StorageConfig(storage_patience=5)
    assert parsed.merge == MergeConfig(merge_every="1m30s", when="quorum", deadline=30)
    assert parsed.merge.every_seconds == 90


@pytest.mark.parametrize("text", ["0s", "-3", "30", "inf", "soon"])
def test_the_time_of_a_round_needs_a_unit(text: str) -> None:
    """A plain `--merge-every 30` could be meant as steps; and the time must be above 0."""
    with pytest.raises(ConfigError, match=f"--merge-every is '{text}', but it must be a time"):
        MergeConfig(merge_every=text)
