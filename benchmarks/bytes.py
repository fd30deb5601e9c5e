"""Bytes that merging sends, relative to the arithmetic minimum and to DDP; and the effect of the formats on the loss.

GPT-2-124M's shapes, 4 heads of r = 32, embeddings adapted too (they are tied: one weight), successive barrier merges.

Up: the buffers of a head's contribution (`Codec.encode`) and its pickled message. Minimum: `min_contribution_bytes`, each value
in its format, without int8's scales. Down: what a head's `BaseReplica` fetches to follow the coordinator's base bit for bit,
and the pickled reply. The head's own contribution doesn't cross the network and doesn't count. Its minimum is, for each weight,
the three others' factors in the format or the dense weight in fp32, and for each replica the others' changes or the dense
values, whichever is less.

DDP: a head sends 2 (N - 1) / N of all gradients in fp32 at every step, in a ring (it receives as much, which doesn't count).
Ours: up and down of a merge together, which covers 64 steps. Both train the same samples per step. Also the same with
embeddings as replicas, as in the default settings: then most of the bytes are replica changes, so `replica_topk` matters.

Loss: `benchmarks.formats`.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.formats import HEADS, MERGE_ITER, WIRES, WORKER, Wire, losses
from benchmarks.report import progress, report
from benchmarks.shapes import RANK, gpt2_plan
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.broadcast_log import BroadcastLog
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.base_replica import BaseReplica
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.merging.registry import make_policy
from lte_ray.messages import Contribution, CoordinatorReply, MergeDelta
from lte_ray.transfer.codec import Codec, min_contribution_bytes
from lte_ray.transfer.groups import make_groups

MERGES = 2
WIDTH = {"fp32": 4, "bf16": 2, "int8": 1}


def least_down(plan: Plan, merge: MergeConfig, heads: int) -> int:
    """The fewest bytes that update a head, which has its own contribution: for each entry others' changes or dense values."""
    width, others = WIDTH[merge.transfer], heads - 1
    weights = sum(min(others * a.rank * sum(a.matrix) * width, math.prod(a.shape) * 4) for a in plan.adapted)
    replicas = plan.contribution.size - plan.factors_size
    changes = min_contribution_bytes(plan, merge) - width * plan.factors_size
    return weights + min(others * changes, replicas * 4)


class Link:
    """Fetches for one head, and counts the bytes of other heads. A handle names the head that made the tensor."""

    def __init__(self, head: int) -> None:
        self.head, self.bytes = head, 0

    def __call__(self, handle: tuple[int | None, Tensor]) -> Tensor:
        source, tensor = handle
        self.bytes += tensor.nbytes if source != self.head else 0
        return tensor


def measure(plan: Plan, merge: MergeConfig, heads: int = HEADS, merges: int = MERGES) -> dict[str, int]:
    """Bytes up and down per head and merge, the mean over some merges that the head's replica of the base follows."""
    settings = Settings("bytes", LTEConfig(num_heads=heads, lora_r=RANK), merge, TrainConfig())
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(plan.base.size, generator=generator).mul_(0.02)
    parts = make_groups([plan] * heads, merge)
    codec = Codec(plan, parts, merge)
    coordinator = Coordinator(settings, plan, base, make_policy(merge))
    log = BroadcastLog(parts, [4 * part.base.size for part in codec.group_plans], [codec.buffer_sizes] * heads, 0)
    link = Link(0)
    replica = BaseReplica([codec] * heads, "none", link)

    def handle(index: int) -> tuple[None, Tensor]:
        return None, gather(codec.group_plans[index].base, views(plan.base, coordinator.base))

    replica.acquire(CoordinatorReply(None, 0, {index: handle(index) for index in range(len(parts))}))
    replica.release()
    up = down = 0
    for number in range(1, merges + 1):
        buffers = {}
        for head in range(heads):
            flat = torch.randn(plan.contribution.size, generator=generator).mul_(0.02)
            buffers[head], decoded = codec.encode(flat, coordinator.reference(head))
            message = Contribution("bytes", head, 0, number, number - 1, 64 * number, 64, 512, 3.0)
            event_result = coordinator.receive(message, decoded)
            up += sum(buffer.nbytes for buffer in buffers[head]) + len(pickle.dumps(message))
        (record,) = event_result.merges
        log.append(MergeDelta(number, record.weights, {h: tuple((h, b) for b in buffers[h]) for h in record.heads}))
        chain = log.deltas_since(replica.redo_from)
        assert chain is not None
        update = CoordinatorReply(None, number, {index: handle(index) for index in log.dense_groups}, chain)
        before = link.bytes
        followed = replica.acquire(update)
        assert followed is not None
        assert torch.equal(followed, coordinator.base), "a replica that doesn't follow needs no bytes"
        replica.release()
        bare = replace(update, base_parts={}, deltas=tuple(replace(merged, buffers={}) for merged in chain))
        down += link.bytes - before + len(pickle.dumps(bare))
    return {"up": round(up / (merges * heads)), "down": round(down / merges)}


def ddp_bytes(plan: Plan, heads: int, steps: int) -> float:
    """Bytes that a head sends in ring all-reduces of fp32 gradients at these steps. It receives as many."""
    return 2 * (heads - 1) / heads * plan.base.size * 4 * steps


def sizes(wire: Wire) -> dict[str, Any]:
    """A format's bytes and their ratios."""
    plan = gpt2_plan(wire.embeddings)
    counted = measure(plan, wire.merge)
    least = {"up": min_contribution_bytes(plan, wire.merge), "down": least_down(plan, wire.merge, HEADS)}
    ddp = ddp_bytes(plan, HEADS, MERGE_ITER)
    return {
        "bytes": counted,
        "least": least,
        "up_over_least": round(counted["up"] / least["up"], 5),
        "down_over_least": round(counted["down"] / least["down"], 5),
        "times_fewer_than_ddp": round(ddp / (counted["up"] + counted["down"]), 1),
    }


def main() -> None:
    tables = {}
    for number, (name, wire) in enumerate(WIRES.items(), 1):
        tables[name] = sizes(wire)
        progress(
            number, len(WIRES), f"{name}: {tables[name]['bytes']['up']:,} bytes up, {tables[name]['bytes']['down']:,} down"
        )
    for name, of_losses in losses(WORKER, WIRES).items():
        tables[name]["loss"] = of_losses
    merging = [tables[name] for name in ("fp32", "bf16", "int8")]
    report(
        "bytes",
        limits={
            "up": "bytes of a contribution, ratio to the minimum, in each format <= 1.02",
            "down": "bytes that update a head, ratio to the minimum, in each format <= 1.05",
            "ddp": "int8, merge_iter=64: bytes of DDP, ratio to those up and down together >= 400",
            "loss": "int8: validation loss, ratio to fp32 transfer, worst seed <= 1.01",
        },
        met={
            "up": all(table["up_over_least"] <= 1.02 for table in merging),
            "down": all(table["down_over_least"] <= 1.05 for table in merging),
            "ddp": tables["int8"]["times_fewer_than_ddp"] >= 400,
            "loss": tables["int8"]["loss"]["over_fp32"]["max"] <= 1.01,
        },
        figures={
            "parameters": gpt2_plan(True).base.size,
            "heads": HEADS,
            "rank": RANK,
            "merge_iter": MERGE_ITER,
            "formats": tables,
        },
    )


if __name__ == "__main__":
    main()
