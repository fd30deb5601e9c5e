"""One object of an object store that is written only if no other process has written it in the meantime.

pyarrow and fsspec can't do that. The package obstore can, on S3 (If-None-Match, If-Match), Google Cloud Storage (generations)
and Azure (ETags). It is given the address and the credentials that pyarrow's filesystem has.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
from typing import Any

from lte_ray.errors import LTEError
from lte_ray.storage.run_directory import RunDirectory

Tag = dict[str, str]
"""What a store says of one state of an object: its ETag or its generation."""

TIMEOUT, TRIES = 10.0, 2
"""Seconds that a request may take, and how often a failed one is repeated here. `retry` repeats further."""

NO_RIGHTS = ("PermissionDeniedError", "UnauthenticatedError")

NO_CREDENTIALS = ("performing token request", "//169.254.169.254", "//metadata.google.internal")
"""Words in obstore's errors if it has no credentials."""

NO_CONDITIONS = ("status code: 501", "<Code>NotImplemented</Code>")
"""Words in obstore's errors if the server can't do conditional writes."""


class Unsupported(LTEError):
    """Conditional writes aren't possible there. The text says why, without a dot."""


class ConditionalObject:
    """A small object.

    Its methods raise what obstore raises, or `Unsupported`.

    Args:
        directory: in which it is.
        name: its name there.
    """

    def __init__(self, directory: RunDirectory, name: str) -> None:
        try:
            self._obstore: Any = importlib.import_module("obstore")
            self._errors: Any = importlib.import_module("obstore.exceptions")
        except ImportError as error:
            raise Unsupported("the package obstore isn't installed: pip install 'lte-ray[cloud]'") from error
        filesystem, path = directory.filesystem, directory.path_to(name)
        while filesystem.type_name == "subtree":
            filesystem, path = filesystem.base_fs, f"{filesystem.base_path.rstrip('/')}/{path.lstrip('/')}"
        bucket, _, self._path = path.partition("/")
        self._store = _open_store(filesystem, bucket)
        self.kind = filesystem.type_name

    def read(self) -> tuple[bytes, Tag] | None:
        """Returns its content and tag, or None if there is no such object."""
        try:
            got = self._obstore.get(self._store, self._path)
            return bytes(got.bytes()), _tag(got.meta)
        except FileNotFoundError:
            return None
        except self._errors.BaseError as error:
            raise _translated(error) from error

    def create(self, data: bytes) -> Tag | None:
        """Writes it if there is no such object. Returns its tag, or None if there is one."""
        return self._put(data, "create")

    def replace(self, data: bytes, tag: Tag) -> Tag | None:
        """Writes it if its tag is still this one. Returns the new one, or None if it was written or removed since."""
        return self._put(data, tag)

    def _put(self, data: bytes, mode: Any) -> Tag | None:
        try:
            return _tag(self._obstore.put(self._store, self._path, data, mode=mode))
        except (self._errors.AlreadyExistsError, self._errors.PreconditionError):
            return None
        except FileNotFoundError as error:
            if mode == "create":
                raise Unsupported("there is no such bucket") from error
            return None
        except (self._errors.NotSupportedError, NotImplementedError) as error:
            raise Unsupported("the store has no conditional writes") from error
        except self._errors.BaseError as error:
            raise _translated(error) from error


def _tag(facts: Any) -> Tag:
    return {name: facts[name] for name in ("e_tag", "version") if facts[name]}


def _translated(error: Exception) -> Exception:
    """The error to raise: `Unsupported` if repeating can't help."""
    text = str(error)
    first = text.partition("\n")[0]
    if type(error).__name__ in NO_RIGHTS or any(word in text for word in NO_CREDENTIALS):
        return Unsupported(f"obstore has no access there with the credentials of this process ({first[:200].rstrip('.')})")
    if any(word in text for word in NO_CONDITIONS):
        return Unsupported("the store has no conditional writes")
    return OSError(first)


def _open_store(filesystem: Any, bucket: str) -> Any:
    """Opens the bucket of one of pyarrow's filesystems with obstore. Raises `Unsupported`."""
    makers = {"s3": _s3_settings, "gcs": _gcs_settings, "abfs": _azure_settings}
    classes = {"s3": "S3Store", "gcs": "GCSStore", "abfs": "AzureStore"}
    kind = filesystem.type_name
    if kind not in makers:
        raise Unsupported("lte-ray knows conditional writes only of S3, Google Cloud Storage and Azure")
    try:
        options = filesystem.__reduce__()[1][0]  # what pyarrow sends to other processes: all its settings
        settings = {name: value for name, value in makers[kind](filesystem, options).items() if value}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unsupported("this version of pyarrow doesn't tell the address of its filesystem") from error
    store = getattr(importlib.import_module("obstore.store"), classes[kind])
    try:
        return store(
            bucket,
            client_options={"timeout": f"{TIMEOUT:.0f}s", "allow_http": True},
            retry_config={"max_retries": TRIES, "retry_timeout": datetime.timedelta(seconds=2 * TIMEOUT)},
            **settings,
        )
    except Exception as error:  # of many kinds
        raise Unsupported(f"obstore can't open it ({str(error).partition(chr(10))[0][:200].rstrip('.')})") from error


def _s3_settings(filesystem: Any, options: dict[str, Any]) -> dict[str, Any]:
    if options["role_arn"]:
        raise Unsupported("obstore can't assume the role that pyarrow's filesystem was given")
    endpoint = options["endpoint_override"]
    if endpoint and "://" not in endpoint:
        endpoint = f"{options['scheme']}://{endpoint}"
    settings = {
        "endpoint": endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "region": filesystem.region,
        "access_key_id": options["access_key"],
        "secret_access_key": options["secret_key"],
        "session_token": options["session_token"],
        "skip_signature": options["anonymous"],
        "virtual_hosted_style_request": options["force_virtual_addressing"],
    }
    if not (options["access_key"] or options["anonymous"] or os.environ.get("AWS_ACCESS_KEY_ID")):
        # boto3 also reads the files of AWS's command line, with profiles. Without it obstore asks the machine for its role.
        with contextlib.suppress(Exception):
            settings["credential_provider"] = importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider()
    return settings


def _gcs_settings(filesystem: Any, options: dict[str, Any]) -> dict[str, Any]:
    token = "none" if options["anonymous"] else options["access_token"]
    endpoint = options["endpoint_override"]
    return {
        "base_url": f"{options['scheme']}://{endpoint}" if endpoint else "",
        "credential_provider": (lambda: {"token": token, "expires_at": None}) if token else None,
    }


def _azure_settings(filesystem: Any, options: dict[str, Any]) -> dict[str, Any]:
    account, place = options["account_name"], options["blob_storage_authority"]
    host = f"{account}{place}" if place.startswith(".") else f"{place}/{account}"
    return {
        "account_name": account,
        "account_key": options["account_key"],
        "sas_key": options["sas_token"],
        "client_id": options["client_id"],
        "client_secret": options["client_secret"],
        "tenant_id": options["tenant_id"],
        "endpoint": "" if place == ".blob.core.windows.net" else f"{options['blob_storage_scheme']}://{host}",
    }
