from lte_ray.simulation.api import SimulatedTraining as SimulatedTraining
from lte_ray.simulation.api import simulate_time as simulate_time
from lte_ray.simulation.api import simulate_training as simulate_training
from lte_ray.simulation.cost_model import CostModel as CostModel
from lte_ray.simulation.cost_model import named_plan as named_plan
from lte_ray.simulation.record import KINDS as KINDS
from lte_ray.simulation.record import SimulationRecord as SimulationRecord
