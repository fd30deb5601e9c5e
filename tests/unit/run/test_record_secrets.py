"""Secrets are in neither run.toml nor messages, and must be given again when a run is resumed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from lte_ray.cli.flags import Parsed
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, StorageError, UserError, WorkerError
from lte_ray.export.worker_factory import make_worker
from lte_ray.run import record as run_record
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from tests.support.config_files import GOOD, parse_config
from workers.regression import Regression


class Needy:
    """A worker with secrets."""

    def __init__(self, api_token: str, password: str = "", tokens: int = 5, source: str = "/data") -> None:
        self.api_token, self.password, self.tokens, self.source = api_token, password, tokens, source

    def build_model(self) -> None: ...
    def train_batches(self) -> None: ...
    def loss(self) -> None: ...
    def evaluate(self) -> None: ...


def recorded(worker: Any, storage: StorageConfig, path: Path, merge: MergeConfig | None = None) -> str:
    """The text of ``run.toml`` as a run writes it."""
    lte, train = LTEConfig(), TrainConfig()
    made = Settings("a", lte, merge or MergeConfig(), train)
    directory = RunDirectory.open(str(path / "runs"), "a")
    run_start.create_run(
        directory, run_record.make_record(worker, GOOD, made, PlacementConfig(), storage, FailureConfig()), storage
    )
    return (path / "runs" / "a" / "run.toml").read_text()


def test_secrets_are_not_written_and_must_be_given_again(tmp_path: Path) -> None:
    """run.toml lists those that it leaves out; --config needs them as flags."""
    worker = Needy("SECRET", "hunter2", source="s3://KEY:SECRET@bucket/data")
    text = recorded(worker, StorageConfig(storage="s3://KEY:SECRET@bucket/runs?region=eu"), tmp_path)
    assert not {s for s in ("SECRET", "hunter2", "KEY") if s in text}
    record = tomllib.loads(text)
    assert record["omitted"] == ["worker.api_token", "worker.password", "worker.source"]
    assert record["worker"] == {"tokens": 5}
    assert record["storage"] == "s3://bucket/runs?region=eu"
    file = tmp_path / "runs" / "a" / "run.toml"
    found = parse_config(file, worker=Needy)
    assert isinstance(found, ConfigError)
    assert "leaves out --worker.api-token, --worker.password, --worker.source" in str(found)
    given = ("--worker.api-token", "again", "--worker.password=x", "--worker.source", "/d")
    parsed = parse_config(file, *given, worker=Needy)
    assert isinstance(parsed, Parsed)
    assert (parsed.worker.api_token, parsed.worker.password, parsed.worker.tokens) == ("again", "x", 5)
    assert isinstance(parse_config(file), ConfigError | Parsed)  # another worker has other arguments


def test_a_run_without_secrets_omits_nothing(tmp_path: Path) -> None:
    """The key exists only if something is left out; a secret that has its default needn't be given."""
    assert "omitted" not in recorded(Regression(), StorageConfig(), tmp_path)


def test_an_export_says_which_secret_is_missing(tmp_path: Path) -> None:
    """The worker can't be made without it; the message says how to give it."""
    record = tomllib.loads(recorded(Needy("SECRET"), StorageConfig(), tmp_path))
    with pytest.raises(WorkerError, match=r"needs api_token, which run.toml omits .* worker=Needy\(api_token=\.\.\."):
        make_worker(record | {"program": f"{__file__}:Needy"})


def test_a_policys_secrets_are_not_written(tmp_path: Path) -> None:
    """Its arguments are treated like the worker's."""
    (tmp_path / "mine.py").write_text("def mine(pending, roster, *, hub_token='', rate=1.0): ...")
    merge = MergeConfig(policy=f"{tmp_path / 'mine.py'}:mine", policy_args={"hub_token": "SECRET", "rate": 2.0})
    text = recorded(Regression(), StorageConfig(), tmp_path, merge)
    assert "SECRET" not in text
    assert tomllib.loads(text)["omitted"] == ["policy.hub_token"]
    found = parse_config(tmp_path / "runs" / "a" / "run.toml")
    assert isinstance(found, ConfigError)
    assert "--policy.hub-token" in str(found)


@pytest.mark.parametrize(
    ("uri", "shown", "found", "change"),
    [
        (
            "s3://b/x?secret_key=HIDDEN",
            "s3://b/x",
            "S3 URI: 'secret_key'",
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        ("s3://b/x?secret_key=abc", "s3://b/x", "S3 URI: 'secret_key'", "AWS_PROFILE"),
        ("s3://K:HIDDEN/S@b/x", "s3://b/x", "Cannot parse URI", "AWS_PROFILE"),
        ("gs://b?token=HIDDEN", "gs://b", "GCS URI: 'token'", "(GOOGLE_APPLICATION_CREDENTIALS), or the machine's role."),
        ("nowhere://me:HIDDEN@host/x", "nowhere://host/x", "Protocol not known", "by the environment, or the machine's role."),
    ],
)
def test_an_error_says_where_credentials_of_a_uri_belong(uri: str, shown: str, found: str, change: str) -> None:
    """It has pyarrow's reason, not one about a missing library, and names the variables for credentials."""
    with pytest.raises(StorageError) as raised:
        RunDirectory.open(uri, "a")
    said = str(raised.value)
    assert said.startswith(f"--storage is '{shown}', which can't be opened: ")
    assert found in said
    assert "Credentials don't belong in a URI: give them by the environment" in said
    assert change in said
    assert not any(word in said for word in ("HIDDEN", "abc", "s3fs"))


def test_an_error_without_credentials_does_not_mention_them() -> None:
    """It says only what is wrong."""
    with pytest.raises(StorageError, match=r"Unexpected query parameter in S3 URI: 'what'\.$"):
        RunDirectory.open("s3://b/x?what=1", "a")


def test_storage_errors_hide_credentials() -> None:
    """Also in the texts of pyarrow and fsspec about a URI that they can't open."""
    for uri in ("s3://KEY:HID/DEN@bucket/x?what=1", "s3://b/x?secret_key=HIDDEN", "nowhere://me:HIDDEN@host/x"):
        with pytest.raises(UserError) as raised:
            RunDirectory.open(uri, "a")
        assert "HID" not in str(raised.value)
        assert "DEN" not in str(raised.value)
    assert RunDirectory.open("memory://KEY:SECRET@bucket/x", "a").display == "memory://bucket/x/a"
