"""Compares trainings of one worker: ordinary training, mhlora, and LTE that merges more and less often (`lte-ray ladder`).

An `Arm` is the settings of one training, a runner trains it, `climb` sweeps its rate, and `summarize` compares rungs.
"""

from lte_ray.ladder.advice import Facts, advise
from lte_ray.ladder.arms import Arm, spacing
from lte_ray.ladder.checks import check_arms
from lte_ray.ladder.figures import Figure
from lte_ray.ladder.results import ArmResult, Point, ResultsFile
from lte_ray.ladder.runner import Listener, ProcessRunner
from lte_ray.ladder.summary import Summary, summarize
from lte_ray.ladder.sweep import RungResult, climb

__all__ = [
    "Arm",
    "ArmResult",
    "Facts",
    "Figure",
    "Listener",
    "Point",
    "ProcessRunner",
    "ResultsFile",
    "RungResult",
    "Summary",
    "advise",
    "check_arms",
    "climb",
    "spacing",
    "summarize",
]
