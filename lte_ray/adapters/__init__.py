"""The layers of one head, and the conversion of a user's model into them."""

from lte_ray.adapters.convert import Converted, convert
from lte_ray.adapters.layer import LTELayer, LTELinear

__all__ = ["Converted", "LTELayer", "LTELinear", "convert"]
