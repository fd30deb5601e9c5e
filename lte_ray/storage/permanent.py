"""Which failures of storage can't be waited out: a wrong place stays wrong, a full disk or a cut network may not."""

from __future__ import annotations

import errno
import os

from lte_ray.errors import LTEError

PROGRAM = (LTEError, TypeError, AttributeError, NameError, AssertionError, ImportError)
"""Errors of programs, not of storage: they go through as they are."""

KINDS = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    FileExistsError,
    ValueError,
    NotImplementedError,
)
"""pyarrow's ArrowInvalid is a ValueError; its ArrowNotImplementedError is a NotImplementedError."""

NUMBERS = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG,
    errno.EINVAL, errno.ELOOP, errno.ENOTEMPTY, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS,
}  # fmt: skip

WORDS = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH",
    "PERMISSION_DENIED", "UNAUTHENTICATED",
)  # fmt: skip
"""What pyarrow's S3 and GCS say in place of a number: no permission, or not there."""


def is_permanent(error: Exception) -> bool:
    """Whether trying again is no use: not found, not permitted, a folder, a name that can't be; all else may pass."""
    number = getattr(error, "errno", None)
    if isinstance(number, int):
        return number in NUMBERS
    return isinstance(error, KINDS) or any(word in str(error) for word in WORDS)


def reason(error: Exception) -> str:
    """What went wrong, in a few words: the system's own where there are any."""
    number = getattr(error, "errno", None)
    text = os.strerror(number) if isinstance(number, int) and number > 0 else str(error).strip().partition("\n")[0][:200]
    return text.rstrip(".") or type(error).__name__
