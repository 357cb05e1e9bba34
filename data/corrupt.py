"""Corrupted images: diffusion noise (POVID), small random crops (mDPO) and partly hidden objects (LPOI).

Noise: Zhou et al. 2024, "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning"
(POVID), arXiv 2402.11411; the same schedule as Leng et al. 2023 (VCD), arXiv 2311.16922. Forward diffusion of
T = 1000 steps,

    beta_i = (5e-3 - 1e-5) sigmoid(s_i) + 1e-5,   s_1 .. s_T evenly spaced over [-6, 6]
    abar_t = (1 - beta_1) .. (1 - beta_t)
    v_t    = sqrt(abar_t) v + sqrt(1 - abar_t) eps,   eps ~ N(0, 1)

Crop: Wang et al. 2024, "mDPO: Conditional Preference Optimization for Multimodal Large Language Models",
arXiv 2406.11839: a window of 1 to 20 % of the image, stretched to the full size again.

Hidden: Pesaran Zadeh et al. 2025, "LPOI: Listwise Preference Optimization for Vision Language Models", arXiv
2505.21061: of an object's box a share is covered, from the side inwards. Here it is what another image has there.

    symbol   argument   shape
    v        image      RGB image, read as (3, H, W) in [0, 1]
    t        step       counted from 0 as in the released code: step 500 multiplies 501 factors, abar .7448
    v_c      crop       (.., 3, H, W) -> (.., 3, H, W)

All functions are pure: a seed gives the same result every time, and the global random state is not touched.

Departures from the released codes
- POVID casts v_t to bytes without clamping, so values outside [0, 1] wrap around (-.1 becomes 231, 1.2
  becomes 50). That is overflow="wrap"; the default clamps (and rounds where the cast cuts off). Wrapping
  leaves a share of exp(-2 pi^2 (1 - abar)) of an image's contrast: .48 at step 300, but .0065, nothing that
  can be seen, at 500.
- POVID corrupts the image before any preprocessing, as here; VCD adds the noise to the normalised pixels.
- mDPO draws a new window in every forward pass, so that policy and reference see different ones. Here the
  caller gives a seed, one to a sample: `sample_seed`.
"""

import math
import random
from functools import cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from common import BadInput

STEPS = 1000


def sample_seed(name: str, seed: int = 0) -> int:
    """A seed for each sample (record id) of a run; does not depend on the order of the samples."""
    return random.Random(f"{seed}/{name}").getrandbits(63)  # a string seed is stable across Python versions


@cache
def signal_shares() -> Tensor:
    """abar_t for t = 0 .. 999, (1000,) fp64."""
    betas = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)


def add_noise(image: Image.Image, step: int = 500, seed: int = 0,
              overflow: Literal["clamp", "wrap"] = "clamp") -> Image.Image:
    """Diffuse an RGB image at its own resolution.

    Args:
        step: 0 (next to nothing) .. 999 (little is left); POVID trains with 500.
        overflow: what becomes of values outside [0, 1]: "clamp", or "wrap" as in POVID's code.
    """
    if not 0 <= step < STEPS:
        raise BadInput(f"noise step {step}: want 0 .. {STEPS - 1}")
    pixels = to_pixels(image)  # (3, H, W)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    share = float(signal_shares()[step])
    noisy = math.sqrt(share) * pixels + math.sqrt(1 - share) * noise
    if overflow == "wrap":
        noisy = (noisy * 255).long().remainder(256) / 255
    return to_image(noisy)


def crop_window(height: int, width: int, seed: int, scale: tuple[float, float] = (0.01, 0.2),
                ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random window, drawn as torchvision's RandomResizedCrop draws it.

    Args:
        scale: bounds of the window's share of the area.
        ratio: bounds of its width / height, log-uniform.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high, generator=generator).item()

    for _ in range(10):
        area = height * width * uniform(*scale)
        # In fp32 like torchvision, so that the rounding agrees.
        aspect = torch.tensor(uniform(*torch.log(torch.tensor(ratio)).tolist())).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return top, left, h, w
    side = max(1, round(math.sqrt(height * width * scale[0])))  # reconstructed
    h, w = min(side, height), min(side, width)
    return (height - h) // 2, (width - w) // 2, h, w


def crop(pixels: Tensor, seed: int, scale: tuple[float, float] = (0.01, 0.2),
         ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> Tensor:
    """A small window of (already preprocessed) pixels, stretched to their size, (.., 3, H, W).

    The tiles of a view share the window, as leading dimensions do in torchvision's transform.
    """
    size = tuple(pixels.shape[-2:])
    top, left, height, width = crop_window(*size, seed, scale, ratio)
    window = pixels[..., top : top + height, left : left + width]
    stretched = F.interpolate(window.reshape(-1, 3, height, width), size, mode="bilinear", antialias=True)
    return stretched.reshape(pixels.shape)


def hide(image: Image.Image, other: Image.Image, share: float) -> Image.Image:
    """An RGB image with the left part of what differs replaced: of the columns of the box around all pixels in which
    another one, brought to its size, differs from it, a share, rounded to whole pixels, is the other's."""
    other = other.resize(image.size)  # nothing changes where they agree
    if box := ImageChops.difference(image, other).getbbox():
        left, top, right, bottom = box
        part = (left, top, left + round(share * (right - left)), bottom)
        image = image.copy()
        image.paste(other.crop(part), part)
    return image


def to_pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) fp32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1) / 255


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1], values outside are clamped -> RGB image; exact inverse of `to_pixels`."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
