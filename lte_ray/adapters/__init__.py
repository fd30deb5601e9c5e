"""The layers of one head, and the conversion of a user's model into them."""

from lte_ray.adapters.convert import convert
from lte_ray.adapters.linear import LTELinear

__all__ = ["LTELinear", "convert"]
