"""Adapted weights as the user's code sees them: the model's own parameters, with the effective value.

A layer with factors computes f(x; W~) + s (B A)(x), and forms W~ + s B A for itself alone, if at all. But models also use
weights without calling their layer, as in ``F.linear(x, self.tokens.weight)``, in a penalty over ``model.parameters()``, or in
a kernel of their own. While a head computes a loss and its gradients, such code finds the effective weight in the parameter
that it knows, P:

- When P is read from a module (by attribute, `named_parameters`, `state_dict`, ...), its value is computed first. It stays
  until the gradients are computed, so that threads and recomputed activations see it too.
- P gets its gradient G as any parameter does. Afterwards G goes to the factors by the chain rule: dA += s B^T G,
  dB += s G A^T.
- Until P is read it has the value W~, so models that only call their layers pay nothing.

What reads P without asking a module, such as a list that the model made of its weights, is found in the first loss of a head
(`_WatchOperations`). A parameter that is found so has its effective value before every later loss, and its layers compute with
it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lte_ray.adapters.factors import Factors, trained_dtype
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.errors import WorkerError
from lte_ray.layout import Adapted
from lte_ray.merging.flat_buffer import as_matrix, as_stored


class GradientOfWeight(BaseException):
    """The loss differentiates with respect to a parameter with which its layer hasn't computed; see `UserParameters.track`.

    No `Exception`, so that the loss doesn't catch it.
    """


class UserParameter:
    """The parameter P of one main weight, or of one bias with factors.

    Args:
        spec: of the weight.
        parameter: P; it is shared by layers with tied weights, but not by heads.
        factors: of the weight.

    Attributes:
        dtype: of P.
        stored: the main weight W~, or W if the reference is kept apart. Until P is read, P has the same memory. A quantized
            weight takes no memory in P.
        tracked: whether P has the effective value in every loss, because code that asks no module uses it.
        shown: whether it has it now.
    """

    def __init__(self, spec: Adapted, parameter: nn.Parameter, factors: Factors) -> None:
        self.spec, self.parameter, self.factors = spec, parameter, factors
        self.stored: Tensor | QuantizedWeight = parameter.detach()
        self.dtype = parameter.dtype
        self.tracked = self.shown = False
        self._expected: Tensor | None = None  # two numbers that a write would change
        self._version = self._pointer = 0
        built = parameter.detach()
        self._built: tuple[Any, int, int] | None = _weak_reference(built), built.data_ptr(), built.data_ptr() + built.nbytes

    def memory(self) -> Iterator[tuple[int, int, int]]:
        """The memory of views of the weight: storage, first byte, end. Empty once that memory is freed."""
        if isinstance(self.stored, Tensor):
            begin = self.stored.data_ptr()
            yield self.stored.untyped_storage()._cdata, begin, begin + self.stored.nbytes
        elif self._built is not None:
            storage, begin, end = self._built
            if not storage.expired():
                yield storage.cdata, begin, end

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_built": None}  # a reference to memory is neither copied nor sent

    def set_stored(self, stored: Tensor | QuantizedWeight) -> None:
        """Replaces the main weight."""
        self.stored = stored
        self.hide()

    def moved(self) -> None:
        """Follows P to the device and type that the model was moved to."""
        if isinstance(self.stored, Tensor):
            self.stored.data = self.parameter.data
        self.hide()

    def effective(self) -> Tensor:
        """W~ + s B A (- s B' A') in the stored shape; differentiable by A and B."""
        a, b = self.factors.effective_pair()
        return torch.add(self.main_weight(), as_stored(self.spec, b @ a), alpha=self.factors.scaling).to(self.dtype)

    def main_weight(self) -> Tensor:
        """W~ in the stored shape; rounded, if it is quantized."""
        if isinstance(self.stored, Tensor):
            return self.stored
        weight = self.stored.dequantize(self.dtype)
        return as_stored(self.spec, weight) if len(self.spec.shape) == 2 else weight

    def show(self) -> None:
        """Gives P the effective value."""
        if not self.shown:
            with torch.inference_mode(False), torch.no_grad():
                value = self.effective()
                self.parameter.data, self.shown, self._expected = value, True, _fingerprint(value)
                self._pointer = value.data_ptr()

    def begin(self) -> None:
        """Records what `written` compares with."""
        self._version, self._pointer = self.parameter._version, self.parameter.data_ptr()

    @torch.no_grad()
    def hide(self) -> None:
        """Gives P the value W~ again."""
        if isinstance(self.stored, Tensor):
            self.parameter.data = self.stored
        else:
            self.parameter.data = self.factors.A.new_zeros((), dtype=self.dtype).expand(self.spec.shape)
        self.shown, self._expected = False, None

    def written(self) -> Tensor | bool:
        """Whether the loss wrote to P; as a tensor on P's device if that isn't known yet."""
        if self.parameter._version != self._version or self.parameter.data_ptr() != self._pointer:
            return True
        return False if self._expected is None else _fingerprint(self.parameter).ne(self._expected).any()

    @torch.no_grad()
    def move_gradient(self) -> None:
        """Adds s B^T G to the gradient of A and s G A^T to that of B, G being the gradient of P, which is cleared.

        Raises:
            WorkerError: P was used with the value W~ while B A wasn't zero.
        """
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is None:
            return
        if not self.shown and self._changed():
            raise WorkerError(
                f"{self.spec.name} was used through a reference that the model keeps, and not in the head's first step, so its "
                "value wasn't up to date. Read it from its layer or by named_parameters() instead, use it in the first step "
                f"too, or let it train without factors: --exclude {self.spec.name}."
            )
        self.tracked = True
        factors = self.factors
        g = as_matrix(self.spec, gradient.contiguous()).to(factors.A.dtype)
        for factor, part in ((factors.A, factors.B.t() @ g), (factors.B, g @ factors.A.t())):
            part.mul_(factors.scaling)
            factor.grad = part if factor.grad is None else factor.grad.add_(part)

    def _changed(self) -> bool:
        reference = self.factors.reference_B
        return bool(self.factors.B.any()) or (reference is not None and bool(reference.any()))


def _weak_reference(tensor: Tensor) -> Any:
    """The tensor's storage, as long as somebody else holds it."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class Master:
    """The float32 values of a 16-bit parameter that trains without factors: small steps would vanish in its own type.

    Args:
        parameter: the model's, P. Before each loss it has the rounded values.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.values = nn.Parameter(parameter.detach().to(trained_dtype(parameter)))

    @torch.no_grad()
    def round(self) -> None:
        """Gives P the rounded values."""
        self.parameter.copy_(self.values)

    @torch.no_grad()
    def take_back(self) -> None:
        """Adds P's gradient to that of the values, and clears it; takes over the elements of P that the loss has written."""
        written = self.parameter != self.values.to(self.parameter.dtype)
        self.values.copy_(torch.where(written, self.parameter.to(self.values.dtype), self.values))
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is not None:
            exact = gradient.to(self.values.dtype)
            self.values.grad = exact if self.values.grad is None else self.values.grad.add_(exact)


