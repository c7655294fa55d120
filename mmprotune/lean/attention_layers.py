"""Lean attention layers."""
from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import functional
from .base import LeanLayer, is_hooked, stand_in
from .graph import TORCH_BEFORE_2_3, builds_graph, check_frozen, is_recorded, wants_gradient
from .int8 import scale_of
from .precision import is_autocast


class MultiheadAttention(LeanLayer):
    """``nn.MultiheadAttention`` whose caller drops the probabilities that it returns."""

    def _own_weight(self) -> Tensor | None:
        return self.in_proj_weight

    def _trains(self) -> bool:  # it computes with its child's parameters
        return wants_gradient(self.parameters())

    def forward(self,
                query: Tensor,
                key: Tensor,
                value: Tensor,
                key_padding_mask: Tensor | None = None,
                need_weights: bool = True,
                attn_mask: Tensor | None = None,
                average_attn_weights: bool = True,
                is_causal: bool = False):
        # Where neither probabilities nor a graph are wanted, there is nothing to save.
        covered = (
            (self.lean.drops_weights if need_weights else builds_graph(query, key, value))
            and not is_recorded()
            and key_padding_mask is None and attn_mask is None and not is_causal
            and self._qkv_same_embed_dim and self.bias_k is None and not self.add_zero_attn
            and not (self.training and self.dropout) and query.dim() == 3
            and not self._trains())
        if not covered:
            return self._stock(query, key, value, key_padding_mask, need_weights, attn_mask,
                               average_attn_weights, is_causal)
        same = query is key and key is value
        if self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        scale = math.sqrt(1.0 / (self.embed_dim // self.num_heads))
        if same:
            qkv = functional.linear(query, self.in_proj_weight, self.in_proj_bias, self._owner(),
                                    self.lean.rounds, scale_of(self, 'in_proj_weight'))
            mixed = self._attend(
                need_weights, functional.packed_attention, qkv.transpose(0, 1), scale)
        else:
            # In parts, as the stock layer does it, so that every bit is the same.
            weights = self.in_proj_weight.chunk(3)
            biases, scales = ((None, ) * 3 if t is None else t.chunk(3) for t in (
                self.in_proj_bias, scale_of(self, 'in_proj_weight')))
            projected = [functional.linear(t, w, b, fast=self.lean.rounds, scale=s).transpose(0, 1)
                         for t, w, b, s in zip((query, key, value), weights, biases, scales)]
            mixed = self._attend(need_weights, functional.attention, *projected, scale)
        mixed = mixed.transpose(0, 1)
        out = functional.linear(mixed, self.out_proj.weight, self.out_proj.bias,
                                fast=self.lean.rounds, scale=scale_of(self.out_proj))
        return out.transpose(0, 1) if self.batch_first else out, None

    def _attend(self, need_weights: bool, function, *args) -> Tensor:
        *projected, scale = args
        if self.lean.sdpa:
            return self._fused(*projected)
        if not need_weights:  # the stock layer takes the kernel, too
            return functional.replayed(self._fused, *projected)
        # The older stock layer divides its queries instead of multiplying them.
        return function(*projected, self.num_heads, scale, divides=TORCH_BEFORE_2_3)

    def _fused(self, *projected: Tensor) -> Tensor:
        if len(projected) == 1:
            projected = projected[0].chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in projected)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Calls(threading.local):
    """Calls that this thread is in: the map that a window attention's windows are cut from, and
    how, from the call of the module around it until its own."""

    def __init__(self) -> None:
        self.rearrangements: dict[nn.Module, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}


_calls = _Calls()


class WindowMSA(LeanLayer):
    """Attention within windows with a relative position bias, of mmdet, mmseg and mmpretrain."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if is_recorded():
            return super().forward(x, mask)
        rearrangement = _calls.rearrangements.pop(self, None)
        if self._trains() or not _is_alone(self, self.softmax):
            return super().forward(x, mask)
        if rearrangement is not None:
            query, windows = rearrangement
            x = functional.rearranged(query, x, windows)
        table = self.relative_position_bias_table
        check_frozen(table)
        tokens = self.window_size[0] * self.window_size[1]
        bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
        biases = [bias.permute(2, 0, 1).contiguous().unsqueeze(0)]
        if mask is not None:
            biases.append(mask.unsqueeze(1))
        y = functional.packed_attention(self.qkv(x), self.num_heads, self.scale, biases)
        return self.proj_drop(self.proj(y))


class BEiTAttention(LeanLayer):
    """Attention of all tokens with a relative position bias, of mmseg's and mmpretrain's BEiT.

    The bias, a number for each pair of tokens and each head, is computed again from its table.
    """

    def _own_weight(self) -> Tensor | None:
        return self.qkv.weight if self.bias == 'qv_bias' else None

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        own = [p for p in (self.qkv.weight, getattr(self, 'q_bias', None),
                           getattr(self, 'v_bias', None)) if p is not None]
        if is_recorded() or self._trains() or not _is_alone(self) or any(
                p.requires_grad for p in own) or self.qkv._forward_hooks:
            return _stock(self, x, *(() if rel_pos_bias is None else (rel_pos_bias, )))
        if self.bias == 'qv_bias':
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
            qkv = functional.linear(
                x, self.qkv.weight, bias, self._owner(), self.lean.rounds, scale_of(self.qkv))
        else:
            qkv = self.qkv(x)
        table = self.relative_position_bias_table
        biases = [t for t in (table, rel_pos_bias) if t is not None]
        y = functional.packed_attention(
            qkv, self.num_heads, self.scale, biases,
            expand=partial(_relative_bias, table is not None, self.relative_position_index))
        return self.proj_drop(self.proj(y))


class WindowMSAV2(LeanLayer):
    """Cosine attention within windows, of mmpretrain's Swin V2."""

    def _own_weight(self) -> Tensor:
        return self.qkv.weight

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        position = [*self.cpb_mlp.parameters(), self.qkv.weight]
        if is_recorded() or is_autocast(x.device.type) or self._trains() or not _is_alone(
                self, self.softmax) or self.qkv._forward_hooks or any(
                    p.requires_grad for p in position):
            return _stock(self, x, mask)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = functional.linear(
            x, self.qkv.weight, bias, self._owner(), self.lean.rounds, scale_of(self.qkv))
        with torch.no_grad():
            factors = self.logit_scale.clamp(max=math.log(1. / 0.01)).exp()
            table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
            tokens = self.window_size[0] * self.window_size[1]
            near = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1)
            biases = [16 * near.permute(2, 0, 1).contiguous().sigmoid().unsqueeze(0)]
        if mask is not None:
            biases.append(mask.unsqueeze(1))
        y = functional.cosine_attention(qkv, self.num_heads, factors, biases)
        return self.proj_drop(self.proj(y))


