"""What a run will train and need, from the model's shapes: `lte_ray.plan`, and ``lte-ray plan``."""

from lte_ray.planning.api import RunPlan, plan, plan_run
from lte_ray.planning.layers import Counts, LayerRow
from lte_ray.planning.memory import Parts, total
from lte_ray.planning.recommendation import Recommendation
from lte_ray.planning.traffic import Ring, Traffic

__all__ = ["Counts", "LayerRow", "Parts", "Recommendation", "Ring", "RunPlan", "Traffic", "plan", "plan_run", "total"]
