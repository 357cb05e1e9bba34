"""The hand-written gradients of model/ops.py against autograd on the plain formulas."""

import pytest
import torch
from torch import Tensor

from model import ops


def both(fast, plain, *inputs: Tensor) -> None:
    """Values and all gradients of two functions agree, for a random incoming gradient."""
    results = []
    for function in (fast, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append([y.detach(), *torch.autograd.grad(y, leaves, incoming.to(y.dtype))])
    assert all(g.abs().max() > 1e-3 for g in results[1])  # nothing is compared with zero
    for got, expected in zip(*results):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 10)])
def test_rms_norm(shape):
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()

    both(lambda x, w: ops.RMSNorm.apply(x, w, 0.1), plain, normal(*shape), normal(10))


def test_rms_norm_by_hand():
    """x = (1, 7), w = (1, 2), eps = 0: mean square 25, y = (0.2, 2.8). For L = y_1, u = (1, 0):
    dx = u / 5 - x mean(u x) / 125 = (0.2, 0) - (1, 7) 0.5 / 125 = (0.196, -0.028)."""
    x = torch.tensor([[1.0, 7.0]], requires_grad=True)
    y = ops.RMSNorm.apply(x, torch.tensor([1.0, 2.0]), 0.0)
    torch.testing.assert_close(y, torch.tensor([[0.2, 2.8]]))
    y[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.196, -0.028]]))


def test_rms_norm_in_bf16_rounds_once():
    """The normalised value is computed in fp32 and rounded to bf16, then multiplied by the weight in bf16."""
    x, weight = normal(5, 64).bfloat16(), normal(64).bfloat16()
    wide = x.float()
    expected = weight * (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    got = ops.RMSNorm.apply(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)
    assert (got == expected).float().mean() > 0.99


def test_rotate():
    angle = normal(7, 1, 3)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))

    def plain(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    both(lambda x: ops.Rotate.apply(x, cos, sin), plain, normal(7, 2, 6))


def test_swiglu():
    both(ops.SwiGLU.apply, lambda a, b: a * torch.sigmoid(a) * b, normal(5, 9), normal(5, 9) + 1)
