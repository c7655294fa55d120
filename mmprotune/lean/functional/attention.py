"""Softmax attention that keeps queries, keys and values, never the probabilities."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..graph import Kept, Producer, builds_graph, check_frozen, once_differentiable
from ..precision import Precision, without_autocast

aten = torch.ops.aten

# Most bytes of probabilities at a time: on a CPU what its cache holds (which makes it faster than
# all at once), elsewhere what fills the device.
CHUNK_BYTES = dict(cpu=4 << 20)
CHUNK_BYTES_ELSEWHERE = 256 << 20


Part = Any  # slices of the batch and of the heads; an ellipsis for all at once


def parts(q: Tensor, k: Tensor) -> Iterator[Part]:
    """Parts of the batch and of the heads whose probabilities are few enough.

    Args:
        q (Tensor): Queries of shape (B, heads, tokens, channels).
        k (Tensor): Keys, of the same shape but for the tokens.
    """
    limit = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES_ELSEWHERE)
    count = max(1, limit // max(1, q.size(2) * k.size(2) * q.element_size()))
    batch, heads = max(1, count // q.size(1)), min(count, q.size(1))
    if batch >= q.size(0) and heads == q.size(1):
        yield ...
        return
    for b in range(0, max(1, q.size(0)), batch):
        for h in range(0, q.size(1), heads):
            yield slice(b, min(b + batch, q.size(0))), slice(h, min(h + heads, q.size(1)))


class _Attention:
    """Computes attention, a part of the batch and of the heads at a time."""

    def __init__(self, heads: int, scale: float, divides: bool = False,
                 expand: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None) -> None:
        self.heads, self.scale, self.divides = heads, scale, divides
        self.expand = expand or (lambda biases: biases)

    def split(self, projected: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views of queries, keys and values, each of shape (B, heads, tokens, channels)."""
        if len(projected) == 1:
            return projected[0].unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return [self.of_heads(p) for p in projected]

    def of_heads(self, x: Tensor) -> Tensor:
        """A view of shape (B, heads, tokens, channels)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def probabilities(self, q: Tensor, k: Tensor, biases: Sequence[Tensor],
                      part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (matrices, tokens, tokens), scaled queries and keys (matrices, tokens,
        channels) of one part."""
        q, k = q[part], _matrices(k[part])
        shape = q.shape[:3]
        # Contiguous first: products of strided matrices would each copy them, and transposed.
        q = q.clone(memory_format=torch.contiguous_format).flatten(0, 1)
        q = q.div_(1 / self.scale) if self.divides else q.mul_(self.scale)
        scores = torch.bmm(q, k.transpose(1, 2))
        if biases:
            scores = scores.view(*shape, k.size(1))
            for bias in biases:
                bias = _rows(bias, part, shape[0])
                scores = scores.add_(bias) if scores.dtype == bias.dtype else scores + bias
            scores = scores.flatten(0, 1)
        return scores.softmax(dim=-1), q, k

    def forward(self, projected: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        q, k, v = self.split(projected)
        biases = self.expand(biases)
        out = None
        for part in parts(q, k):
            mixed = torch.bmm(self.probabilities(q, k, biases, part)[0], _matrices(v[part]))
            if out is None:  # in the layout of the queries
                like = projected[0] if len(projected) > 1 else projected[0].chunk(3, dim=-1)[0]
                out = torch.empty_like(like, dtype=mixed.dtype)
                heads = self.of_heads(out)
            _fill(heads[part], mixed)
        return out

    def backward(self, grad: Tensor, projected: Sequence[Tensor], biases: Sequence[Tensor],
                 precision: Precision) -> list[Tensor]:
        q, k, v = self.split(projected)
        biases = self.expand(biases)
        grad = self.of_heads(grad)
        gradients = [torch.empty_like(p) for p in projected]
        q_grad, k_grad, v_grad = self.split(gradients)
        for part in parts(q, k):
            with precision():
                mixing, queries, keys = self.probabilities(q, k, biases, part)
            g = _matrices(grad[part])
            scores = torch.bmm(g, _matrices(v[part]).to(g.dtype).transpose(1, 2))
            scores = aten._softmax_backward_data(
                scores.to(mixing.dtype), mixing, -1, mixing.dtype).to(g.dtype)
            of_q, of_k = self.gradients(scores, queries.to(g.dtype), keys.to(g.dtype), q, k, part)
            for target, value in (
                (v_grad, torch.bmm(mixing.to(g.dtype).transpose(1, 2), g)), (q_grad, of_q),
                    (k_grad, of_k)):
                _fill(target[part], value)
        return gradients

    def gradients(self, scores: Tensor, queries: Tensor, keys: Tensor, q: Tensor, k: Tensor,
                  part: Part) -> tuple[Tensor, Tensor]:
        """Of one part of the queries and the keys, from the gradient of the scores."""
        return (torch.bmm(scores, keys).mul_(self.scale),
                torch.bmm(scores.transpose(1, 2), queries))


class _CosineAttention(_Attention):
    """Attention by the cosines of queries and keys, times a factor for each head."""

    def __init__(self, heads: int, factors: Tensor) -> None:
        super().__init__(heads, 1.)
        self.factors = factors

    def _factors(self, part: Part) -> Tensor:
        return self.factors if part is ... else self.factors[part[1]]

    def probabilities(self, q: Tensor, k: Tensor, biases: Sequence[Tensor],
                      part: Part) -> tuple[Tensor, Tensor, Tensor]:
        shape = q[part].shape[:3]
        q, k = (F.normalize(_matrices(t[part]), dim=-1) for t in (q, k))
        scores = torch.bmm(q, k.transpose(1, 2)).view(*shape, k.size(1)).mul_(self._factors(part))
        for bias in biases:
            scores = scores.add_(_rows(bias, part, shape[0]))
        return scores.flatten(0, 1).softmax(dim=-1), q, k

    def gradients(self, scores: Tensor, queries: Tensor, keys: Tensor, q: Tensor, k: Tensor,
                  part: Part) -> tuple[Tensor, Tensor]:
        shape = *q[part].shape[:3], k.size(2)
        scores = scores.view(shape).mul(self._factors(part)).flatten(0, 1)
        return (_through_normalize(torch.bmm(scores, keys), queries, q[part]),
                _through_normalize(torch.bmm(scores.transpose(1, 2), queries), keys, k[part]))


def _through_normalize(grad: Tensor, unit: Tensor, vectors: Tensor) -> Tensor:
    """The gradient of vectors from that of ``F.normalize`` of them."""
    norm = _matrices(vectors).norm(dim=-1, keepdim=True)
    # Of shorter vectors than that, the divisor is a constant.
    along = (unit * grad).sum(-1, keepdim=True) * (norm > 1e-12)
    return (grad - unit * along) / norm.clamp_min(1e-12)


def _matrices(part: Tensor) -> Tensor:
    """(batch, heads, tokens, channels) as (matrices, tokens, channels), contiguous."""
    return part.contiguous().flatten(0, 1)


def _fill(part: Tensor, matrices: Tensor) -> None:
    """The inverse of :func:`_matrices`, into a tensor that is there."""
    part.copy_(matrices.view(part.shape))


def _rows(bias: Tensor, part: Part, size: int) -> Tensor:
    """The part of a bias of shape (1 or a divisor of B, 1 or heads, tokens, tokens)."""
    if part is ...:
        return bias if bias.size(0) == 1 else bias.repeat(size // bias.size(0), 1, 1, 1)
    batch, heads = part
    if bias.size(1) > 1:
        bias = bias[:, heads]
    if bias.size(0) == 1:
        return bias
    return bias[torch.arange(batch.start, batch.stop, device=bias.device) % bias.size(0)]


class _Attend(Function):

    @staticmethod
    def forward(ctx, method, kept, producer, biases, source, *projected):
        ctx.method, ctx.kept, ctx.precision = method, kept, Precision(projected[0].device)
        ctx.count = len(projected)
        if kept is None:
            ctx.save_for_backward(*biases, *projected)
        else:
            ctx.save_for_backward(*biases, kept.take())
            ctx.replay, ctx.input_gradient = producer.replay(), producer.input_gradient()
            ctx.dtype = source.dtype
        return method.forward(projected, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        if ctx.kept is None:
            biases, projected = saved[:-ctx.count], saved[-ctx.count:]
        else:
            biases, projected = saved[:-1], [ctx.replay(ctx.kept(saved[-1]))]
        with torch.no_grad(), without_autocast(grad):
            gradients = ctx.method.backward(grad, projected, biases, ctx.precision)
            if ctx.kept is not None:
                source = ctx.input_gradient(gradients[0]).to(ctx.dtype)
                return None, None, None, None, source, *[None] * ctx.count
        return None, None, None, None, None, *gradients


def packed_attention(qkv: Tensor, heads: int, scale: float,
                     biases: Sequence[Tensor] = (), divides: bool = False,
                     expand: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
                     ) -> Tensor:
    r"""Self-attention :math:`\mathrm{softmax}(s\,q k^T + \sum_i b_i)\,v`.

    Keeps ``qkv`` and the biases. Where the frozen layer that made ``qkv`` has an owner (see
    :func:`~mmprotune.lean.functional.convolution`): its input instead of ``qkv``; nothing where
    that is the output of a frozen LayerNorm.

    Args:
        qkv (Tensor): Queries, keys and values side by side, of shape (B, tokens, 3 C).
        heads (int): Heads.
        scale (float): Factor on the queries.
        biases (Sequence[Tensor]): Added to the scores one after the other, each of shape (1 or a
            divisor of B, 1 or heads, tokens, tokens); a divisor of B repeats. Defaults to ().
        divides (bool): Whether to divide by the inverse of ``scale``, which rounds differently.
            Defaults to False.
        expand (Callable, optional): Computes the biases, forward and backward, from smaller tensors
            that ``biases`` then holds and that are kept instead. Defaults to None.

    Returns:
        Tensor: Of shape (B, tokens, C).
    """
    check_frozen(*biases)
    return _packed(_Attention(heads, scale, divides, expand), qkv, biases)


def _packed(method: _Attention, qkv: Tensor, biases: Sequence[Tensor]) -> Tensor:
    if not builds_graph(qkv):
        return method.forward([qkv], biases)
    producer = Producer.of(qkv)
    if producer is None:
        return _Attend.apply(method, None, None, biases, None, qkv)
    kept = Kept(producer.x)
    producer.tell(kept, qkv)
    return _Attend.apply(method, kept, producer, biases, producer.x, qkv.detach())


def cosine_attention(qkv: Tensor, heads: int, factors: Tensor,
                     biases: Sequence[Tensor] = ()) -> Tensor:
    r"""Self-attention :math:`\mathrm{softmax}(f \cos(q, k) + \sum_i b_i)\,v`, as Swin V2 has it.

    Keeps what :func:`packed_attention` keeps.

    Args:
        qkv (Tensor): Queries, keys and values side by side, of shape (B, tokens, 3 C).
        heads (int): Heads.
        factors (Tensor): Of shape (heads, 1, 1).
        biases (Sequence[Tensor]): See :func:`packed_attention`. Defaults to ().

    Returns:
        Tensor: Of shape (B, tokens, C).
    """
    check_frozen(factors, *biases)
    return _packed(_CosineAttention(heads, factors), qkv, biases)


def attention(q: Tensor,
              k: Tensor,
              v: Tensor,
              heads: int,
              scale: float,
              biases: Sequence[Tensor] = (),
              divides: bool = False) -> Tensor:
    """Attention of queries to keys and values that differ from them. Keeps the three.

    Args:
        q (Tensor): Queries of shape (B, tokens, C).
        k, v (Tensor): Keys and values of shape (B, other tokens, C).
        heads, scale, biases, divides: See :func:`packed_attention`.

    Returns:
        Tensor: Of shape (B, tokens, C).
    """
    check_frozen(*biases)
    method = _Attention(heads, scale, divides)
    if not builds_graph(q, k, v):
        return method.forward([q, k, v], biases)
    return _Attend.apply(method, None, None, biases, None, q, k, v)
