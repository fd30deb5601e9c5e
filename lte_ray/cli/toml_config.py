"""Settings from a TOML file (``--config``, or the ``run.toml`` of a resumed run), which become the defaults of the flags."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lte_ray.cli.policy_flags import TABLE, check_names, flag_type, policy_arguments
from lte_ray.config import SECTIONS, suggest, toml
from lte_ray.config.units import with_units
