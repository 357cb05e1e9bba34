"""Three steps of the decoder with hand-written gradients: the same mathematics in fewer passes over memory.

Autograd keeps every intermediate of a formula and differentiates it term by term. For these steps that is
what the time and the memory outside the matrix products go to, so each of them keeps no more than its inputs
(RMSNorm one number a row more) and has its gradient written out.

    step        formula                                    gradient
    RMSNorm     y = w x / r,  r = sqrt(mean x^2 + eps)     dx = u / r - x mean(u x) / r^3,  u = w dy
    Rotate      y = R x,  R turns pairs by an angle        dx = R^T dy: turn back by the same angle
    SwiGLU      y = silu(a) b                              da = silu'(a) b dy,  db = silu(a) dy

The fourth, attention, is in model/blocks.py.

Shapes: T tokens, D width, H heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(device: torch.device, default: torch.dtype) -> torch.dtype:
    """What autocast computes in where it is on, else `default`."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else default


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
