"""Attention in blocks: stretches of queries attend to stretches of keys, and what a query finds in several is merged.

    one block      P_b = softmax(s_b),  o_b = P_b v_b,  l_b = log sum exp s_b          s_b = q k_b^T / sqrt d
    merged         l = log sum_b exp l_b,  o = sum_b w_b o_b,  w_b = exp(l_b - l)
    gradient       dv_b = P_b^T (w_b do),  ds_b = P_b ((w_b do) v_b^T - w_b c),  c = o . do;  dq, dk from ds_b

This is how FlashAttention splits a softmax (Dao et al. 2022, arXiv 2205.14135), done between its calls: given the
merged o and l, the gradient of a block needs no other block. So nothing is padded, no key is copied next to another,
and there is no mask: a query sees all keys of its stretch, or those up to its own place (causal).

On CUDA in half precision, one call of flash attention does all stretches of a kind. Elsewhere each pair of stretches
is a call, of torch's kernel for the CPU where that is fast. Its gradient in bf16 is not (up to four times slower, torch
2.14); there, and for grouped queries, the products are written out, ROWS query rows at a time.

Shapes: n queries, m keys, H heads, K key-value heads, d head width.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # query rows of a head whose attention weights are alive at a time in the backward
Rows = slice | Tensor


class Block(NamedTuple):
    """Queries and the keys they see. Of several pairs of stretches, one after another, each sees only its own."""

    queries: Rows
    keys: Rows
    causal: bool  # both sides are the same tokens; each sees itself and what came before
    ends: tuple[Tensor, ...] = ()  # of several: where stretches of queries, of keys end, from 0; int32
    longest: tuple[int, ...] = ()  # of several: the longest stretch of queries, of keys

    def map(self, move: Callable) -> "Block":
        """With `move` applied to its tensors."""
        return self._replace(ends=tuple(map(move, self.ends)), **{
            side: move(rows) for side, rows in (("queries", self.queries), ("keys", self.keys))
            if isinstance(rows, Tensor)})


class Blocks:
    """Who sees whom, of kinds of pairs (queries, keys) of stretches. A query may be in one pair of each kind.

    Args:
        kinds: [(pairs, causal)]; together they hold every query.
    """

    def __init__(self, kinds: list[tuple[list[tuple[Rows, Rows]], bool]]):
        self.single = [Block(*pair, causal) for pairs, causal in kinds for pair in pairs]
        self.joined = [_join(pairs, causal) for pairs, causal in kinds if pairs]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, H, d), k and v (m, K, d), K divides H (grouped queries) -> (n, H, d)."""
        return BlockAttention.apply(q, k, v, self.joined if _flash(q) else self.single)

    def map(self, move: Callable) -> "Blocks":
        """With `move` applied to all tensors."""
        moved = Blocks([])
        moved.single, moved.joined = ([b.map(move) for b in blocks] for blocks in (self.single, self.joined))
        return moved


def _join(pairs: list[tuple[Rows, Rows]], causal: bool) -> Block:
    """All pairs as one block."""
    sides = [[torch.arange(x.start, x.stop) if isinstance(x, slice) else x for x in side] for side in zip(*pairs)]
    lengths = [[len(x) for x in side] for side in sides]
    ends = tuple(torch.tensor([0, *accumulate(side)], dtype=torch.int32) for side in lengths)
    return Block(*(_slice(torch.cat(side)) for side in sides), causal, ends, tuple(map(max, lengths)))


def _slice(rows: Tensor) -> Rows:
    """A slice where the rows follow one another: it copies nothing."""
    return slice(int(rows[0]), int(rows[-1]) + 1) if (rows.diff() == 1).all() else rows


