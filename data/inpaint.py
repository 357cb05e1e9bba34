"""Fill a hole in an image without any weights: the smoothest surface that meets the hole's rim.

Inside the hole M the result solves Laplace's equation, with the known pixels as boundary values,

    sum over the neighbours q of p of (u_q - u_p) = 0   for p in M;   u = v outside M

where p has up to four neighbours (fewer at the image's edge, which thereby is a mirror). A constant
surround gives that constant, a linear ramp that ramp; textures end at the rim. The stand-in for LaMa
(data/lama.py) when there are no weights at hand.

    symbol   argument   shape
    v        pixels     (3, H, W) in [0, 1]
    M        hole       (H, W) bool, True where there is nothing to be seen

The equation is symmetric and positive definite, so conjugate gradients solve it, preconditioned by a
multigrid cycle on ever coarser holes (as McAdams et al. 2010, "A parallel multigrid Poisson solver for fluids
simulation on large grids"): some ten to twenty steps, whatever the size of the hole.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import BadInput

Fill = Callable[[Tensor, Tensor], Tensor]  # (pixels, hole) -> pixels


def dilate(mask: Tensor, side: int = 15) -> Tensor:
    """Grow a mask (H, W) bool by a square of `side` x `side` pixels; side 1 changes nothing.

    15 is what tools that chain a segmenter and an inpainter use: a mask that is too tight leaves a halo, from
    which the object is painted again.
    """
    if side < 1 or side % 2 == 0:
        raise BadInput(f"dilation by {side} pixels: want an odd number, so that the square has a middle")
    return F.max_pool2d(mask[None].float(), side, stride=1, padding=side // 2)[0].bool()


def fill(pixels: Tensor, hole: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Harmonic fill: (3, H, W), (H, W) -> (3, H, W); pixels outside the hole are returned as they are.

    Args:
        tolerance: largest residual of the equation at any pixel; with 1e-4 the values are right to about 1e-3.

    Raises BadInput when the hole is the whole image.
    """
    check(pixels, hole)
    if not hole.any():
        return pixels
    known = pixels[:, ~hole].float().mean(1)[:, None, None]
    # The hole with its rim: nothing further away counts.
    down, across = (slice(max(0, int(axis.min()) - 1), int(axis.max()) + 2) for axis in hole.nonzero().T)
    part = torch.where(hole, known, pixels.float())[:, down, across]
    filled = pixels.clone()
    filled[:, down, across] = _solve(part, hole[down, across], tolerance).to(pixels.dtype)
    return torch.where(hole, filled, pixels)


def check(pixels: Tensor, hole: Tensor) -> None:
    """ValueError unless the hole is one of this image and leaves something to be seen."""
    if hole.dtype != torch.bool or pixels.shape[-2:] != hole.shape:
        size = tuple(pixels.shape[-2:])
        raise ValueError(f"hole {tuple(hole.shape)} {hole.dtype}: want bool of the image's size {size}")
    if hole.all():
        raise BadInput("the hole is the whole image: there is nothing to fill it from")


class _Grid:
    """The equation's operator on one grid, and the coarser grid of the pixels that wholly lie in the hole."""

    def __init__(self, hole: Tensor):
        self.hole = hole
        self.degree = _neighbours(torch.ones_like(hole[None], dtype=torch.float32))  # (1, H, W)
        inside = -F.max_pool2d(-hole[None].float(), 2, ceil_mode=True)[0] > 0  # (H / 2, W / 2)
        self.coarser = _Grid(inside) if inside.any() and min(inside.shape) > 1 else None

    def apply(self, u: Tensor) -> Tensor:
        """Sum of u_p - u_q over the neighbours, 0 outside the hole. (C, H, W)"""
        return torch.where(self.hole, self.degree * u - _neighbours(u), 0)

    def cycle(self, residual: Tensor) -> Tensor:
        """Roughly what u lacks, given its residual: smooth, correct on the coarser grid, smooth."""
        u = self.smooth(self.smooth(torch.zeros_like(residual), residual), residual)
        if self.coarser:
            rest = 4 * F.avg_pool2d(residual - self.apply(u), 2, ceil_mode=True, count_include_pad=False)
            correction = self.coarser.cycle(torch.where(self.coarser.hole, rest, 0))
            correction = F.interpolate(correction[None], size=self.hole.shape, mode="bilinear")[0]
            u = u + torch.where(self.hole, correction, 0)
        return self.smooth(self.smooth(u, residual), residual)

    def smooth(self, u: Tensor, residual: Tensor) -> Tensor:
        """A damped Jacobi step."""
        return u + 0.8 * (residual - self.apply(u)) / self.degree


def _solve(u: Tensor, hole: Tensor, tolerance: float) -> Tensor:
    """Flexible conjugate gradients on u (C, H, W) fp32 inside the hole."""
    grid = _Grid(hole)
    residual = -grid.apply(u)
    correction = direction = grid.cycle(residual)
    for _ in range(200):
        if residual.abs().max() <= tolerance:
            break
        across, along = grid.apply(direction), _dot(residual, correction)
        length = along / _dot(direction, across).clamp(min=1e-30)
        u, before = u + length * direction, residual
        residual = residual - length * across
        correction = grid.cycle(residual)
        bend = _dot(residual - before, correction) / along.clamp(min=1e-30)
        direction = correction + bend * direction
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _neighbours(x: Tensor) -> Tensor:
    """Sum of the up to four neighbours of each pixel, (C, H, W)."""
    x = F.pad(x, (1, 1, 1, 1))
    return x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
