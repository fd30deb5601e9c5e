"""Keeps secrets out of a run's files, messages and displays. They are recognized by their names and their place in a URI."""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

MASK = "***"

OMITTED = "omitted"
"""Key of ``run.toml``: the arguments that it leaves out since they are secrets, as ``worker.NAME`` or ``policy.NAME``."""

SECRET_WORDS = {
    "apikey", "accesskey", "secretkey", "privatekey", "apitoken", "accesstoken", "authtoken", "authorization", "bearer",
    "cookie", "cookies", "credential", "credentials", "jwt", "passcode", "passphrase", "passwd", "password", "passwords", "pwd",
    "secret", "secrets",
}  # fmt: skip
"""Words that make a name a secret's, anywhere in it."""

SECRET_PAIRS = {
    ("api", "key"), ("api", "keys"), ("access", "key"), ("account", "key"), ("auth", "key"), ("encryption", "key"),
    ("private", "key"), ("secret", "key"), ("service", "key"), ("shared", "key"), ("signing", "key"), ("ssh", "key"),
    ("storage", "key"), ("connection", "string"), ("access", "tokens"), ("api", "tokens"), ("auth", "tokens"),
}  # fmt: skip
"""Pairs of words that do so. `key` alone may belong to a dictionary or to attention, and `tokens` are usually counted."""

TEXT_TOKEN_WORDS = {
    "begin", "beginning", "bos", "class", "cls", "dist", "distillation", "each", "empty", "end", "eos", "eot", "every",
    "first", "ignore", "image", "last", "mask", "max", "min", "newline", "next", "of", "pad", "padding", "per", "prompt",
    "register", "sep", "separator", "special", "start", "stop", "text", "unk", "unknown", "word",
}  # fmt: skip
"""Words before `token` if it is a piece of text: `pad_token`, `loss_per_token`. Any other token is a secret."""

DESCRIBING_WORDS = {
    "count", "dim", "dir", "directory", "env", "expiry", "file", "filename", "folder", "format", "length", "len", "lifetime",
    "name", "path", "size", "timeout", "ttl", "type", "url", "var", "variable",
}  # fmt: skip
"""Last words of names that describe a secret without being one: `token_path`, `password_env`."""

SECRET_PARAMETERS = {"sig", "signature", "key", "auth"}
"""Parameters that are secrets in a URI, in addition to those whose name is a secret's everywhere."""

USER_SCHEMES = {"abfs", "abfss", "adl", "ftp", "gcs", "gs", "hdfs", "sftp", "smb", "ssh", "viewfs", "wasb", "wasbs", "webhdfs"}
"""Schemes whose part before ``@`` is a container or a person's name. In other schemes it may be a key."""

PORTLESS_SCHEMES = {"s3", "s3a", "s3n", "gs", "gcs"}

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_secret(name: str) -> bool:
    """Whether the name is a secret's: `api_token`, `password`, `awsSecretKey`, but not `tokens` or `key`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or (words[-1] in DESCRIBING_WORDS and len(words) > 1):
        return False
    if SECRET_WORDS & set(words) or any(pair in SECRET_PAIRS for pair in pairwise(words)):
        return True
    return words[-1] == "token" and not (len(words) > 1 and words[-2] in TEXT_TOKEN_WORDS)


def is_sensitive(name: str, value: Any, depth: int = 4) -> bool:
    """Whether an argument must not be shown: its name is a secret's, or its value contains one (a URI, a table, an object).

    True, False, None and empty text are never secrets. Searches `depth` levels of tables and objects.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, str) and not value):
        return False
    return is_secret(name) or (
        depth > 0 and any(is_sensitive(inner, each, depth - 1) for inner, each in _named_contents(value))
    )