def _fingerprint(tensor: Tensor) -> Tensor:
    """Two numbers that almost any change of a tensor changes, without a copy of it."""
    tensor = tensor.detach()
    norm = torch.linalg.vector_norm(tensor, dtype=trained_dtype(tensor))
    return torch.stack([tensor.sum(dtype=torch.float64), norm.double()])


class UserParameters:
    """The parameters of one head's model that have factors.

    Attributes:
        all: these.
        masters: of other parameters, by name.
        active: whether the head is computing a loss or its gradients.
        functional: the effective weights, as functions of the factors, of heads that are computed as one batch
            (`torch.func.vmap`); None otherwise. Such heads can't each give P a value.
        embeds: whether such heads look up embeddings.
        watched: whether the first loss has been computed, under observation.
        watching_views: whether the first loss is being computed, and its operations are watched for views of weights.
        inside_layers: how many layers are computing just now, which use W~ itself.
    """

    def __init__(self) -> None:
        self.all: list[UserParameter] = []
        self.masters: dict[str, Master] = {}
        self.active = False
        self.functional: dict[int, Tensor] | None = None
        self.stacked: Collection[int] = ()
        self.embeds = self.watching_views = False
        self.inside_layers = 0
        self.watched = False
        self._written: dict[str, Tensor] = {}

    def read(self, parameter: UserParameter) -> Tensor:
        """P with its effective value, for code that reads it from a module."""
        if self.active:
            if self.functional is not None:
                return self.functional.setdefault(id(parameter), parameter.effective())
            if not parameter.shown and not torch.compiler.is_compiling():
                parameter.show()
        elif isinstance(parameter.stored, QuantizedWeight):
            return parameter.main_weight()
        return parameter.parameter

    def read_by_name(self, parameter: UserParameter) -> None:
        """Gives P its effective value, for code that reads a module's dictionary of parameters.

        Raises:
            NotImplementedError: heads are computed as one batch.
        """
        if self.active and self.functional is not None:
            raise NotImplementedError("the model reads its parameters by name")
        self.read(parameter)

    @contextmanager
    def track(self) -> Iterator[None]:
        """Within the block, a loss and its gradients are computed; afterwards the gradients are those of the factors.

        Raises:
            GradientOfWeight: at the first loss; the block must be repeated.
            WorkerError: the loss wrote to a parameter that has factors, or used it with an old value.
        """
        watch = not self.watched
        self.active, self.watching_views = True, watch
        for each in self.all:
            each.begin()
            if each.tracked and self.functional is None:
                each.show()
        for master in self.masters.values():
            master.round()
        try:
            with ExitStack() as stack:
                if watch:
                    if "torch._dynamo" in sys.modules:  # without it, nothing is compiled, and its import takes long
                        stack.enter_context(_EAGER)
                    for mode in (_WatchFunctions(self), _WatchOperations(self)):
                        stack.enter_context(mode)
                elif self.functional is not None and self.embeds:
                    stack.enter_context(_Embeddings())
                yield
            self.watched = True
            self.active = False
            self._collect()
        finally:
            self.active = self.watching_views = False
            for each in self.all:
                if each.shown:
                    each.hide()
                each.parameter.grad = None

    def end_forward(self) -> None:
        """Within `track`, says that the loss is computed: what follows are gradients."""
        self.watching_views = False

    @contextmanager
    def inside_layer(self) -> Iterator[None]:
        """Within the block, operations are those of layers, which use W~ itself."""
        self.inside_layers += 1
        try:
            yield
        finally:
            self.inside_layers -= 1

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block, readers find the effective values, as in `track`; no loss is computed."""
        self.active = True
        try:
            yield
        finally:
            self.active = False
            for each in self.all:
                if each.shown:
                    each.hide()

    @contextmanager
    def track_functional(self, stacked: Collection[int]) -> Iterator[None]:
        """As `track`, for a loss of several heads at once. Gradients go to the factors by themselves.

        Args:
            stacked: ids of the first head's tensors that stacked ones replace: the loss must not use them.

        Raises:
            NotImplementedError: the loss uses a parameter without asking its layer for it.
        """
        self.functional, self.stacked = {}, stacked
        try:
            with self.track():
                yield
        finally:
            self.functional, self.stacked = None, ()

    def _collect(self) -> None:
        for master in self.masters.values():
            master.take_back()
        for each in self.all:
            check_hooks(each.spec.name, each.parameter)
            written = each.written()
            if written is True:
                raise WorkerError(_written_message([each.spec.name]))
            if isinstance(written, Tensor):
                before = self._written.get(each.spec.name)
                self._written[each.spec.name] = written if before is None else before | written
            if self.functional is not None and each.parameter.grad is not None:
                raise NotImplementedError(_NOT_FUNCTIONAL)
            each.move_gradient()

    def found(self, parameter: UserParameter) -> None:
        """Gives P its effective value now and in every later loss, for code that asks no module.

        Raises:
            NotImplementedError: heads are computed as one batch.
        """
        if self.functional is not None:
            raise NotImplementedError(_NOT_FUNCTIONAL)
        parameter.show()
        parameter.tracked = True

    def check_unwritten(self) -> None:
        """Raises WorkerError if a loss wrote to a parameter with factors; waits for the device."""
        names = [name for name, written in self._written.items() if bool(written)]
        self._written.clear()
        if names:
            raise WorkerError(_written_message(names))


class _Eager:
    """Within the block, in any thread, compiled code runs as it is written: a mode would keep it from ever being compiled."""

    def __init__(self) -> None:
        self._lock, self._entered, self._stance = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                self._stance.close()


_EAGER = _Eager()

_NOT_FUNCTIONAL = "the model uses a weight through a reference that it keeps"


def check_hooks(name: str, parameter: nn.Parameter) -> None:
    """Raises WorkerError if a parameter that gets factors has hooks on its gradient: A and B can't obey what they do."""
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise WorkerError(
            f"{name} has a gradient hook (register_hook), which has no effect on factors. Let it train without them: "
            f"--exclude {name}. Or remove the hook."
        )


