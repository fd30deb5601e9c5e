"""What several test modules share: one subject per file."""

from __future__ import annotations

import os

LONG_RUN = os.environ.get("LTE_RAY_LONG") == "1"
"""Whether there is time for more examples and longer runs, as in `make test-all`."""
