"""Sinks: where a run's figures go in addition to ``metrics.jsonl``, such as TensorBoard, Weights & Biases and MLflow.

``--log`` and ``LTETrainer(log=...)`` choose them. Each is a `Sink`, which works in a thread of its own.
"""

from lte_ray.run.sinks.follow import SinkThreads
from lte_ray.run.sinks.protocol import LogRow, RunInfo, Sink
from lte_ray.run.sinks.registry import make_sinks, recordable_names

__all__ = ["LogRow", "RunInfo", "Sink", "SinkThreads", "make_sinks", "recordable_names"]