def _is_alone(layer: LeanLayer, *inside: nn.Module) -> bool:
    """Whether nobody but the layer does anything to its probabilities: no dropout, no hooks."""
    return not (layer.training and layer.attn_drop.p) and not is_hooked(layer.attn_drop, *inside)


def _stock(layer: LeanLayer, x: Tensor, *args) -> Tensor:
    """What the stock attention computes, which reads the weight of its ``qkv`` itself: one in 8
    bits is to be converted first."""
    if layer.qkv.weight.dtype == torch.int8:
        return layer._stock(x, *args)
    return layer.stock_class.forward(layer, x, *args)


def _relative_bias(has_table: bool, index: Tensor | None, kept: Sequence[Tensor]) -> list[Tensor]:
    """Biases of shape (1, heads, tokens, tokens): of a table with a row for each distance, and one
    that the layers share."""
    kept = list(kept)
    if has_table:
        table = kept[0][index.view(-1)].view(*index.shape, -1)
        kept[0] = table.permute(2, 0, 1).contiguous().unsqueeze(0)
    return [bias if bias.dim() == 4 else bias.unsqueeze(0) for bias in kept]


class ShiftWindowMSA(LeanLayer):
    """The shifted windows of mmdet and mmseg: tells what the windows are a rearrangement of."""

    def forward(self, query: Tensor, hw_shape) -> Tensor:
        msa = self.w_msa
        # A hook may hand on other windows than it gets.
        if not (builds_graph(query) and isinstance(msa, WindowMSA)) or msa._forward_pre_hooks:
            return super().forward(query, hw_shape)
        _calls.rearrangements[msa] = query, lambda query: self._lean_windows(query, hw_shape)
        try:
            return super().forward(query, hw_shape)
        finally:
            _calls.rearrangements.pop(msa, None)

    def _lean_windows(self, query: Tensor, hw_shape) -> Tensor:
        size = self.window_size
        x = query.unflatten(1, tuple(hw_shape))
        x = F.pad(x, (0, 0, 0, -x.size(2) % size, 0, -x.size(1) % size))
        if self.shift_size > 0:
            x = x.roll((-self.shift_size, -self.shift_size), dims=(1, 2))
        return self.window_partition(x).view(-1, size * size, x.size(-1))


class RotaryEmbedding(LeanLayer):
    """The rotary position embedding of mmpretrain's EVA-02: for images of another size than its
    tables are for, the stock layer puts others in their place, which are saved with the frozen
    weights and shared with every other call."""

    def forward(self, x: Tensor, patch_resolution: int | Sequence[int]) -> Tensor:
        size = patch_resolution
        size = tuple(size) if isinstance(size, Sequence) else (size, size)
        if size == tuple(self.patch_resolution):
            return super().forward(x, size)
        return self.stock_class.forward(stand_in(self, {}), x, size)
