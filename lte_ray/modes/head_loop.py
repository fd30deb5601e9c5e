"""Parameters that a module owns itself and that train as copies: its forward runs once for each head.

Class tokens, position embeddings, layer scales: what uses them isn't a layer that could share the batch out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

from torch import nn

from lte_ray.adapters.effective_parameter import stand_in
from lte_ray.modes.base import average
from lte_ray.modes.batch_split import HEAD, each_head, recomputing, refuse_recomputed
from lte_ray.modes.parameter_guard import CALLED, Called, called, refuse
from lte_ray.modes.replica import HeadParameters, ReplicaLayer


class HeadLoop(ReplicaLayer):
    """In training, `forward` runs once for each head, on the head's part of the batch and with the head's own parameters.

    Layers below compute for that head alone. Where a head is active already, it runs for that one. Evaluation uses the merged
    parameters. A module becomes one by `adopt_loop`, which changes its class and keeps its name. It is a `ReplicaLayer`, so
    that a loop over these merges its parameters too.
    """

    plain: ClassVar[type[nn.Module]]
    _lte_heads: int
    _lte_slots: list[tuple[str, str, list[str]]]
    """(path of the module that holds it, "" for this one; the parameter's name there; the copies' names here)."""

    def merge_parameters(self) -> None:
        """All copies of each parameter, and the merged one, become their mean."""
        for path, name, copies in self._lte_slots:
            main = self.get_submodule(path)._parameters[name]
            own = [p for c in copies if (p := self._parameters[c]) is not None]
            assert main is not None
            average([main, *own], of=own)

    def _lte_run(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self).plain.forward
        if not self.training:
            return forward(self, *args, **kwargs)

        head = HEAD.get()
        # What loops below own may be used from here too, without a call of theirs.
        loops = [self] if head is not None else [m for m in self.modules() if isinstance(m, HeadLoop)]

        def run(head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with ExitStack() as stack:
                for loop in loops:
                    stack.enter_context(loop._lte_parameters_of(head))
                return forward(self, *args, **kwargs)

        if head is not None:
            return run(head, args, kwargs)
        return each_head(self, run, args, kwargs, self._lte_heads)

    @contextmanager
    def _lte_parameters_of(self, head: int) -> Iterator[None]:
        """Parameters within are the head's."""
        before = []
        for path, name, copies in self._lte_slots:
            held = self.get_submodule(path)._parameters
            before.append((held, name, held[name]))
            held[name] = self._parameters[copies[head]]
        try:
            yield
        finally:
            for held, name, value in reversed(before):
                held[name] = value

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, nn.Parameter) and self.training and (CALLED.get() or recomputing()):
            for path, own, _ in self.__dict__.get("_lte_slots", ()):
                if not path and own == name and not value.requires_grad:  # asked from outside of any loop
                    what = f"{self.__dict__['lte_name']}.{name}".lstrip(".")
                    return stand_in(value, partial(refuse, what) if CALLED.get() else refuse_recomputed)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        plain = type(self).plain
        return _blank, ((plain._lte_uncalled, True) if issubclass(plain, Called) else (plain, False)), self.__getstate__()  # type: ignore[no-untyped-call]


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _class_of(plain: type[nn.Module]) -> type[nn.Module]:
    """The looping subclass of a class; it goes by the same name."""
    if plain in _CLASSES:
        return _CLASSES[plain]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._lte_run(*args, **kwargs)

    names = {"plain": plain, "forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    _CLASSES[plain] = type(plain.__name__, (HeadLoop, plain), names)
    return _CLASSES[plain]


def _blank(plain: type[nn.Module], notes_calls: bool) -> nn.Module:
    made = _class_of(called(plain) if notes_calls else plain)
    return made.__new__(made)


def adopt_loop(module: nn.Module, slots: list[tuple[str, str]], parameters: HeadParameters) -> None:
    """Makes `module` loop over heads, with copies of the parameters (path below it, name) that it holds."""
    if not isinstance(module, HeadLoop):
        module.__class__ = _class_of(type(module))
        assert isinstance(module, HeadLoop)
        module._lte_heads, module._lte_slots = parameters.num_heads, []
    for path, name in slots:
        parameter = module.get_submodule(path)._parameters[name]
        assert parameter is not None
        stem = f"{path}.{name}".lstrip(".").replace(".", "_")
        while any(hasattr(module, f"{stem}_head{head}") for head in range(parameters.num_heads)):
            stem += "_"  # a.b beside a_b
        copies = [f"{stem}_head{head}" for head in range(parameters.num_heads)]
        for own, made in zip(copies, parameters.of(parameter), strict=True):
            module.register_parameter(own, made)
        module._lte_slots.append((path, name, copies))
    for below in module.modules():
        if below is not module:
            below.lte_looped = True  # type: ignore[assignment]  # a plain attribute
