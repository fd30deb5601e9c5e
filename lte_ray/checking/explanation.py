"""Exceptions in a sentence, and the lines of the user's code that they come from."""

from __future__ import annotations

import os
import sysconfig
import traceback

import lte_ray
from lte_ray.errors import LTEError

OURS = os.path.join(os.path.dirname(os.path.abspath(lte_ray.__file__)), "")
RECIPES = os.path.join(OURS, "recipes", "")
"""Folders of the library, and of the ready-made workers in it, which are user code here."""

STANDARD_LIBRARY = os.path.join(sysconfig.get_path("stdlib"), "")

MAX_TEXT = 400
"""Characters of an exception's own message that are shown, at most."""


def explain(error: Exception, where: str = "") -> tuple[str, str]:
    """Returns what an exception says, and where in the user's code it was raised, as lines of a traceback (empty if nowhere).

    Of a message that ends with a traceback, the last line of the traceback is kept.

    Args:
        where: what raised, such as ``evaluate()``, for an exception that isn't the library's.
    """
    origin = error
    while isinstance(origin.__cause__, Exception):
        origin = origin.__cause__
    frames = traceback.extract_tb(origin.__traceback__)
    ours = isinstance(origin, LTEError) or (bool(frames) and _is_ours(frames[-1].filename))
    what = str(origin).strip() if ours else brief(origin)
    theirs = [] if ours else [frame for frame in frames if _is_users(frame.filename)]
    details = "".join(traceback.format_list(theirs)).rstrip()
    if not isinstance(error, LTEError):
        return what if ours or not where else f"{where} raised {what}", details
    text = str(error).strip()
    head, mark, _ = text.partition(":\n\n")
    return f"{head}: {what}" if mark else text, details


def brief(error: Exception) -> str:
    """An exception's type and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "").strip()
    return f"{type(error).__name__}: {first[:MAX_TEXT]}" if first else type(error).__name__


def _is_ours(path: str) -> bool:
    path = os.path.abspath(path)
    return path.startswith(OURS) and not path.startswith(RECIPES)


def _is_users(path: str) -> bool:
    path = os.path.abspath(path)
    installed = {"site-packages", "dist-packages"} & set(path.split(os.sep)) or path.startswith(STANDARD_LIBRARY)
    return not _is_ours(path) and not installed
