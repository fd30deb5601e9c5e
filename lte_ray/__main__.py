"""``python -m lte_ray``: the command line without its program ``lte-ray``, for jobs that bring lte-ray's code along.

Such a job may run with a Python that lacks something. This module says so in one sentence, so it imports nothing at its top.
"""

from __future__ import annotations

import sys

NEEDED = (
    "torch", "ray", "numpy", "pyarrow", "safetensors", "platformdirs", "jinja2", "rich", "tomli_w", "shtab", "tyro", "pathspec",
)  # fmt: skip
"""The modules of the packages that lte-ray depends on."""


def what_is_missing() -> str:
    """One sentence if this Python can't run lte-ray, else an empty text."""
    from importlib.util import find_spec

    place = f"The Python that runs here, {sys.executable},"
    if sys.version_info < (3, 11):  # noqa: UP036  # a cluster may have an older one
        return f"{place} is version {sys.version.split()[0]}, but lte-ray needs 3.11 or newer. Use another image."
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return ""
    return (
        f"{place} has no {', '.join(missing)}, which lte-ray needs. Install lte-ray in the cluster's image, have Ray install "
        "it for the job (lte-ray submit --pip lte-ray), or, if another Python has it, put that one first: --env "
        "'PATH=/path/to/bin:${PATH}'."
    )


if __name__ == "__main__":
    if problem := what_is_missing():
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    from lte_ray.cli.main import entry

    entry()
