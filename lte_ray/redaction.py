"""Secrets: told by their names and by where they stand in a URI, so that no file, message or display of a run shows them."""

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
"""Key of ``run.toml``: which arguments it leaves out since they are secrets, as ``worker.NAME`` or ``policy.NAME``."""

WORDS = {
    "apikey", "accesskey", "secretkey", "privatekey", "apitoken", "accesstoken", "authtoken", "authorization", "bearer",
    "cookie", "cookies", "credential", "credentials", "jwt", "passcode", "passphrase", "passwd", "password", "passwords", "pwd",
    "secret", "secrets",
}  # fmt: skip
"""Words that make a name a secret's, wherever they stand in it."""

PAIRS = {
    ("api", "key"), ("api", "keys"), ("access", "key"), ("account", "key"), ("auth", "key"), ("encryption", "key"),
    ("private", "key"), ("secret", "key"), ("service", "key"), ("shared", "key"), ("signing", "key"), ("ssh", "key"),
    ("storage", "key"), ("connection", "string"), ("access", "tokens"), ("api", "tokens"), ("auth", "tokens"),
}  # fmt: skip
"""Words that do so together; `key` alone is a dictionary's or attention's, `tokens` are counted."""

OF_TEXT = {
    "begin", "beginning", "bos", "class", "cls", "dist", "distillation", "each", "empty", "end", "eos", "eot", "every",
    "first", "ignore", "image", "last", "mask", "max", "min", "newline", "next", "of", "pad", "padding", "per", "prompt",
    "register", "sep", "separator", "special", "start", "stop", "text", "unk", "unknown", "word",
}  # fmt: skip
"""What stands before `token` where it is a piece of text: `pad_token`, `loss_per_token`. Any other token is a secret."""

ABOUT = {
    "count", "dim", "dir", "directory", "env", "expiry", "file", "filename", "folder", "format", "length", "len", "lifetime",
    "name", "path", "size", "timeout", "ttl", "type", "url", "var", "variable",
}  # fmt: skip
"""Last words of names that tell about a secret without being it: `token_path`, `password_env`."""

SIGNS = {"sig", "signature", "key", "auth"}
"""Parameters of a URI that are secrets there, beside those whose name says so in any place."""

KEEP_USER = {"abfs", "abfss", "adl", "ftp", "gcs", "gs", "hdfs", "sftp", "smb", "ssh", "viewfs", "wasb", "wasbs", "webhdfs"}
"""Schemes of which the part before ``@`` is a container or a person's name; elsewhere it may be a key."""

NO_PORT = {"s3", "s3a", "s3n", "gs", "gcs"}

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def is_secret(name: str) -> bool:
    """Whether an argument of this name holds a secret: `api_token`, `password`, `awsSecretKey`; not `tokens` or `key`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or (words[-1] in ABOUT and len(words) > 1):
        return False
    if WORDS & set(words) or any(pair in PAIRS for pair in pairwise(words)):
        return True
    return words[-1] == "token" and not (len(words) > 1 and words[-2] in OF_TEXT)


def is_sensitive(name: str, value: Any, depth: int = 4) -> bool:
    """Whether an argument must not be shown: its name is a secret's, or its value has one inside (a URI, a table, an object).

    True, False, None and empty text are no secrets under any name. Looks `depth` levels into tables and objects.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, str) and not value):
        return False
    return is_secret(name) or (depth > 0 and any(is_sensitive(inner, each, depth - 1) for inner, each in _inside(value)))


def split_secrets(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The values that may be shown, and the names of those that were left out and differ from their defaults.

    A secret that has its default is left out, too, but need not be given again.
    """
    kept = {name: value for name, value in values.items() if not is_sensitive(name, value)}
    gone = [name for name in values if name not in kept]
    return kept, [name for name in gone if not same_plain_value(values[name], defaults.get(name, same_plain_value))]


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, for messages: ``***`` in the place of secrets."""
    return {name: MASK if is_sensitive(name, value) else value for name, value in values.items()}


def without_credentials(uri: str) -> str:
    """A URI (or chained ones: ``simplecache::s3://...``) without passwords, keys and signatures; other text as it is."""
    return "::".join(_one(part) for part in uri.split("::"))


def redact(text: str, *uris: str) -> str:
    """`text` with every URI in it without credentials, and those of `uris` masked however they stand in it."""
    for uri in uris:
        text = text.replace(uri, without_credentials(uri))
        for secret in sorted(_secrets(uri), key=len, reverse=True):
            text = text.replace(secret, MASK)
    return _URI.sub(lambda found: without_credentials(found[0]), text) if "://" in text else text


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, by name."""
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
    """Whether something in a list can be a name and its value."""
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object keeps in its ``__dict__`` and slots; nothing of the object's own is called to get it."""
    with contextlib.suppress(AttributeError):
        yield from object.__getattribute__(value, "__dict__").items()
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is types.MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # it is empty
                    yield name, slot.__get__(value)


def same_plain_value(value: Any, default: Any) -> bool:
    """Whether two plain values are equal and of one type; nothing of an object's own is called to compare it."""
    return type(value) is type(default) and isinstance(value, str | int | float) and value == default


def _one(uri: str) -> str:
    scheme, user, rest = _parts(uri)
    kept = f"{user.partition(':')[0]}@" if user and scheme in KEEP_USER and user.partition(":")[0] else ""
    place, mark, query = rest.partition("?")
    parameters = [p for p in re.split(r"[&;]", query) if not _signs(p.partition("=")[0])]
    if not user and len(parameters) == len(re.split(r"[&;]", query)):
        return uri
    return uri[: uri.index("://") + 3] + kept + place + (mark if parameters and query else "") + "&".join(parameters)


def _parts(uri: str) -> tuple[str, str, str]:
    """Scheme, user part and the rest; all in the rest if it is no URI.

    Keys may hold slashes: what follows a colon that begins no port belongs to the user part up to the next ``@``.
    """
    found = _SCHEME.match(uri)
    if found is None:
        return "", "", uri
    scheme, rest = found[0][:-3].lower(), uri[found.end() :]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in place:
        user, _, _ = place.rpartition("@")
    else:
        _, colon, port = place.partition(":")
        open_key = colon and "@" in rest and not place.startswith("[") and (scheme in NO_PORT or not port.isdigit())
        user = rest[: rest.index("@")] if open_key else ""
    return scheme, user, rest[len(user) + 1 :] if user else rest


def _signs(parameter: str) -> bool:
    name = unquote(parameter)
    return is_secret(name) or bool(SIGNS & {word.lower() for word in _WORD.findall(name)})


def _secrets(uri: str) -> set[str]:
    """The secret pieces of a URI, as written and decoded; too short ones would mask ordinary text."""
    pieces: set[str] = set()
    for part in uri.split("::"):
        scheme, user, rest = _parts(part)
        name, _, password = user.partition(":")
        pieces |= {password} if scheme in KEEP_USER else {name, password}
        for parameter in re.split(r"[&;]", rest.partition("?")[2]):
            key, _, value = parameter.partition("=")
            pieces |= {value} if _signs(key) else set()
    return {shown for piece in pieces for shown in (piece, unquote(piece)) if len(shown) >= 4}
