"""The main weights in a head's model: which version they hold, and the reference that is subtracted from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.adapters.convert import Converted
from lte_ray.merging.flat_buffer import factor_views, views


@dataclass
class _SharedBase:
    """What heads that share main weights have in common.

    Attributes:
        version: the newest base version that one of them adopted.
        base: that base; None once no head needs it.
        loaded: the version that was put in place last.
        error: its quantization error.
    """

    version: int = -1
    base: Tensor | None = None
    loaded: int = -1
    error: float = 0.0


class MainWeights:
    """Puts W~ = W_v - s B' A' in place; or W_v, with the reference kept apart (`MainWeight.separate_reference`).

    Args:
        converted: the head's model.
        share: those of another head that this one uses too. Unless the references are kept apart, the heads take turns: each
            folds its own reference into the weights before it trains.
        alone: whether no other head will share these.
        constant: whether the base never changes, and holds nothing of any head: then the weights are W_0, put in place once.

    Attributes:
        takes_turns: whether heads take turns on these weights.
    """

    def __init__(self, converted: Converted, share: MainWeights | None, alone: bool, constant: bool = False) -> None:
        self._converted, self._constant = converted, constant
        self._shared: _SharedBase = share._shared if share is not None else _SharedBase()
        self._unused: dict[str, Tensor] = {}  # weights that were replaced, whose memory the next ones take
        self.takes_turns = share is not None or not alone

    @property
    def quantization_error(self) -> float:
        """The relative error of quantizing the version that is in place: the largest of all layers."""
        return self._shared.error

    @property
    def newest_base(self) -> tuple[int, Tensor | None]:
        """The newest version that was set, and its base if a head still needs it."""
        return self._shared.version, self._shared.base

    def set_base(self, version: int, base: Tensor) -> None:
        """Sets the base to put in place, unless a head that shares these weights has set it or a newer one."""
        if version > self._shared.version:
            self._shared.version, self._shared.base = version, base

    def stage(self, base: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """Computes the weights that `load` will put in place; may run while the head trains, in another thread.

        Args:
            base: flat, in the base layout.
            reference: flat factors; None where B' = 0.

        Returns:
            Weights by name; none for those that are quantized, or shared with other heads.
        """
        if self.takes_turns or self._constant:
            return {}
        plan = self._converted.plan
        new, old = views(plan.base, base), None if reference is None else factor_views(plan, reference)
        staged = {}
        for name, main in self._converted.main_weights.items():
            pair = None if old is None else (old[main.spec.a_name], old[main.spec.b_name])
            weight = main.stage(new[name], pair, self._unused.pop(name, None))
            if weight is not None:
                staged[name] = weight
        return staged

    @torch.no_grad()
    def load(self, reference: Tensor | None, staged: Mapping[str, Tensor]) -> None:
        """Puts the newest version in place.

        Args:
            reference: this head's flat factors; None where B' = 0.
            staged: what `stage` returned for this version and reference.
        """
        shared, plan = self._shared, self._converted.plan
        if self._constant:
            reference = None
            if shared.loaded >= 0:
                shared.loaded = shared.version
                shared.base = shared.base if self.takes_turns else None
                return
        is_loaded = shared.loaded == shared.version
        new = None if shared.base is None else views(plan.base, shared.base)
        old = None if reference is None else factor_views(plan, reference)
        errors = [0.0]
        for name, main in self._converted.main_weights.items():
            pair = None if old is None else (old[main.spec.a_name], old[main.spec.b_name])
            if name in staged:
                self._unused[name] = main.swap(staged[name])
            elif is_loaded and main.separate_reference:
                main.load(None, pair)
            else:
                assert new is not None
                errors.append(main.load(new[name], pair))
        if not is_loaded:
            shared.loaded, shared.error = shared.version, max(errors)
        if not self.takes_turns or all(main.separate_reference for main in self._converted.main_weights.values()):
            shared.base = None  # no head needs it again
