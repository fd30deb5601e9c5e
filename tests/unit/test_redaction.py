"""Secrets are recognized by name and inside URIs, and appear in no text."""

from __future__ import annotations

import pickle
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.errors import LTEError, StorageError, WorkerFailed
from lte_ray.redaction import MASK, is_secret, is_sensitive, mask_secrets, redact, split_secrets, without_credentials

SECRETS = [
    "token", "secret", "password", "passwd", "api_key", "apikey", "apiKey", "access_key", "private_key", "credential",
    "credentials", "hf_token", "HF_TOKEN", "awsSecretKey", "AWS_SECRET_ACCESS_KEY", "authToken", "db_password",
    "user-password", "connection_string", "api_keys", "access_tokens", "passphrase", "wandb.api_key", "secret_value",
    "client_secret", "tokenSecret", "bearer",
]  # fmt: skip
PLAIN = [
    "tokens", "tokenizer", "key", "keys", "num_tokens", "token_length", "tokens_per_batch", "max_tokens", "pad_token",
    "mask_token", "cls_token", "eos_token", "loss_per_token", "query_key", "key_dim", "monkey", "keyboard", "author",
    "secretary", "passing", "token_path", "password_file", "api_key_env", "lr",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_names_of_secrets(name: str) -> None:
    """In snake, camel, kebab and upper case."""
    assert is_secret(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_that_only_sound_like_secrets(name: str) -> None:
    """Counts, vocabulary, attention keys, and paths of secrets."""
    assert not is_secret(name)


URIS = {
    "s3://KEY:SECRET@bucket/runs": "s3://bucket/runs",
    "s3://KEY:SEC/R+T@bucket/a@b?region=eu&scheme=http": "s3://bucket/a@b?region=eu&scheme=http",
    "s3://KEY@bucket/runs": "s3://bucket/runs",
    "s3://bucket/x?secret_key=SECRET&region=eu": "s3://bucket/x?region=eu",
    "s3://bucket/x?access_key=KEY&secret_key=SECRET": "s3://bucket/x",
    "s3://b/x?X-Amz-Signature=S&X-Amz-Credential=C&X-Amz-Date=D": "s3://b/x?X-Amz-Date=D",
    "https://me:SECRET@host:8080/x": "https://host:8080/x",
    "https://SECRET@host/x": "https://host/x",
    "https://acc.blob.core.windows.net/c?sv=2024&sig=SECRET&se=2": "https://acc.blob.core.windows.net/c?sv=2024&se=2",
    "abfs://container@acc.dfs.core.windows.net/x?sig=SECRET": "abfs://container@acc.dfs.core.windows.net/x",
    "abfs://container:SECRET@acc.dfs.core.windows.net/x": "abfs://container@acc.dfs.core.windows.net/x",
    "sftp://me:SECRET@host:22/x": "sftp://me@host:22/x",
    "simplecache::s3://KEY:SECRET@bucket/x": "simplecache::s3://bucket/x",
}


@pytest.mark.parametrize("uri", list(URIS))
def test_uris_lose_their_credentials_and_nothing_else(uri: str) -> None:
    """Containers, hosts, ports, paths and harmless parameters stay. Doing it twice changes nothing."""
    assert without_credentials(uri) == URIS[uri]
    assert without_credentials(URIS[uri]) == URIS[uri]


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b",
        "https://host:80/a@b",
        "gs://anonymous@bucket/x",
        "hdfs://me@host:80/x",
        "/home/a:b@c/x",
        "C:\\runs",
        "",
        "memory://x",
        "s3://b/x?region=eu",
        "file:///tmp/x",
        "s3://[::1]:80/a@b",
        "a.b:C",
    ],
)
def test_text_without_credentials_stays(text: str) -> None:
    """Also if it contains an @ or a colon for another reason."""
    assert without_credentials(text) == text


SAFE = st.text("abcXYZ019+", min_size=8, max_size=12)


@given(key=SAFE, secret=st.text("abcXYZ019+/=", min_size=8, max_size=30).filter(lambda s: len(set(s)) > 3), path=SAFE)
def test_no_part_of_a_secret_is_in_a_message(key: str, secret: str, path: str) -> None:
    """An error's text contains neither the secret nor the key, quoted with its URI or alone."""
    uri = f"s3://{key}q:{secret}q@bucket/{path}z"
    said = redact(f"--storage is {uri!r}; parsing {uri} failed at {secret}q", uri)
    assert f"{secret}q" not in said
    assert f"{key}q" not in said
    assert f"s3://bucket/{path}z" in said


