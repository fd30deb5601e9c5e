"""Data for heads: deterministic shards, the partitions behind them and who owns these, and token sets in Arrow files."""

from lte_ray.data.shard import Shard
from lte_ray.data.tokens import TokenSet, cached_tokens, write_tokens

__all__ = ["Shard", "TokenSet", "cached_tokens", "write_tokens"]
