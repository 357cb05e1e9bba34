"""Attention in blocks: stretches of queries attend to stretches of keys, and what a query found in several is merged.

    one block      P_b = softmax(s_b),  o_b = P_b v_b,  l_b = log sum exp s_b          s_b = q k_b^T / sqrt d
    merged         l = log sum_b exp l_b,  o = sum_b w_b o_b,  w_b = exp(l_b - l)
    gradient       dv_b = P_b^T (w_b do),  ds_b = P_b ((w_b do) v_b^T - w_b c),  c = o . do;  dq, dk from ds_b

This is FlashAttention's way of splitting a softmax (Dao et al. 2022, arXiv 2205.14135), done between its calls: given
the merged o and l, the gradient of a block needs no other block. So no key is copied next to another, nothing is padded
and there is no mask: a block sees all of its keys, or is causal.

On CUDA in half precision each block is one call of flash attention, forward and backward, for all stretches. Elsewhere
each stretch is a call. There the gradient is written out, ROWS query rows at a time: in bf16 on CPUs torch's own is up
to four times slower (torch 2.14), in fp32 as fast.

Shapes: n queries, m keys, H heads, K key-value heads, d head width.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 128  # query rows whose attention weights are alive at a time in the backward


class Block(NamedTuple):
    """Stretch i of the queries attends to stretch i of the keys. No row is in two stretches."""

    queries: slice | Tensor  # rows of q, stretch after stretch
    keys: slice | Tensor  # rows of k and v
    lengths: tuple[list[int], list[int]]  # of the queries' stretches, of the keys'
    causal: bool  # the stretches are the same on both sides; each token sees itself and what came before
    ends: tuple[Tensor, Tensor]  # where stretches end, from 0: (stretches + 1,) int32 each

    def map(self, move) -> Block:
        """The block with `move` applied to its tensors."""
        rows = (move(x) if isinstance(x, Tensor) else x for x in (self.queries, self.keys))
        return Block(*rows, self.lengths, self.causal, tuple(move(x) for x in self.ends))


def block(queries: slice | Tensor, keys: slice | Tensor, lengths: tuple[list[int], list[int]], causal: bool) -> Block:
    """A block on the CPU."""
    ends = tuple(torch.tensor([0, *accumulate(side)], dtype=torch.int32) for side in lengths)
    return Block(queries, keys, lengths, causal, ends)


class BlockAttention(torch.autograd.Function):
    """Softmax attention of each query over the keys of all blocks that it is in. Keeps q, k, v, o and l."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        """q (n, H, d), k and v (m, K, d), K divides H (grouped queries) -> (n, H, d).

        Every query must be in a block.
        """
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        total = torch.full(q.shape[:2], float("-inf"), device=q.device)  # (n, H)
        found = []
        for b in blocks:
            part, sums = _forward(b, q[b.queries], k[b.keys], v[b.keys])
            before = total[b.queries]
            share = torch.sigmoid(sums - before)[..., None]  # 1 where this is the first block
            out[b.queries] = out[b.queries].lerp_(part, share.to(q.dtype))
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
            rows = (x[b.queries] for x in (grad, q, out, total))
            parts = _backward(b, *rows, k[b.keys], v[b.keys], sums)
            for whole, side, part in zip(grads, (b.queries, b.keys, b.keys), parts):
                whole[side] += part
        return *grads, None


def _flash(q: Tensor) -> bool:
    """Whether flash attention takes all stretches of a block in one call."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0


def _forward(b: Block, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One block: q (n, H, d), k and v (m, K, d) -> o_b (n, H, d), l_b (n, H)."""
    if _flash(q):
        out, sums, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *b.ends, *map(max, b.lengths), 0.0, b.causal, False)
        return out, sums.T
    share = q.shape[1] // k.shape[1]
    parts = [_attend(*s, b.causal) for s in zip(*_stretches(b, (q,), (k, v), share))]
    return tuple(torch.cat([x.transpose(0, 1) for x in side]) for side in zip(*parts))


def _backward(b: Block, grad: Tensor, q: Tensor, out: Tensor, total: Tensor, k: Tensor, v: Tensor, sums: Tensor,
              ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's q, k, v; `out` and `total` are the merged o and l of its queries."""
    if _flash(q):
        seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), q.new_empty(0)
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, total.T.contiguous(), *b.ends, *map(max, b.lengths), 0.0, b.causal, seed, unused)
    share = q.shape[1] // k.shape[1]
    weight = torch.exp(sums - total)[..., None]  # (n, H, 1)
    inner = (grad.float() * out.float()).sum(-1, keepdim=True)  # (n, H, 1)
    grad, inner = grad * weight.to(grad.dtype), (inner * weight).to(grad.dtype)
    parts = [_differentiate(*s, b.causal) for s in zip(*_stretches(b, (grad, q, inner), (k, v), share))]
    grad_q, *grads = (torch.cat([x.transpose(0, 1) for x in side]) for side in zip(*parts))
    return grad_q, *(g if share == 1 else g.unflatten(1, (-1, share)).sum(2) for g in grads)


def _stretches(b: Block, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], share: int) -> list[list[Tensor]]:
    """Each tensor (rows, heads, ..) cut into its stretches (H, rows, ..); keys are repeated for their queries."""
    keys = [x if share == 1 else x.repeat_interleave(share, 1) for x in keys]
    sides = [(x, b.lengths[0]) for x in queries] + [(x, b.lengths[1]) for x in keys]
    return [[y.transpose(0, 1) for y in x.split(lengths)] for x, lengths in sides]


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """One stretch: q (H, n, d), k and v (H, m, d) -> o_b (H, n, d), l_b (H, n)."""
    if q.device.type == "cpu":
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, causal)
        return out[0], sums[0]
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (H, n, m)
    if causal:
        scores += torch.full_like(scores[0], float("-inf")).triu_(1)
    return scores.softmax(-1).to(v.dtype) @ v, scores.logsumexp(-1)


def _differentiate(grad: Tensor, q: Tensor, inner: Tensor, k: Tensor, v: Tensor, causal: bool,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """One stretch: gradients of q (H, n, d), k and v (H, m, d), from w_b do (H, n, d) and w_b c (H, n, 1)."""
    n, scale = q.shape[1], q.shape[-1] ** -0.5
    q, k, v, grad = (x.contiguous() for x in (q * scale, k, v, grad))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    future = torch.full((ROWS, ROWS), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
    for i in range(0, n, ROWS):
        rows = slice(i, min(i + ROWS, n))
        keys = slice(0, rows.stop if causal else k.shape[1])
        weights = q[:, rows] @ k[:, keys].mT  # (H, rows, keys)
        if causal:
            weights[..., i:] += future[: rows.stop - i, : rows.stop - i]  # the block on the diagonal
        weights = weights.softmax(-1)
        grad_scores = (grad[:, rows] @ v[:, keys].mT).sub_(inner[:, rows]).mul_(weights)  # (H, rows, keys)
        grad_q[:, rows] = (grad_scores @ k[:, keys]).mul_(scale)
        grad_k[:, keys].baddbmm_(grad_scores.mT, q[:, rows])
        grad_v[:, keys].baddbmm_(weights.mT, grad[:, rows])
    return grad_q, grad_k, grad_v
