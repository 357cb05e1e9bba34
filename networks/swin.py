"""Swin Transformer: attention within windows, which move by half a window in every second block.

Liu et al. 2021, "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV, arXiv 2103.14030.
GroundingDINO (networks/dino.py) and RAM (networks/ram.py) see through it, in two ways that differ where an image or a
map does not consist of whole windows:

    size=None   any image. Images are padded to whole patches, maps to whole windows after the first norm (padding
                takes part in the attention, as it did in training) and to even sides before merging. Every second
                block shifts, even where one window holds the whole map. All stages but the first are returned, each
                after a norm of its own: norm1, norm2, ...
    size=384    square images of this many pixels. A map no larger than a window is one window and never shifts: at 384
                pixels and windows of 12 that is the last stage. The last stage is returned, after `norm`.

    attention   softmax(q k^T / sqrt(d) + bias[dy, dx] + mask) v within each window
    mask        -100, not -inf, between parts of a shifted window that are not neighbours in the image

Tensor names are those of the published checkpoints. Their buffers (`relative_position_index`, `attn_mask`) are computed
here.

Shapes: B images, H x W positions of a stage's map, C its width, w window, n windows of a map.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import MLP


@dataclass(frozen=True)
class SwinConfig:
    """Width of the first stage, blocks and heads of each stage, side of a window; each stage doubles the width."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    patch: int = 4


TINY = SwinConfig(96, (2, 2, 6, 2), (3, 6, 12, 24), 7)
BASE = SwinConfig(128, (2, 2, 18, 2), (4, 8, 16, 32), 12)
LARGE = SwinConfig(192, (2, 2, 18, 2), (6, 12, 24, 48), 12)


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """(B, H, W, C), with zeros at the bottom and the right until both sides are multiples."""
    _, H, W, _ = x.shape
    return F.pad(x, (0, 0, 0, -W % multiple, 0, -H % multiple))


def to_windows(x: Tensor, w: int) -> Tensor:
    """(B, H, W, C) -> (B, n, w * w, C)."""
    return x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, H: int, W: int, w: int) -> Tensor:
    """(B, n, w * w, C) -> (B, H, W, C)."""
    return x.unflatten(1, (H // w, W // w)).unflatten(3, (w, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


@lru_cache(maxsize=16)
def shift_mask(H: int, W: int, w: int, shift: int, device: torch.device | None = None) -> Tensor:
    """(n, w * w, w * w): -100 between positions of a window that the shift has brought together from opposite edges."""
    def part(side: int) -> Tensor:  # 0 in all windows but the last, there 1 before the seam and 2 after it
        place = torch.arange(side)
        return (place >= side - w).long() + (place >= side - shift)

    parts = part(H)[:, None] * 3 + part(W)  # (H, W)
    parts = to_windows(parts[None, ..., None], w)[0, ..., 0]  # (n, w * w)
    return ((parts[:, None] != parts[:, :, None]) * -100.0).to(device)


@lru_cache(maxsize=16)
def distance_index(w: int, device: torch.device | None = None) -> Tensor:
    """(w * w, w * w): row of the bias table for each query and key of a window."""
    place = torch.arange(w * w)
    row, column = place // w, place % w
    dy, dx = row[:, None] - row, column[:, None] - column  # query minus key
    return ((dy + w - 1) * (2 * w - 1) + dx + w - 1).to(device)


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> (B, H / 4, W / 4, C)."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.patch = config.patch
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = pad_to(pixels.permute(0, 2, 3, 1), self.patch).permute(0, 3, 1, 2)
        return self.norm(self.proj(pixels).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Attention within windows, with a bias for each distance: (B, n, w * w, C) -> the same."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """mask: (n, w * w, w * w), added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (B, n, heads, w * w, d)
        bias = self.relative_position_bias_table[distance_index(self.window, x.device)]  # (w * w, w * w, heads)
        bias = bias.permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask[:, None].to(bias)  # (n, heads, w * w, w * w)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(y.transpose(2, 3).flatten(3))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): (B, H, W, C) -> the same."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = MLP(width, 4 * width, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Tensor) -> Tensor:
        """Attention within windows of the padded and, in every second block, shifted map."""
        (_, height, width, _), w, shift = x.shape, self.window, self.shift
        x = pad_to(x, w)
        _, H, W, _ = x.shape
        mask = None
        if shift:
            x, mask = x.roll((-shift, -shift), (1, 2)), shift_mask(H, W, w, shift, x.device)
        x = from_windows(self.attn(to_windows(x, w), mask), H, W, w)
        x = x.roll((shift, shift), (1, 2)) if shift else x
        return x[:, :height, :width]


class Merging(nn.Module):
    """Four neighbours become one position of twice the width: (B, H, W, C) -> (B, H / 2, W / 2, 2 C)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, 2)
        corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Stage(nn.Module):
    """Blocks on maps of one size, and the merging that leads to the next stage."""

    def __init__(self, config: SwinConfig, stage: int, side: int | None):
        super().__init__()
        width, window = config.width * 2**stage, config.window
        whole = side is not None and side <= window  # one window holds the map
        window = side if whole else window
        self.blocks = nn.ModuleList(
            Block(width, config.heads[stage], window, 0 if whole or i % 2 == 0 else window // 2)
            for i in range(config.depths[stage]))
        self.downsample = Merging(width) if stage + 1 < len(config.depths) else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same; `downsample` is the caller's to apply."""
        for block in self.blocks:
            x = block(x)
        return x


class Swin(nn.Module):
    """Pixels (B, 3, H, W) -> the maps of the header, (B, H / s, W / s, C) each, s = 4, 8, 16, 32.

    Args:
        size: side of the square images, or None for any image.
    """

    def __init__(self, config: SwinConfig, size: int | None = None):
        super().__init__()
        stages = range(len(config.depths))
        self.size, self.outputs = size, stages[1:] if size is None else stages[-1:]
        self.patch_embed = PatchEmbed(config)
        self.layers = nn.ModuleList(
            Stage(config, i, size and size // config.patch // 2**i) for i in stages)
        for i in self.outputs:
            self.add_module(self.norm_name(i), nn.LayerNorm(config.width * 2**i))

    def norm_name(self, stage: int) -> str:
        """Of the norm after a stage whose map is returned."""
        return f"norm{stage}" if self.size is None else "norm"

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Raises ValueError on images of another size than the one that is fixed."""
        if self.size is not None and pixels.shape[-2:] != (self.size, self.size):
            raise ValueError(f"images of {tuple(pixels.shape[-2:])} pixels, this network takes {self.size} a side")
        x, maps = self.patch_embed(pixels), []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if i in self.outputs:
                maps.append(self.get_submodule(self.norm_name(i))(x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps
