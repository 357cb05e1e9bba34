"""Four steps of the decoder with hand-written gradients: the same mathematics in fewer passes over memory.

Autograd keeps every intermediate of a formula and differentiates it term by term. For these steps that is
what the time and the memory outside the matrix products go to, so each of them keeps no more than its inputs
(RMSNorm one number a row more) and has its gradient written out.

    step        formula                                    gradient
    RMSNorm     y = w x / r,  r = sqrt(mean x^2 + eps)     dx = u / r - x mean(u x) / r^3,  u = w dy
    Rotate      y = R x,  R turns pairs by an angle        dx = R^T dy: turn back by the same angle
    SwiGLU      y = silu(a) b                              da = silu'(a) b dy,  db = silu(a) dy
    Attention   y = P v,  P = softmax(q k^T / sqrt d)      dv = P^T dy,  dS = P (dy v^T - row sums),
                                                           dq, dk from dS

`Attention` is for bf16 on CPUs only: torch's kernel for the backward is up to four times slower there than
the same products written out (torch 2.14). It recomputes P, ROWS query rows at a time, and keeps none of it.

Shapes: T tokens, D width, H heads, d head width; G groups, n queries and m keys of each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 64  # query rows whose attention weights are alive at a time in the backward


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight; keeps x and one number a row for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (.., D), weight (D,) -> (.., D); the mean square is taken in fp32."""
        wide = x.float()
        inverse = torch.rsqrt(
            torch.linalg.vector_norm(wide, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps)  # (.., 1)
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        wide = x.float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.float() * wide).mul_(inverse).flatten(0, -2).sum(0).to(weight.dtype)  # (D,)
        u = (grad * weight).float()  # (.., D)
        along = torch.linalg.vecdot(u, wide)[..., None] * inverse**3 / x.shape[-1]  # (.., 1)
        return u.mul_(inverse).addcmul_(wide, along, value=-1).to(x.dtype), grad_weight, None


class Rotate(torch.autograd.Function):
    """Rotary embedding; keeps cos and sin, as its backward pass is the opposite rotation."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (T, H, d), cos and sin (T, 1, d) of x's dtype -> (T, H, d)."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x_i, x_{i+d/2}) by their angle."""
    (first, second), (_, half) = x.chunk(2, -1), sin.chunk(2, -1)
    y = x * cos
    y_first, y_second = y.chunk(2, -1)
    y_first.addcmul_(second, half, value=-1)
    y_second.addcmul_(first, half)
    return y


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; keeps its inputs, and the product is recomputed."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up (.., F) -> silu(gate) * up (.., F)."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate = grad * up
        torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate)
        return grad_gate, F.silu(gate).mul_(grad)


class Attention(torch.autograd.Function):
    """Scaled dot-product attention whose backward pass recomputes the weights a few query rows at a time."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        """q (G, H, n, d), k and v (G, H, m, d), mask (G, 1, n, m) bool -> (G, H, n, d).

        Query i sees the keys 0..i if `causal`, those that the mask allows if there is one, else all.
        """
        ctx.save_for_backward(q, k, v, mask)
        ctx.causal = causal
        if causal:
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    @staticmethod
    def backward(ctx, grad: Tensor):
        *saved, mask = ctx.saved_tensors
        q, k, v = saved
        k, v = k.contiguous(), v.contiguous()
        n, m, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        minus = torch.full((), float("-inf"), dtype=q.dtype, device=q.device)
        future = minus.expand(ROWS, ROWS).triu(1)  # (ROWS, ROWS)
        hidden = None if mask is None else torch.where(mask, 0.0, minus)  # (G, 1, n, m); masked_fill is slower
        for i in range(0, n, ROWS):
            rows = slice(i, min(i + ROWS, n))
            keys = slice(0, rows.stop if ctx.causal else m)
            q_rows, grad_rows = q[:, :, rows].contiguous() * scale, grad[:, :, rows].contiguous()
            weights = q_rows @ k[:, :, keys].mT  # (G, H, rows, keys)
            if ctx.causal:
                weights[..., i:] += future[: rows.stop - i, : rows.stop - i]  # the block on the diagonal
            elif mask is not None:
                weights += hidden[:, :, rows]
            weights = weights.softmax(-1)
            inner = torch._softmax_backward_data(grad_rows @ v[:, :, keys].mT, weights, -1, weights.dtype)
            grad_q[:, :, rows] = (inner @ k[:, :, keys]).mul_(scale)
            grad_k[:, :, keys] += inner.mT @ q_rows
            grad_v[:, :, keys] += weights.mT @ grad_rows
        return grad_q, grad_k, grad_v, None, None
