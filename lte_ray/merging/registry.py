"""The built-in merge policies by name, and how a user's own is found."""

from __future__ import annotations

from typing import Any

from lte_ray.config import near
from lte_ray.errors import ConfigError
from lte_ray.loading import load_object, looks_like_object
from lte_ray.merging.average import Average
from lte_ray.merging.policy import MergePolicy

POLICIES: dict[str, type[MergePolicy]] = {
    "average": Average,
}


def make_policy(policy: Any) -> MergePolicy:
    """The policy object that `MergeConfig.policy` means: a built-in name, ``module:Class``, ``file.py:Class``, or itself.

    Raises:
        ConfigError: the name is unknown, the class can't be found or made, or the object has no `decide` method.
    """
    found: Any = policy
    if isinstance(policy, str):
        if policy in POLICIES:
            found = POLICIES[policy]
        elif looks_like_object(policy):
            found = load_object(policy, what="--policy", error=ConfigError)
        else:
            raise ConfigError(
                f"--policy is {policy!r}, but the built-in policies are: {', '.join(sorted(POLICIES))}."
                f"{near(policy, POLICIES)} Give your own as module:Class or path/to/file.py:Class."
            )
    if isinstance(found, type):
        try:
            found = found()
        except Exception as error:
            raise ConfigError(f"--policy {policy}: {found.__name__}() raised {type(error).__name__}: {error}") from error
    if not callable(getattr(found, "decide", None)):
        raise ConfigError(
            f"--policy {policy!r} is a {type(found).__name__} without a decide(pending, roster) method; "
            "a merge policy needs one (lte_ray.MergePolicy)."
        )
    return found  # type: ignore[no-any-return]
