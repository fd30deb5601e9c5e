"""Replaces parts of a model, in place, by what LoRA can adapt or by what trains better with it."""

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
    """A convolution over patches that don't overlap, as one `nn.Linear` named `linear_proj` on the flattened patches.

    y[n, :, i, j] = W vec(x[n, :, i p : (i + 1) p, j q : (j + 1) q]) + b for patches of p x q; rows and columns that
    don't fill a patch are left out, as the convolution does. x is (N, C, height, width) or (C, height, width), y
    (N, out, height // p, width // q) or without N.

    Args:
        hidden_dim: out.
        patch_size: p = q, or (p, q).
        in_channels: C.
        bias: whether there is b.
        device: of the parameters.
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
                f"hidden_dim = {hidden_dim}, patch_size = {patch_size}, in_channels = {in_channels}: make all >= 1."
            )
        self.in_channels, self.out_channels, self.patch_size = in_channels, hidden_dim, patch_size
        self.kernel_size = self.stride = (p, q)
        self.linear_proj: nn.Module = nn.Linear(in_channels * p * q, hidden_dim, bias=bias, device=device)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """A convolution that satisfies `is_projection`; its bias is taken over, its weight as a view."""
        bias = conv._parameters["bias"]
        p, q = conv.kernel_size[0], conv.kernel_size[1]
        self = cls(conv.out_channels, p if p == q else (p, q), conv.in_channels, bias is not None, device="meta")
        weight = nn.Parameter(conv.weight.detach().flatten(1), conv.weight.requires_grad)
        self.linear_proj.register_parameter("weight", weight)
        self.linear_proj.register_parameter("bias", bias)
        return self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The weight in the convolution's shape (out, C, p, q): models look up its type and device."""
        weight = self.linear_proj.weight
        assert isinstance(weight, Tensor)
        return weight.view(-1, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """The patches' projections.

        Raises:
            ConfigError: x has other channels or dimensions, or is smaller than one patch.
        """
        p, q = self.kernel_size
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels or x.shape[-2] < p or x.shape[-1] < q:
            raise ConfigError(
                f"The input has shape {tuple(x.shape)}; (batch, {self.in_channels}, height, width) is expected, with or "
                f"without batch, of height >= {p} and width >= {q}."
            )
        rows, columns = x.shape[-2] // p, x.shape[-1] // q
        whole = x[..., : rows * p, : columns * q]
        patches = whole.reshape(*x.shape[:-2], rows, p, columns, q)
        # (..., C, rows, p, columns, q) -> (..., rows, columns, C, p, q)
        y: Tensor = self.linear_proj(patches.movedim((-4, -2), (-5, -4)).flatten(-3))
        return y.movedim(-1, -3)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, patch={self.kernel_size}"


def is_projection(conv: nn.Module) -> bool:
    """Whether this is an `nn.Conv2d` (that very class) that multiplies separate patches: stride == kernel, no padding.

    1 x 1 convolutions of stride 1 are such. Dilated or grouped ones aren't.
    """
    if type(conv) is not nn.Conv2d or conv.stride != conv.kernel_size or conv.dilation != (1, 1) or conv.groups != 1:
        return False
    return conv.padding in ("valid", (0, 0)) or (conv.padding == "same" and conv.kernel_size == (1, 1))


def use_custom_attention(model: nn.Module, split_qkv: bool = False) -> nn.Module:
    """Makes every `nn.MultiheadAttention` a `MultiheadAttention` with linear layers, in place; outputs stay the same.

    Subclasses of it are left alone, for what they compute isn't known. PyTorch's encoders are kept off their fast
    path, which would go past the layers. Without `split_qkv` all Parameter objects stay; their names change
    (`in_proj_weight` to `in_proj.weight`), so load a checkpoint of the unconverted model before.

    Returns:
        The model, or its replacement if it is an `nn.MultiheadAttention` itself.
    """

    def made(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.MultiheadAttention:
            return MultiheadAttention.from_torch(module, split_qkv)
        return None

    model = _replace(model, made)
    leave_fast_path(model, MultiheadAttention)
    return model


def replace_conv_proj_with_linear(model: nn.Module) -> nn.Module:
    """Makes every convolution over separate patches (`is_projection`) a `LinearProjection`, in place; outputs stay.

    A convolution whose weight some other module holds too is left alone, so that the tie lasts.

    Returns:
        The model, or its replacement if it is such a convolution itself.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def made(module: nn.Module) -> nn.Module | None:
        if isinstance(module, nn.Conv2d) and is_projection(module) and holders[id(module.weight)] == 1:
            return LinearProjection.from_conv(module)
        return None

    return _replace(model, made)


def disable_norm_affine_parameters(model: nn.Module) -> nn.Module:
    """Takes weight and bias from every layer, batch, instance, group and RMS norm, in place; they only normalise then.

    The authors of LTE found that networks train better so, with LoRA heads and without. Running statistics stay.

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


def _replace(model: nn.Module, made: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Puts made(module), where there is one, in the place of every module, once for a shared one."""
    modules = list(model.modules())
    new = {id(module): replacement for module in modules if (replacement := made(module)) is not None}
    for parent in modules:
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent.register_module(name, new[id(child)])
    return new.get(id(model), model)


def leave_fast_path(model: nn.Module, kind: type[nn.Module]) -> None:
    """Keeps torch's encoders that hold such modules off the fused inference kernels, which call no layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and any(
            isinstance(m, kind) for m in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # what the layer asks before it takes that path
