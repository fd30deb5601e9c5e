"""Replaces parts of a model, in place, by parts that LoRA can adapt or that train better with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.misc.attention import MultiheadAttention

AFFINE_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
)
ELEMENTWISE_NORMS = (nn.LayerNorm, nn.RMSNorm)


class LinearProjection(nn.Module):
    """A convolution over patches that don't overlap, computed by one `nn.Linear` (`linear_proj`) on the flattened patches.

    y[n, :, i, j] = W vec(x[n, :, i p : (i + 1) p, j q : (j + 1) q]) + b for patches of p x q. Rows and columns that
    don't fill a patch are ignored, as by the convolution. x is (N, C, height, width) or (C, height, width); y is
    (N, out, height // p, width // q) or without N.

    Args:
        hidden_dim: out.
        patch_size: p = q, or (p, q).
        in_channels: C.
        bias: whether to add b.
        device: device of the parameters.
    """

    def __init__(
        self,
        hidden_dim: int,
        patch_size: int | tuple[int, int],
        in_channels: int = 3,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if min(hidden_dim, p, q, in_channels) < 1:
            raise ConfigError(
                f"hidden_dim = {hidden_dim}, patch_size = {patch_size}, in_channels = {in_channels}: all must be at least 1."
            )
        self.in_channels, self.out_channels, self.patch_size = in_channels, hidden_dim, patch_size
        self.kernel_size = self.stride = (p, q)
        self.linear_proj: nn.Module = nn.Linear(in_channels * p * q, hidden_dim, bias=bias, device=device)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """Converts a convolution that satisfies `is_projection`; the bias stays the same object, the weight becomes a view."""
        bias = conv._parameters["bias"]
        p, q = conv.kernel_size[0], conv.kernel_size[1]
        self = cls(conv.out_channels, p if p == q else (p, q), conv.in_channels, bias is not None, device="meta")
        weight = nn.Parameter(conv.weight.detach().flatten(1), conv.weight.requires_grad)
        self.linear_proj.register_parameter("weight", weight)
        self.linear_proj.register_parameter("bias", bias)
        return self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The weight in the convolution's shape (out, C, p, q), because models read its type and device."""
        weight = self.linear_proj.weight
        assert isinstance(weight, Tensor)
        return weight.view(-1, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the patches.

        Raises:
            ConfigError: x has the wrong channels or dimensions, or is smaller than one patch.
        """
        p, q = self.kernel_size
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels or x.shape[-2] < p or x.shape[-1] < q:
            raise ConfigError(
                f"The input has shape {tuple(x.shape)}; (batch, {self.in_channels}, height, width) is expected, with or "
                f"without batch, with height >= {p} and width >= {q}."
            )
        rows, columns = x.shape[-2] // p, x.shape[-1] // q
        full_patches = x[..., : rows * p, : columns * q]
        patches = full_patches.reshape(*x.shape[:-2], rows, p, columns, q)
        # (..., C, rows, p, columns, q) -> (..., rows, columns, C, p, q)
        y: Tensor = self.linear_proj(patches.movedim((-4, -2), (-5, -4)).flatten(-3))
        return y.movedim(-1, -3)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, patch={self.kernel_size}"


def is_projection(conv: nn.Module) -> bool:
    """Whether this is an `nn.Conv2d` (no subclass) over separate patches: stride == kernel, no padding.

    1 x 1 convolutions with stride 1 are included; dilated and grouped ones are not.
    """
    if type(conv) is not nn.Conv2d or conv.stride != conv.kernel_size or conv.dilation != (1, 1) or conv.groups != 1:
        return False
    return conv.padding in ("valid", (0, 0)) or (conv.padding == "same" and conv.kernel_size == (1, 1))


def use_custom_attention(model: nn.Module, split_qkv: bool = False) -> nn.Module:
    """Replaces every `nn.MultiheadAttention` by a `MultiheadAttention`, in place; outputs stay the same.

    Subclasses stay as they are, because what they compute isn't known. PyTorch's encoders are kept off their fast path,
    which would bypass the layers. Without `split_qkv` all Parameter objects stay, but their names change
    (`in_proj_weight` to `in_proj.weight`): load a checkpoint of the unconverted model before this call.

    Returns:
        The model, or its replacement if the model itself is an `nn.MultiheadAttention`.
    """

    def convert(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.MultiheadAttention:
            return MultiheadAttention.from_torch(module, split_qkv)
        return None

    model = _replace(model, convert)
    leave_fast_path(model, MultiheadAttention)
    return model


def replace_conv_proj_with_linear(model: nn.Module) -> nn.Module:
    """Replaces every convolution over separate patches (`is_projection`) by a `LinearProjection`, in place.

    Outputs stay the same. A convolution that shares its weight with another module stays, so that both remain tied.

    Returns:
        The model, or its replacement if the model itself is such a convolution.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def convert(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Conv2d) and is_projection(module) and holders[id(module.weight)] == 1:
            return LinearProjection.from_conv(module)
        return None

    return _replace(model, convert)


def disable_norm_affine_parameters(model: nn.Module) -> nn.Module:
    """Removes weight and bias of every layer, batch, instance, group, and RMS norm, in place; they then only normalize.

    The authors of LTE found that networks train better that way, with and without LoRA heads. Running statistics stay.

    Returns:
        The model.
    """
    for module in model.modules():
        if isinstance(module, AFFINE_NORMS):
            module.affine = False
        elif isinstance(module, ELEMENTWISE_NORMS):
            module.elementwise_affine = False
        else:
            continue
        for name in ("weight", "bias"):
            if name in module._parameters:
                module.register_parameter(name, None)
    leave_fast_path(model, nn.LayerNorm)
    return model


def _replace(model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Replaces every module for which `convert` returns one, a shared module once; returns the model or its replacement."""
    modules = list(model.modules())
    new = {id(module): replacement for module in modules if (replacement := convert(module)) is not None}
    for parent in modules:
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent.register_module(name, new[id(child)])
    return new.get(id(model), model)


def leave_fast_path(model: nn.Module, kind: type[nn.Module]) -> None:
    """Keeps torch's encoders that contain modules of class `kind` off the fused inference kernels, which call no layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(m, kind) for m in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # which the layer checks before it takes the fast path
