"""The conversion of a user's model into one head's model: what to adapt, layers with LoRA factors, quantized main weights."""

from lte_ray.adapters.convert import Converted, convert
from lte_ray.adapters.layer import LTELayer, LTELinear

__all__ = ["Converted", "LTELayer", "LTELinear", "convert"]
