"""The public names for type checkers; `tests/unit/test_public.py` compares them with ``__init__.py``."""

from lte_ray import base as base
from lte_ray import config as config
from lte_ray import export as export
from lte_ray import ladder as ladder
from lte_ray import misc as misc
from lte_ray import modes as modes
from lte_ray import optim as optim
from lte_ray import prepare as prepare
from lte_ray import replica as replica
from lte_ray import testing as testing
from lte_ray import worker as worker
from lte_ray.adapters.layer import LTELayer as LTELayer
from lte_ray.config import FailureConfig as FailureConfig
from lte_ray.config import LTEConfig as LTEConfig
from lte_ray.config import MergeConfig as MergeConfig
from lte_ray.config import TrainConfig as TrainConfig
from lte_ray.data.shard import Shard as Shard
from lte_ray.errors import LTEError as LTEError
from lte_ray.functions import FunctionWorker as FunctionWorker
from lte_ray.functions import fit as fit
from lte_ray.merging.policy import Discard as Discard
from lte_ray.merging.policy import Merge as Merge
from lte_ray.merging.policy import MergeChange as MergeChange
from lte_ray.merging.policy import MergePolicy as MergePolicy
from lte_ray.merging.policy import Pending as Pending
from lte_ray.merging.policy import Roster as Roster
from lte_ray.merging.policy import Try as Try
from lte_ray.merging.policy import Wait as Wait
from lte_ray.merging.policy import combine as combine
from lte_ray.messages import OuterStep as OuterStep
from lte_ray.messages import StepCoefficients as StepCoefficients
from lte_ray.modes.prepare import prepare_model_for_lte as prepare_model_for_lte
from lte_ray.modes.replica import MultiheadReplicaLayer as MultiheadReplicaLayer
from lte_ray.modes.replica import ReplicaLayer as ReplicaLayer
from lte_ray.planning import RunPlan as RunPlan
from lte_ray.planning import plan as plan
from lte_ray.run.callbacks import Callback as Callback
from lte_ray.run.history import read_metrics as read_metrics
from lte_ray.run.sinks.protocol import LogRow as LogRow
from lte_ray.run.sinks.protocol import RunInfo as RunInfo
from lte_ray.run.sinks.protocol import Sink as Sink
from lte_ray.trainer import LTETrainer as LTETrainer
from lte_ray.worker import Worker as Worker

__version__: str