def _written_message(names: Sequence[str]) -> str:
    return (
        f"The model writes to {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}, which has factors, so it can't be set "
        f"to a value. Let it train without them: --exclude {' '.join(names[:8])}."
    )


class _WatchOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds operations on a user's parameters other than those of their layers, which compute with `UserParameter.stored`."""

    def __init__(self, group: UserParameters) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group, self._parameters = group, {id(p.parameter): p for p in group.all}
        self._memory: dict[int, list[tuple[int, int, UserParameter]]] = {}  # by storage: first byte, end, whose
        for each in group.all:
            for storage, begin, end in each.memory():
                self._memory.setdefault(storage, []).append((begin, end, each))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        group = self._group
        for leaf in tree_leaves((args, kwargs)):
            if not isinstance(leaf, Tensor):
                continue
            if id(leaf) in self._parameters:
                group.found(self._parameters[id(leaf)])
            elif id(leaf) in group.stacked:
                raise NotImplementedError(_NOT_FUNCTIONAL)
            elif group.watching_views and not group.inside_layers and leaf.layout is torch.strided:
                for begin, end, each in self._memory.get(leaf.untyped_storage()._cdata, ()):
                    if begin <= leaf.data_ptr() < end and leaf is not each.stored:
                        raise WorkerError(
                            f"The model keeps a view of {each.spec.name} (its data, a transposed or detached one, a slice), "
                            "which isn't up to date: the weight has factors. Make the view in the forward pass, or let the "
                            f"weight train without factors: --exclude {each.spec.name}."
                        )
        return func(*args, **(kwargs or {}))


