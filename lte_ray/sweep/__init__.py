"""Tries configurations of a run next to each other on Ray, and compares them (`lte-ray sweep`).

`SweepEngine` runs trials, `Halving` ends the worse ones early, `RayTrials` starts them, and `rank` compares them.
"""

from lte_ray.sweep.engine import SweepEngine
from lte_ray.sweep.halving import Halving
from lte_ray.sweep.table import Configuration, rank
from lte_ray.sweep.trials import Trial, TrialResult, TrialSettings

__all__ = ["Configuration", "Halving", "SweepEngine", "Trial", "TrialResult", "TrialSettings", "rank"]
