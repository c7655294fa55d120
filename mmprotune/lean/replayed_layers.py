"""Lean layers whose host's own operators, between frozen layers, the backward pass runs again."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .attention_layers import RotaryEmbedding
from .base import LeanLayer, is_hooked, stand_in
from .graph import builds_graph
from .int8 import scale_of
from .layers import LayerNorm, Sigmoid, Smooth


class Replayed(LeanLayer):
    """Base of these layers.

    Attributes:
        names (frozenset[str], optional): Every name that the stock ``forward`` may use, of a host
            whose versions differ: with others it does something that is not known here.
    """
    names: frozenset[str] | None = None

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        return cls.names is None or cls.names.issuperset(type(module).forward.__code__.co_names)

    def _replays(self, x: Tensor, *children: nn.Module) -> bool:
        """Whether there is a graph to build, and nothing in these children to run no second time
        for."""
        return builds_graph(x) and not self._trains() and all(map(_is_pure, children))

    def _fixed(self) -> Replayed:
        """This layer with the parameters that it has now, for the backward pass."""
        return stand_in(self, {})


def _is_pure(module: nn.Module) -> bool:
    """Whether a module does nothing but compute its output, by parameters that do not train."""
    known = type(module) is nn.Identity or isinstance(
        module, (LayerNorm, Smooth, Sigmoid, RotaryEmbedding)) or (
            isinstance(module, nn.Dropout) and not (module.training and module.p))
    changed = 'forward' in module.__dict__ or getattr(module, 'inplace', False)
    return known and not (
        changed or is_hooked(module) or any(p.requires_grad for p in module.parameters()))


def _weights_of(*modules: nn.Module) -> Iterator[Tensor]:
    """What these modules compute with."""
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


def _heads(qkv: Tensor, heads: int) -> Sequence[Tensor]:
    """Views of queries, keys and values, each of shape (B, heads, tokens, channels)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# --- attention --------------------------------------------------------------------------------


class FusedAttention(Replayed):
    """Attention by PyTorch's fused kernel, of mmpretrain's ViT."""

    def forward(self, x: Tensor) -> Tensor:
        fused = self.scaled_dot_product_attention is F.scaled_dot_product_attention
        drops = self.training and self.attn_drop
        if not fused or drops or self.v_shortcut or not self._replays(x):
            return super().forward(x)
        heads = self.num_heads
        y = functional.replayed(lambda qkv: _fused(*_heads(qkv, heads)), self.qkv(x))
        return self.out_drop(self.gamma1(self.proj_drop(self.proj(y))))


class TimmAttention(Replayed):
    """Attention by PyTorch's fused kernel, of timm's ViT, EVA-02 and DINOv3."""
    names = frozenset((
        'shape', 'qkv', 'reshape', 'num_heads', 'head_dim', 'permute', 'unbind', 'q_norm', 'k_norm',
        'fused_attn', 'F', 'scaled_dot_product_attention', 'attn_drop', 'p', 'training', 'scale',
        'transpose', 'softmax', 'norm', 'proj', 'proj_drop', 'gate', 'sigmoid', 'attn_dim',
        'maybe_add_mask', 'resolve_self_attn_mask', 'q_bias', 'k_bias', 'v_bias', 'torch', 'cat',
        'qkv_bias_separate', 'linear', 'weight', 'q_proj', 'k_proj', 'v_proj', 'num_prefix_tokens',
        'getattr', 'apply_rot_embed_cat', 'type_as', 'num_kv_heads', 'num_kv_groups',
        'repeat_interleave'))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        rope, own = kwargs.get('rope'), self._own_weight()
        known = not args and all(
            v is None or v is False for k, v in kwargs.items() if k != 'rope') and (
                getattr(self, 'gate', None) is None and getattr(self, 'num_kv_groups', 1) == 1)
        if not (known and self.fused_attn and not (rope is not None and rope.requires_grad)
                and not (own is not None and own.requires_grad)
                and self._replays(x, self.q_norm, self.k_norm, self.attn_drop)):
            if own is not None and own.dtype != x.dtype:  # stored in a lower precision
                return self._stock(x, *args, **kwargs)
            return super().forward(x, *args, **kwargs)
        y = functional.replayed(self._fixed()._mixed, *self._projected(x),
                                extras=() if rope is None else (rope, ),
                                weights=_weights_of(self.q_norm, self.k_norm))
        norm = getattr(self, 'norm', None)
        return self.proj_drop(self.proj(y if norm is None else norm(y)))

    def _own_weight(self) -> Tensor | None:
        own = getattr(self, 'q_bias', None) is not None and not self.qkv_bias_separate
        return self.qkv.weight if own else None

    def _projected(self, x: Tensor) -> Sequence[Tensor]:
        if self.qkv is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if getattr(self, 'q_bias', None) is None:
            return self.qkv(x),
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        weight = self._own_weight()
        if weight is None:
            qkv = self.qkv(x)
            qkv += bias
            return qkv,
        return functional.linear(
            x, weight, bias, self._owner(), self.lean.rounds, scale_of(self.qkv)),

    def _mixed(self, *tensors: Tensor) -> Tensor:
        if self.qkv is None:
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in tensors[:3])
            rope = tensors[3:]
        else:
            q, k, v = _heads(tensors[0], self.num_heads)
            rope = tensors[1:]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope:
            q, k = (self._rotated(t, *rope).type_as(v) for t in (q, k))
        return _fused(q, k, v)

    def _rotated(self, t: Tensor, rope: Tensor) -> Tensor:
        rotate = self.stock_class.forward.__globals__['apply_rot_embed_cat']
        first = self.num_prefix_tokens
        half = {'half': True} if getattr(self, 'rotate_half', False) else {}
        return torch.cat((t[:, :, :first], rotate(t[:, :, first:], rope, **half)), dim=2)


