"""Pictures: where they come from and how CLIP wants them.

A picture is named by a reference: a file path, or `scene:SEED` / `scene:SEED?without=dog,cat` for a picture
of the scene world (data/scenes.py), drawn on the spot.

Preprocessing follows CLIP and equals the slow image processor of `transformers` pixel for pixel: shorter side
to the target size (Pillow, bicubic), centre crop, scale to [0, 1], normalise each channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.scenes import open_scene

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Target side in pixels and the mean and standard deviation of each channel."""

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD


def open_image(reference: str, root: Path | str | None = None) -> Image.Image:
    """The picture behind a reference, in RGB; relative paths start at `root`. ValueError naming it."""
    if reference.startswith("scene:"):
        return open_scene(reference)
    path = Path(root or ".") / reference
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such image") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error})") from None


def preprocess(image: Image.Image, how: Preprocessing) -> Tensor:
    """RGB image -> (3, size, size) fp32."""
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"image of {width} x {height} pixels")
    short, long = sorted((width, height))
    sides = how.size, int(how.size * long / short)
    resized = sides if width <= height else sides[::-1]
    if short != how.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - how.size) // 2, (image.height - how.size) // 2
    image = image.crop((left, top, left + how.size, top + how.size))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 255  # (size, size, 3)
    return ((pixels - torch.tensor(how.mean)) / torch.tensor(how.std)).permute(2, 0, 1).contiguous()
