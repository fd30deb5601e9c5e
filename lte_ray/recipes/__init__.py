"""The ready-made workers: `gpt`, `vit` and others, each a module of this package.

In a wheel their files lie in this folder. In a checkout they are in the folder `workers/` next to this library, and this
package finds them there. So both have the same names, in every process.
"""

from __future__ import annotations

from pathlib import Path

RECIPES = {
    "causal-lm": "lte_ray.recipes.causal_lm:CausalLM",
    "classify": "lte_ray.recipes.classify:Classify",
    "image": "lte_ray.recipes.image:Image",
    "gpt": "lte_ray.recipes.gpt:GPT",
    "vit": "lte_ray.recipes.vit:ViT",
    "mixer": "lte_ray.recipes.mixer:Mixer",
    "resnet": "lte_ray.recipes.resnet:ResNet",
    "minilm": "lte_ray.recipes.minilm:MiniLM",
    "regression": "lte_ray.recipes.regression:Regression",
}
"""Short names of the ready-made workers. Other packages add theirs as entry points (`lte_ray.import_object.worker_names`)."""

_CHECKOUT = Path(__file__).parents[2] / "workers"

if not Path(__file__).with_name("gpt.py").is_file() and (_CHECKOUT / "gpt.py").is_file():
    __path__.append(str(_CHECKOUT))