class RotaryAttention(Replayed):
    """Attention with rotary positions, of mmpretrain's EVA-02."""

    def forward(self, x: Tensor, patch_resolution: int | Sequence[int]) -> Tensor:
        rope = [] if self.rope is None else [self.rope]
        if not self._replays(x, self.attn_drop, *rope):
            return super().forward(x, patch_resolution)
        y = functional.replayed(partial(self._fixed()._prepared, patch_resolution), self.qkv(x),
                                weights=_weights_of(*rope), mix=partial(_mixed, x.dtype))
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _prepared(self, size: int | Sequence[int], qkv: Tensor) -> Sequence[Tensor]:
        q, k, v = _heads(qkv, self.num_heads)
        if self.rope is not None:
            first = int(self.with_cls_token)
            q, k = (torch.cat((t[:, :, :first], self.rope(t[:, :, first:], size)), -2).type_as(v)
                    for t in (q, k))
        return q * self.scale, k, v


def _mixed(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(dim=-1).to(dtype) @ v


class SAMAttention(Replayed):
    """Attention with decomposed relative positions, of mmpretrain's SAM."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._replays(x):
            return super().forward(x)
        size = x.shape[1:3]
        tables = (self.rel_pos_h, self.rel_pos_w) if self.use_rel_pos else ()
        y = functional.replayed(partial(self._fixed()._prepared, size), self.qkv(x),
                                weights=tables, mix=partial(_mixed_decomposed, size))
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, size))

    def _prepared(self, size: Sequence[int], qkv: Tensor) -> Sequence[Tensor]:
        q, k, v = (t.contiguous() for t in _heads(qkv.flatten(1, 2), self.num_heads))
        if not self.use_rel_pos:
            return q * self.scale, k, v
        table = self.stock_class.forward.__globals__['get_rel_pos']
        rows, columns = (table(n, n, p) for n, p in zip(size, (self.rel_pos_h, self.rel_pos_w)))
        maps = q.flatten(0, 1).unflatten(1, size)
        along = (torch.einsum('bhwc,hkc->bhwk', maps, rows),
                 torch.einsum('bhwc,wkc->bhwk', maps, columns))
        return q * self.scale, k, v, *(a.reshape(*q.shape[:3], -1) for a in along)


def _mixed_decomposed(size: Sequence[int], q: Tensor, k: Tensor, v: Tensor,
                      *along: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    if along:
        rows, columns = along
        scores = (scores.unflatten(-1, size) + rows.unsqueeze(-1)
                  + columns.unsqueeze(-2)).flatten(-2)
    return scores.softmax(dim=-1) @ v


# --- gated MLPs -------------------------------------------------------------------------------


class SwiGLU(Replayed):
    """The gated MLP of mmpretrain's EVA-02 and largest DINOv2."""

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        if not self._replays(x, self.norm):
            return super().forward(x, identity)
        y = functional.replayed(self._fixed()._gated, self.w12(x), weights=_weights_of(self.norm))
        y = self.dropout_layer(self.gamma2(self.w3(y)))
        if self.out_dims != self.embed_dims or not self.add_identity:
            return y
        return (x if identity is None else identity) + y

    def _gated(self, hidden: Tensor) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        return self.norm(F.silu(gate) * value)


class TimmSwiGLU(Replayed):
    """The gated MLP of timm that has two layers."""
    names = frozenset(('fc1_g', 'fc1_x', 'act', 'drop1', 'norm', 'fc2', 'drop2'))

    def forward(self, x: Tensor) -> Tensor:
        if not self._replays(x, self.act, self.drop1, self.norm):
            return super().forward(x)
        y = functional.replayed(self._fixed()._gated, self.fc1_g(x), self.fc1_x(x),
                                weights=_weights_of(self.norm))
        return self.drop2(self.fc2(y))

    def _gated(self, gate: Tensor, value: Tensor) -> Tensor:
        return self.norm(self.act(gate) * value)


class TimmGluMlp(Replayed):
    """The gated MLP of timm that has one layer."""
    names = frozenset(('fc1', 'chunk', 'chunk_dim', 'gate_last', 'act', 'drop1', 'norm', 'fc2',
                       'drop2'))

    def forward(self, x: Tensor) -> Tensor:
        if not self._replays(x, self.act, self.drop1, self.norm):
            return super().forward(x)
        y = functional.replayed(self._fixed()._gated, self.fc1(x), weights=_weights_of(self.norm))
        return self.drop2(self.fc2(y))

    def _gated(self, hidden: Tensor) -> Tensor:
        a, b = hidden.chunk(2, dim=self.chunk_dim)
        return self.norm(a * self.act(b) if self.gate_last else self.act(a) * b)