def _flash(q: Tensor) -> bool:
    """Whether one call of flash attention takes several stretches."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _forward_of(q: Tensor) -> Callable:
    """Who computes a block."""
    return _flash_forward if _flash(q) else _cpu_forward if q.device.type == "cpu" else _forward


def _backward_of(q: Tensor, k: Tensor) -> Callable:
    """Who computes its gradient."""
    kernel = q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[1] == k.shape[1]
    return _flash_backward if _flash(q) else _cpu_backward if kernel else _backward


class BlockAttention(torch.autograd.Function):
    """Softmax attention of each query over the keys of all its blocks. Keeps q, k, v, o, l and the l_b."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        """q (n, H, d), k and v (m, K, d) -> (n, H, d)."""
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        total = torch.full(q.shape[:2], float("-inf"), device=q.device)  # (n, H)
        found = []
        for b in blocks:
            part, sums = _forward_of(q)(b, q[b.queries], k[b.keys], v[b.keys])
            before = total[b.queries]
            weight = torch.sigmoid(sums - before)[..., None]  # (n, H, 1), 1 in the first block
            _write(out, b.queries, out[b.queries].lerp_(part, weight.to(q.dtype)))
            total[b.queries] = torch.logaddexp(before, sums)
            found.append(sums)
        ctx.blocks = blocks
        ctx.save_for_backward(q, k, v, out, total, *found)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out, total, *found = ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for b, sums in zip(ctx.blocks, found):
            rows = [x[b.queries] for x in (grad, q, out, total)]
            parts = [x[side] for x, side in zip(grads, (b.queries, b.keys, b.keys))]  # added to in place
            _backward_of(q, k)(b, *rows, k[b.keys], v[b.keys], sums, *parts)
            for x, side, part in zip(grads, (b.queries, b.keys, b.keys), parts):
                _write(x, side, part)
        return *grads, None


def _write(x: Tensor, rows: Rows, part: Tensor) -> None:
    """Put a changed x[rows] back; a slice is a view and has changed x."""
    if isinstance(rows, Tensor):
        x[rows] = part


def _flash_forward(b: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (n, H, d), k and v (m, K, d) -> o_b (n, H, d), l_b (n, H)."""
    out, sums, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *b.ends, *b.longest, 0.0, b.causal, False)
    return out, sums.T


def _flash_backward(b: Block, grad: Tensor, q: Tensor, out: Tensor, total: Tensor, k: Tensor, v: Tensor,
                    sums: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """Add to the gradients of q, k and v; `out` and `total` are the merged o and l."""
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
    parts = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, total.T.contiguous(), *b.ends, *b.longest, 0.0, b.causal, seed, unused)
    for whole, part in zip((grad_q, grad_k, grad_v), parts):
        whole += part


def _cpu_forward(b: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `_flash_forward`, for one pair of stretches."""
    share = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, b.causal)
    return tuple(x[0].transpose(0, 1) for x in parts)


def _cpu_backward(b: Block, grad: Tensor, q: Tensor, out: Tensor, total: Tensor, k: Tensor, v: Tensor, sums: Tensor,
                  grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """As `_flash_backward`, for one pair of stretches and as many key heads as query heads."""
    parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(grad, q, k, v, out, total), 0.0, b.causal)
    for whole, part in zip(_heads_first(grad_q, grad_k, grad_v), parts):
        whole += part


def _heads_first(*inputs: Tensor) -> tuple[Tensor, ...]:
    """(rows, heads, ..) -> (1, heads, rows, ..)."""
    return tuple(x.transpose(0, 1)[None] for x in inputs)


def _forward(b: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `_cpu_forward`, in plain torch."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, k).float() * q.shape[-1] ** -0.5
    if b.causal:
        scores += torch.full_like(scores[0], float("-inf")).triu_(1)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1).T


def _backward(b: Block, grad: Tensor, q: Tensor, out: Tensor, total: Tensor, k: Tensor, v: Tensor, sums: Tensor,
              grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    """As `_cpu_backward`, in plain torch. Query heads that share a key head become rows of one product."""
    (n, H, d), K = q.shape, k.shape[1]
    weight = torch.exp(sums - total)[..., None]  # (n, H, 1)
    inner = ((grad.float() * out.float()).sum(-1, keepdim=True) * weight).to(grad.dtype)  # (n, H, 1)
    q, grad, inner, grad_q = (x.transpose(0, 1).unflatten(0, (K, H // K)) for x in (
        q * d**-0.5, grad * weight.to(grad.dtype), inner, grad_q))  # (K, H/K, n, ..)
    k, v, grad_k, grad_v = (x.transpose(0, 1) for x in (k, v, grad_k, grad_v))  # (K, m, d)
    step = max(1, ROWS * K // H)
    future = torch.full((step, step), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    for i in range(0, n, step):
        rows = slice(i, min(i + step, n))
        keys = slice(0, rows.stop if b.causal else k.shape[1])
        q_rows, grad_rows, inner_rows = (x[:, :, rows].flatten(1, 2) for x in (q, grad, inner))  # (K, H/K rows, ..)
        weights = q_rows @ k[:, keys].mT  # (K, H/K rows, keys)
        if b.causal:
            weights.unflatten(1, (H // K, -1))[..., i:] += future[: rows.stop - i, : rows.stop - i]  # the diagonal
        weights = weights.softmax(-1)
        scores = (grad_rows @ v[:, keys].mT).sub_(inner_rows).mul_(weights)  # their gradient
        grad_q[:, :, rows] += (scores @ k[:, keys]).mul_(d**-0.5).unflatten(1, (H // K, -1))
        grad_k[:, keys].baddbmm_(scores.mT, q_rows)
        grad_v[:, keys].baddbmm_(weights.mT, grad_rows)
