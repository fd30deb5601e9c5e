"""From a checkpoint to where a run starts: with the same heads exactly where they were, or with more or fewer."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lte_ray import checkpoint
from lte_ray.config.fields import is_integer
from lte_ray.data.lanes import advance
from lte_ray.data.lanes import initial as first_lanes
from lte_ray.engine.initial import Initial
from lte_ray.engine.ledger import DataLedger, reshard
from lte_ray.errors import StorageError
from lte_ray.messages import Standing
from lte_ray.runtime.common import Common
from lte_ray.runtime.start import Start


def resumed(common: Common, initial: Initial, version: int, num_heads: int) -> Start:
    """The start from the checkpoint of that version.

    With another number of heads than it was written with, the data is dealt out anew, from what was merged on. Heads that are
    still there go on from their merged factors and their optimizers' states; those that are new start with B = 0; what those
    that are gone have contributed stays in the base. All count as having taken as many steps.

    Raises:
        StorageError: it is damaged.
    """
    directory = common.directory
    manifest = checkpoint.read_manifest(directory, version)
    states = {head: checkpoint.read_head(directory, manifest, head)[1] for head in manifest.heads}
    try:
        before = int(manifest.facts["lte"]["num_heads"])
        standings = _standings(manifest, states, before)
        stepped = {head: int(state["step"]) for head, state in states.items()}
        ledger = dict(manifest.facts.get("ledger") or DataLedger({h: s.lanes for h, s in standings.items()}).state())
        DataLedger.from_state(ledger)  # so that what is wrong with it is said here
        guard = dict(manifest.facts.get("guard") or {})
        same = set(standings) == set(range(num_heads))
        if not same:
            ledger = reshard(ledger, num_heads).state()
            mean = round(sum(held.step for held in standings.values()) / max(1, len(standings)))
            standings = {h: _at(standings.get(h), mean, version) for h in range(num_heads)}
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # whoever wrote it, it isn't what a run writes
        where = directory.at(checkpoint.folder(version))
        raise StorageError(f"{where} can't be continued: {type(error).__name__}: {error}.") from error
    base = checkpoint.read_base(directory, manifest, initial.plan)
    factors = checkpoint.read_references(directory, manifest, initial.plans)
    references = {h: f for h, f in factors.items() if h in standings and standings[h].sequence}  # not of one before a new head
    exact = frozenset(states) if same else frozenset()
    return Start(
        version=version,
        base=common.transport.publish(base),
        references={head: common.transport.publish(factors) for head, factors in references.items()},
        standings=standings,
        ledger=ledger,
        taken={head: stepped[head] if head in exact else held.step for head, held in standings.items()},
        saved=version,
        exact=exact,
        states=frozenset(head for head in states if head in standings),
        guard=guard,
    )


def _standings(manifest: checkpoint.Manifest, states: dict[int, dict[str, Any]], before: int) -> dict[int, Standing]:
    """What the base holds of each head. An older release noted it in the heads' states alone."""
    noted = manifest.facts.get("standings")
    if noted is not None:
        return {int(head): _standing(held) for head, held in noted.items()}
    found = {}
    for head, meta in states.items():
        batches = meta.get("batches", meta["step"])
        step, samples = meta["since"]
        lanes = advance(first_lanes(head, before), batches)
        found[head] = Standing(0, meta["sequence"], manifest.version, step, samples, batches, lanes)
    return found


def _standing(noted: dict[str, Any]) -> Standing:
    """As a manifest notes it. Raises KeyError, ValueError or TypeError if that isn't what a run writes."""
    held = Standing(**{**noted, "lanes": tuple((n, s) for n, s in noted["lanes"])})
    numbers = {f.name: getattr(held, f.name) for f in fields(held) if f.name != "lanes"}
    wrong = {name: number for name, number in numbers.items() if not is_integer(number) or number < 0}
    if wrong:
        raise ValueError(f"the standing of a head has {wrong!r:.80}")
    return held


def _at(held: Standing | None, step: int, version: int) -> Standing:
    return Standing(step=step, version=version) if held is None else replace(held, step=step)
