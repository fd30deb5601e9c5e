"""Multi-head attention that calls `nn.Linear` layers for its projections, so that LoRA can adapt them.

`nn.MultiheadAttention` multiplies with its weights itself and calls no layer, so what an adapted layer adds in its
forward would be lost. This module has the same interface and the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.errors import ConfigError
from lte_ray.misc.masks import merged


class MultiheadAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + mask) V for each head: `nn.MultiheadAttention` with linear layers that project Q, K, and V.

    Fused, one layer `in_proj` (embed_dim -> 3 embed_dim) computes Q, K, and V. It is called once for each distinct
    input, so with three different inputs two thirds of its work are wasted; split costs less then. Split, the layers
    are `q_proj`, `k_proj`, and `v_proj`. Both forms end in `out_proj`. Dropout acts in training only. The same seed gives
    the same initial weights as `nn.MultiheadAttention`, split or not.

    Args:
        embed_dim: width of queries and outputs; a multiple of num_heads.
        num_heads: number of heads, each embed_dim / num_heads wide.
        dropout: probability that an attention weight is dropped in training.
        bias: whether the projections have biases.
        split_qkv: use three projections instead of one. Always so if kdim or vdim differs from embed_dim.
        batch_first: inputs are (batch, sequence, width) instead of (sequence, batch, width).
        kdim, vdim: width of keys and of values; embed_dim by default.
        add_bias_kv: adds one learned key and value (`bias_k`, `bias_v`).
        add_zero_attn: adds one key and value of zeros.
        device, dtype: of the parameters.

    Raises:
        ConfigError: embed_dim isn't a multiple of num_heads, or dropout isn't in [0, 1].
    """

    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    _qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer off its fast path, which calls no layer

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 8,
        dropout: float = 0.0,
        bias: bool = True,
        split_qkv: bool = False,
        *,
        batch_first: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ConfigError(f"embed_dim = {embed_dim} isn't a multiple of num_heads = {num_heads}; change one of them.")
        if not 0 <= dropout <= 1:
            raise ConfigError(f"dropout = {dropout} isn't a probability; choose one from 0 to 1.")
        super().__init__()
        initialized = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._set_parts(initialized, split_qkv or not initialized._qkv_same_embed_dim)

    @classmethod
    def from_torch(cls, attention: nn.MultiheadAttention, split_qkv: bool = False) -> Self:
        """Converts torch's attention: outputs, training mode, types, devices, and which parameters train stay the same.

        Without `split_qkv`, the new module holds the same Parameter objects, so an optimizer that holds them keeps
        working. (If kdim or vdim differs from embed_dim, the three biases stay packed in `in_proj_bias`, which is added
        after the projections.) With `split_qkv`, packed parameters are copied into three. Hooks aren't transferred.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_parts(attention, split_qkv)
        return self

    def _set_parts(self, attention: nn.MultiheadAttention, split_qkv: bool) -> None:
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.kdim, self.vdim = attention.kdim, attention.vdim
        self.dropout, self.batch_first, self.add_zero_attn = attention.dropout, attention.batch_first, attention.add_zero_attn
        same = attention._qkv_same_embed_dim
        packed: nn.Parameter | None = attention.in_proj_bias
        self.in_proj: nn.Module | None = None
        self.q_proj: nn.Module | None = None
        self.k_proj: nn.Module | None = None
        self.v_proj: nn.Module | None = None
        if same and not split_qkv:
            self.in_proj = _linear(attention.in_proj_weight, packed)
            packed = None
        else:
            weights = _thirds(attention.in_proj_weight) if same else None
            q, k, v = weights or (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            q_bias, k_bias, v_bias = _thirds(packed) if split_qkv and packed is not None else (None, None, None)
            self.q_proj, self.k_proj, self.v_proj = _linear(q, q_bias), _linear(k, k_bias), _linear(v, v_bias)
            packed = None if split_qkv else packed
        self.register_parameter("in_proj_bias", packed)
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, getattr(attention, name))
        out = attention.out_proj._parameters
        assert out["weight"] is not None
        self.out_proj: nn.Module = _linear(out["weight"], out["bias"])
        self.train(attention.training)

    @property
    def heads(self) -> int:
        """`num_heads`, under the authors' name."""
        return int(self.num_heads)

    @property
    def split_qkv(self) -> bool:
        """Whether Q, K, and V have a projection each."""
        return self.in_proj is None

    @property
    def in_proj_weight(self) -> Tensor:
        """The weight of `in_proj` if fused, else an empty tensor.

        `nn.TransformerEncoder` checks it before it takes its fast path; the type of the tensor keeps it off that path.
        """
        weight = torch.empty(0) if self.in_proj is None else self.in_proj.weight
        assert isinstance(weight, Tensor)
        return weight.detach().as_subclass(_NoFastPathTensor)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends as `nn.MultiheadAttention` does: N samples, L queries, S keys; all three inputs with or without N.

        Args:
            query: (N, L, embed_dim); (L, N, embed_dim) unless batch_first; (L, embed_dim) unbatched.
            key, value: the same with S instead of L, and kdim and vdim instead of embed_dim.
            key_padding_mask: (N, S), or (S) unbatched; bool (True: not attended) or floating-point (added to scores).
            need_weights: also return the attention weights, which rules out the faster kernels.
            attn_mask: (L, S) or (N * num_heads, L, S); bool or floating-point as above.
            average_attn_weights: return the mean of the weights over heads.
            is_causal: a hint that attn_mask is the causal mask, which permits a faster kernel. Requires attn_mask.

        Returns:
            The output, shaped as the query, and the weights or None: (N, L, S), or (N, num_heads, L, S) if not averaged.

        Raises:
            ConfigError: shapes or types don't match, a tensor is nested, or is_causal is given without attn_mask.
        """
        if is_causal and attn_mask is None:
            raise ConfigError("is_causal=True is only a hint that attn_mask is causal; pass the causal mask as attn_mask too.")
        self._check(query, key, value)
        batched = query.dim() == 3
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        query, key, value = _map_distinct(self._to_batch_first, query, key, value)
        q, k, v = self._project(query, key, value)
        sizes = (q.shape[0], self.num_heads, q.shape[1], k.shape[1])
        k, v = self._append_extra(k, self.bias_k), self._append_extra(v, self.bias_v)
        extra = k.shape[1] - sizes[3]
        # The hint holds for square scores only: the causal kernel would also hide keys that are added.
        causal = is_causal and not need_weights and key_padding_mask is None and sizes[2] == k.shape[1]
        mask = merged(attn_mask, key_padding_mask, sizes=sizes, extra=extra, dtype=q.dtype)
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0

        weights: Tensor | None = None
        if need_weights:
            scores = q * math.sqrt(1 / self.head_dim) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, causal)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(-2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ConfigError("Nested tensors aren't supported; pass padded ones with key_padding_mask.")
        widths = (self.embed_dim, self.kdim, self.vdim)
        inputs = (query, key, value)
        samples = 0 if self.batch_first else 1
        if (
            any(x.dim() != query.dim() or x.shape[-1] != width for x, width in zip(inputs, widths, strict=True))
            or query.dim() not in (2, 3)
            or key.shape[:-1] != value.shape[:-1]
            or (query.dim() == 3 and query.shape[samples] != key.shape[samples])
        ):
            order = "(batch, sequence, width)" if self.batch_first else "(sequence, batch, width)"
            raise ConfigError(
                f"query, key and value have shapes {', '.join(str(tuple(x.shape)) for x in inputs)}; all should be {order} "
                f"or all (sequence, width), with widths {widths}, the same batch size, and as many values as keys."
            )

    def _to_batch_first(self, x: Tensor) -> Tensor:
        """(N, sequence, width), because adapted layers may split samples over LoRA heads along the first dimension."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.embed_dim
        if self.in_proj is not None:
            q, k, v = _map_distinct(self.in_proj, query, key, value)
            return q[..., :width], k[..., width : 2 * width], v[..., 2 * width :]
        assert self.q_proj is not None
        assert self.k_proj is not None
        assert self.v_proj is not None
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if self.in_proj_bias is not None:
            q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
            q, k, v = q + q_bias, k + k_bias, v + v_bias
        return q, k, v

    def _append_extra(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """x (N, S, width) followed by the learned row and the row of zeros, if the module has them."""
        rows = [x]
        if learned is not None:
            rows.append(learned.to(x.dtype).expand(x.shape[0], -1, -1))
        if self.add_zero_attn:
            rows.append(x.new_zeros(x.shape[0], 1, x.shape[2]))
        return torch.cat(rows, 1) if len(rows) > 1 else x

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout:g}, batch_first={self.batch_first}"
        )


class _NoFastPathTensor(Tensor):
    """A tensor subclass: PyTorch's fused inference kernels are not used with tensor subclasses."""


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A linear layer that holds these Parameter objects."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")  # draws no random numbers
    layer.register_parameter("weight", weight)
    layer.register_parameter("bias", bias)
    return layer


def _thirds(packed: nn.Parameter) -> tuple[nn.Parameter, ...]:
    """Copies of a packed parameter's parts for Q, K, and V; they train if it does."""
    return tuple(nn.Parameter(part.clone(), packed.requires_grad) for part in packed.detach().chunk(3))


def _map_distinct(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(a), f(b), f(c), where f is called once for each distinct object."""
    f_a = f(a)
    f_b = f_a if b is a else f(b)
    return f_a, f_b, f_a if c is a else f_b if c is b else f(c)
