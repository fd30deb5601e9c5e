"""Modules whose forward runs once for each head, because they hold parameters that train as replicas.

Class tokens, position embeddings, and layer scales belong to no layer that could split the batch for them, so the module that
holds them runs once for each head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import nn

from lte_ray.modes.arithmetic import set_to_mean
from lte_ray.modes.batch_split import ACTIVE_HEAD, in_backward, refuse_recomputation, run_each_head
from lte_ray.modes.effective_parameter import effective_parameter
from lte_ray.modes.parameter_guard import MODEL_RUNNING, TrackedModel, refuse_use, tracked_class
from lte_ray.modes.replica import ReplicaLayer, ReplicaParameters


class LoopedParameter(NamedTuple):
    """A parameter that trains as replicas.

    Attributes:
        path: the module that holds it, below the looping module ("" for the looping module itself).
        name: its name in that module.
        copies: names of its copies, in the looping module.
    """

    path: str
    name: str
    copies: list[str]


class HeadLoop(ReplicaLayer):
    """In training, `forward` runs once for each head, on that head's part of the batch and with its parameters.

    Layers below compute for that head alone. If a head is active already, `forward` runs for that one only. Evaluation uses
    the merged parameters. `convert_to_head_loop` turns a module into one by changing its class; the class keeps its name. It
    is a `ReplicaLayer`, so that scripts that merge every `ReplicaLayer` merge its parameters too.
    """

    plain: ClassVar[type[nn.Module]]
    lte_num_heads: int
    lte_looped_parameters: list[LoopedParameter]

    def merge_parameters(self) -> None:
        """Sets each parameter and its copies to the copies' mean."""
        for path, name, copy_names in self.lte_looped_parameters:
            main = self.get_submodule(path)._parameters[name]
            copies = [p for c in copy_names if (p := self._parameters[c]) is not None]
            assert main is not None
            set_to_mean([main, *copies], copies)

    @contextmanager
    def lte_head_parameters(self, head: int) -> Iterator[None]:
        """Within the block, the looped parameters are the head's copies."""
        before = []
        for path, name, copy_names in self.lte_looped_parameters:
            parameters = self.get_submodule(path)._parameters
            before.append((parameters, name, parameters[name]))
            parameters[name] = self._parameters[copy_names[head]]
        try:
            yield
        finally:
            for parameters, name, value in reversed(before):
                parameters[name] = value

    def _lte_forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self).plain.forward
        if not self.training:
            return forward(self, *args, **kwargs)

        active_head = ACTIVE_HEAD.get()
        # The forward may also use parameters of loops below without calling these.
        loops = [self] if active_head is not None else [m for m in self.modules() if isinstance(m, HeadLoop)]

        def run(head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with ExitStack() as stack:
                for loop in loops:
                    stack.enter_context(loop.lte_head_parameters(head))
                return forward(self, *args, **kwargs)

        if active_head is not None:
            return run(active_head, args, kwargs)
        return run_each_head(self, run, args, kwargs, self.lte_num_heads)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, nn.Parameter) and self.training and (MODEL_RUNNING.get() or in_backward()):
            for path, looped_name, _ in self.__dict__.get("lte_looped_parameters", ()):
                if not path and looped_name == name and not value.requires_grad:  # read from outside of any loop
                    what = f"{self.__dict__['lte_name']}.{name}".lstrip(".")
                    return effective_parameter(
                        value, partial(refuse_use, what) if MODEL_RUNNING.get() else refuse_recomputation
                    )
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        plain = type(self).plain
        arguments = (plain.lte_untracked_class, True) if issubclass(plain, TrackedModel) else (plain, False)
        return _make_blank, arguments, self.__getstate__()  # type: ignore[no-untyped-call]


def convert_to_head_loop(module: nn.Module, parameters: Sequence[tuple[str, str]], replicas: ReplicaParameters) -> None:
    """Turns `module`, in place, into a `HeadLoop` with copies of `parameters`: pairs (path below `module`, name)."""
    if not isinstance(module, HeadLoop):
        module.__class__ = _loop_class(type(module))
        assert isinstance(module, HeadLoop)
        module.lte_num_heads, module.lte_looped_parameters = replicas.num_heads, []
    for path, name in parameters:
        parameter = module.get_submodule(path)._parameters[name]
        assert parameter is not None
        stem = f"{path}.{name}".lstrip(".").replace(".", "_")
        while any(hasattr(module, f"{stem}_head{head}") for head in range(replicas.num_heads)):
            stem += "_"  # a.b and a_b have the same stem
        copy_names = [f"{stem}_head{head}" for head in range(replicas.num_heads)]
        for copy_name, copy in zip(copy_names, replicas.copies_of(parameter), strict=True):
            module.register_parameter(copy_name, copy)
        module.lte_looped_parameters.append(LoopedParameter(path, name, copy_names))
    for below in module.modules():
        if below is not module:
            below.lte_looped = True  # type: ignore[assignment]  # a plain attribute


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _loop_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The `HeadLoop` subclass of a class; it has the same name."""
    if plain in _CLASSES:
        return _CLASSES[plain]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._lte_forward(*args, **kwargs)

    names = {"plain": plain, "forward": forward, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    _CLASSES[plain] = type(plain.__name__, (HeadLoop, plain), names)
    return _CLASSES[plain]


def _make_blank(plain: type[nn.Module], tracked: bool) -> nn.Module:
    """A looping module without any state, for pickle: the classes can't be found by name."""
    new = _loop_class(tracked_class(plain) if tracked else plain)
    return new.__new__(new)
