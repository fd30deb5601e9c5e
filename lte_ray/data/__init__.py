"""Data for heads: deterministic shards, the partitions behind them and who owns these, loading, records,
token sets, and image sets."""

from lte_ray.data.augmentation import augment
from lte_ray.data.images import ImageSet, cached_images
from lte_ray.data.loader import loader
from lte_ray.data.node_cache import local_copy
from lte_ray.data.records import read_records
from lte_ray.data.shard import Shard
from lte_ray.data.tokens import TokenSet, cached_tokens, write_tokens

__all__ = [
    "ImageSet",
    "Shard",
    "TokenSet",
    "augment",
    "cached_images",
    "cached_tokens",
    "loader",
    "local_copy",
    "read_records",
    "write_tokens",
]
