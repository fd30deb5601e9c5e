"""The main weights in a head's model: which version they hold, and the reference that is taken out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lte_ray.adapters.convert import Converted
from lte_ray.merging.flat_buffer import factor_views, views


@dataclass
class _SharedBase:
    """What heads of one process have in common: the base version that they adopted last, and its quantisation error.

    `loaded` is the version that the main weights hold, where they hold W_v itself.
    """

    version: int = -1
    base: Tensor | None = None
    loaded: int = -1
    error: float = 0.0


class MainWeights:
    """Puts W~ = W_v - s B' A' in place, or W_v and the reference beside it where the main weights are held.

    Args:
        converted: the head's model.
        share: those of another head that this one uses, too. Unless they are held, the heads take turns: each folds its own
            reference in before it trains.
        alone: whether no other head will share these.
    """

    def __init__(self, converted: Converted, share: MainWeights | None, alone: bool) -> None:
        self._converted = converted
        self._shared: _SharedBase = share._shared if share is not None else _SharedBase()
        self._unused: dict[str, Tensor] = {}  # out of use
        self.takes_turns = share is not None or not alone

    @property
    def quantization_error(self) -> float:
        """The relative error of quantising the version that is in place, the largest over the layers."""
        return self._shared.error

    @property
    def newest_base(self) -> tuple[int, Tensor | None]:
        """The newest version that was brought here, and its base if somebody still needs it."""
        return self._shared.version, self._shared.base

    def set_base(self, version: int, base: Tensor) -> None:
        """A base to put in place, unless a head that shares these has brought it or a newer one."""
        if version > self._shared.version:
            self._shared.version, self._shared.base = version, base

    def stage(self, base: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
        """The weights that `load` will put in place, computed ahead; may run beside training, in another thread.

        Args:
            base: flat, in the base layout.
            reference: flat factors; None where B' = 0.

        Returns:
            Weights by name; none for those that are quantised, or shared with other heads.
        """
        if self.takes_turns:
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
        """Puts the newest version in place, with this head's reference (flat factors; None where B' = 0)."""
        shared, plan = self._shared, self._converted.plan
        there = shared.loaded == shared.version
        new = None if shared.base is None else views(plan.base, shared.base)
        old = None if reference is None else factor_views(plan, reference)
        errors = [0.0]
        for name, main in self._converted.main_weights.items():
            pair = None if old is None else (old[main.spec.a_name], old[main.spec.b_name])
            if name in staged:
                self._unused[name] = main.swap(staged[name])
            elif there and main.separate_reference:
                main.load(None, pair)
            else:
                assert new is not None
                errors.append(main.load(new[name], pair))
        if not there:
            shared.loaded, shared.error = shared.version, max(errors)
        if not self.takes_turns or all(main.separate_reference for main in self._converted.main_weights.values()):
            shared.base = None  # nobody needs it again