def split_secrets(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values that may be shown, and the names of the secrets that differ from their defaults.

    Other secrets are left out of the values, too, but don't have to be given again.
    """
    kept = {name: value for name, value in values.items() if not is_sensitive(name, value)}
    secrets = [name for name in values if name not in kept]
    return kept, [name for name in secrets if not same_plain_value(values[name], defaults.get(name, same_plain_value))]


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for messages, with ``***`` instead of secrets."""
    return {name: MASK if is_sensitive(name, value) else value for name, value in values.items()}


def without_credentials(uri: str) -> str:
    """A URI (or a chain: ``simplecache::s3://...``) without passwords, keys and signatures. Other text stays as it is."""
    return "::".join(_strip_credentials(part) for part in uri.split("::"))


def redact(text: str, *uris: str) -> str:
    """Removes the credentials from every URI in `text`, and masks those of `uris` wherever they occur."""
    for uri in uris:
        text = text.replace(uri, without_credentials(uri))
        for secret in sorted(_secrets(uri), key=len, reverse=True):
            text = text.replace(secret, MASK)
    return _URI.sub(lambda match: without_credentials(match[0]), text) if "://" in text else text


def _named_contents(value: Any) -> Iterator[tuple[str, Any]]:
    """The names and values inside a value."""
    if isinstance(value, str):
        if without_credentials(value) != value:
            yield "password", MASK
    elif isinstance(value, Mapping):
        yield from ((str(key), each) for key, each in value.items())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from (("", each) for each in value)
        yield from filter(_is_pair, value)
        if isinstance(value, tuple):
            yield from zip(getattr(value, "_fields", ()), value, strict=False)
    elif not isinstance(value, type) and not inspect.isroutine(value) and not inspect.ismodule(value):
        yield from _attributes(value)


def _is_pair(value: Any) -> bool:
    """Whether an item of a list can be a name and its value."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """The contents of an object's ``__dict__`` and slots, read without calling code of the object."""
    with contextlib.suppress(AttributeError):
        yield from object.__getattribute__(value, "__dict__").items()
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # the slot is empty
                    yield name, slot.__get__(value)


def same_plain_value(value: Any, default: Any) -> bool:
    """Whether two plain values are equal and of one type, compared without calling code of an object."""
    return type(value) is type(default) and isinstance(value, str | int | float) and value == default


def _strip_credentials(uri: str) -> str:
    scheme, user, rest = _split_uri(uri)
    kept = f"{user.partition(':')[0]}@" if user and scheme in USER_SCHEMES and user.partition(":")[0] else ""
    place, mark, query = rest.partition("?")
    parameters = [p for p in re.split(r"[&;]", query) if not _is_secret_parameter(p.partition("=")[0])]
    if not user and len(parameters) == len(re.split(r"[&;]", query)):
        return uri
    return uri[: uri.index("://") + 3] + kept + place + (mark if parameters and query else "") + "&".join(parameters)


def _split_uri(uri: str) -> tuple[str, str, str]:
    """The scheme, the user part and the rest of a URI. Text that isn't a URI is all rest.

    Keys may contain slashes: after a colon that doesn't begin a port, the user part extends to the next ``@``.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return "", "", uri
    scheme, rest = match[0][:-3].lower(), uri[match.end() :]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in place:
        user, _, _ = place.rpartition("@")
    else:
        _, colon, port = place.partition(":")
        open_key = colon and "@" in rest and not place.startswith("[") and (scheme in PORTLESS_SCHEMES or not port.isdigit())
        user = rest[: rest.index("@")] if open_key else ""
    return scheme, user, rest[len(user) + 1 :] if user else rest


def _is_secret_parameter(parameter: str) -> bool:
    name = unquote(parameter)
    return is_secret(name) or bool(SECRET_PARAMETERS & {word.lower() for word in _WORD.findall(name)})


def _secrets(uri: str) -> set[str]:
    """The secret pieces of a URI, as written and decoded. Short ones are left out, since they would mask ordinary text."""
    pieces: set[str] = set()
    for part in uri.split("::"):
        scheme, user, rest = _split_uri(part)
        name, _, password = user.partition(":")
        pieces |= {password} if scheme in USER_SCHEMES else {name, password}
        for parameter in re.split(r"[&;]", rest.partition("?")[2]):
            key, _, value = parameter.partition("=")
            pieces |= {value} if _is_secret_parameter(key) else set()
    return {shown for piece in pieces for shown in (piece, unquote(piece)) if len(shown) >= 4}


def printable(text: str) -> str:
    """The text in one line without control characters, by which text from elsewhere could change a terminal."""
    return "".join(each if each.isprintable() else " " for each in text)