def test_errors_show_no_credentials_also_after_pickling() -> None:
    """Every error redacts its own text, including a worker's traceback."""
    for error in (
        StorageError("'s3://KEY:SECRET@bucket/x' can't be opened"),
        WorkerFailed("head 0", 3, "OSError: https://me:SECRET@host/x"),
    ):
        assert "SECRET" not in str(error)
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert "SECRET" not in str(again)
    assert str(LTEError("no URI: a:b@c")) == "no URI: a:b@c"
    assert str(LTEError()) == ""


@dataclass
class Login:
    """A setting that is an object."""

    user: str
    password: str | None


class Loop:
    """An object that contains itself."""

    def __init__(self) -> None:
        self.me = self


@dataclass(slots=True)
class Slotted:
    """A setting without a ``__dict__``."""

    user: str
    password: str | None


@dataclass(slots=True)
class Inherited(Slotted):
    """Its slots are its parent's."""

    port: int = 80


class Named(NamedTuple):
    """A setting that is a named tuple."""

    user: str
    password: str | None


class Private:
    """A slot whose name Python mangles."""

    __slots__ = ("__secret",)

    def __init__(self, secret: str | None = None) -> None:
        if secret is not None:
            self.__secret = secret


class Touchy:
    """An object that runs code when its attributes are read."""

    __slots__ = ("me",)

    def __init__(self) -> None:
        self.me = self

    def __getattr__(self, name: str) -> None:
        raise RuntimeError(name)

    @property
    def password(self) -> str:
        raise RuntimeError("password")


def looped() -> list[object]:
    """A list with a pair whose value is the list."""
    made: list[object] = []
    made.append(("me", made))
    return made


@pytest.mark.parametrize(
    "value",
    [
        Slotted("me", "x"),
        Inherited("me", "x"),
        Named("me", "x"),
        Private("x"),
        partial(print, password="x"),
        [("password", "x")],
        (("user", "me"), ("password", "x")),
        {("password", "x")},
        [["password", "x"]],
        deque([("password", "x")]),
        [[("password", "x")]],
        {"login": [Named("me", "x")]},
        [("login", Slotted("me", "x"))],
    ],
    ids=lambda value: type(value).__name__,
)
def test_secrets_are_found_in_slots_named_tuples_and_lists_of_pairs(value: object) -> None:
    """A pair in a list is a name and its value."""
    assert is_sensitive("options", value)


@pytest.mark.parametrize(
    "value",
    [
        Slotted("me", None),
        Named("me", ""),
        Private(),
        Touchy(),
        looped(),
        [("user", "me")],
        [("token", "")],
        ["password", "x"],
        [("password", "token", "x")],
        [(1, "password")],
        np.arange(3),
        slice(3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_without_secrets_are_searched_without_running_their_code(value: object) -> None:
    """No property or ``__getattr__`` is called; empty slots and loops cause no error; a list of words has no values."""
    assert not is_sensitive("options", value)


def test_values_that_contain_a_secret_are_hidden() -> None:
    """URIs, tables, lists and objects are searched; plain values, None and switches stay."""
    assert is_sensitive("data", "s3://KEY:SECRET@bucket/x")
    assert is_sensitive("sources", ["/a", "https://me:pw@host/x"])
    assert is_sensitive("options", {"auth": {"password": "x"}})
    assert is_sensitive("login", Login("me", "x"))
    assert not is_sensitive("login", Login("me", None))
    assert not is_sensitive("data", "s3://bucket/x")
    assert not is_sensitive("use_password", True)
    assert not is_sensitive("token", None)
    assert not is_sensitive("token", "")
    assert not is_sensitive("loop", Loop())
    assert not is_sensitive("kind", Login)


def test_secrets_are_left_out_and_those_to_give_again_are_named() -> None:
    """A secret that has its default isn't written, but needn't be given again."""
    values = {"lr": 0.1, "api_token": "abc", "password": "default", "tokens": 5}
    kept, named = split_secrets(values, {"lr": 0.1, "api_token": "none", "password": "default"})
    assert kept == {"lr": 0.1, "tokens": 5}
    assert named == ["api_token"]
    assert mask_secrets(values) == {"lr": 0.1, "api_token": MASK, "password": MASK, "tokens": 5}