class _WatchFunctions(TorchFunctionMode):
    """Finds `torch.autograd.grad` with respect to a user's parameter, and its `data`, which isn't an operation."""

    def __init__(self, group: UserParameters) -> None:
        super().__init__()
        self._group, self._parameters = group, {id(p.parameter): p for p in group.all}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _GET_DATA:
            if args[0] is not None and id(args[0]) in self._parameters:
                self._group.found(self._parameters[id(args[0])])
            elif any(args[0] is each for each in (self._group.functional or {}).values()):
                raise NotImplementedError("the model reads the data of a weight")  # of all heads at once
        elif func is _SET_DATA and id(args[0]) in self._parameters:
            raise WorkerError(_written_message([self._parameters[id(args[0])].spec.name]))
        elif func is F.embedding and self._group.functional is not None:
            self._group.embeds = True
            return _embedding(*args, **kwargs)
        elif func is torch.autograd.grad or func is Tensor.backward:
            if func is Tensor.backward:  # the loss may look at the gradient of any parameter
                found = list(self._parameters.values())
            else:
                leaves = tree_leaves(args[1] if len(args) > 1 else kwargs["inputs"])
                found = [self._parameters[id(p)] for p in leaves if id(p) in self._parameters]
            again = any(not parameter.tracked for parameter in found)
            for parameter in found:
                self._group.found(parameter)
            if again:
                raise GradientOfWeight
            with self._group.inside_layer():  # what computes gradients of layers uses what the layers have used
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Embeddings(TorchFunctionMode):
    """Replaces `F.embedding` where heads are computed as one batch."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _embedding(*args, **(kwargs or {})) if func is F.embedding else func(*args, **(kwargs or {}))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding`; under `torch.vmap` that gives the padding row a gradient (seen in torch 2.13)."""
    rows = F.embedding(input, weight, None, *args, **kwargs)
    if padding_idx is None:
        return rows
    padding = weight[padding_idx].detach()
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), padding, rows)


_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
