"""What a vision tower is shown of an image: pixels, and what each image token of the prompt stands for.

Preprocessing follows CLIP and equals the slow image processor of `transformers` pixel for pixel: shorter side
to the target size (Pillow, bicubic), centre crop, scale to [0, 1], normalise each channel. A folder may set the
numbers and the filter (model/settings.py). What comes before depends on the family (model/families).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import BadInput

Size = tuple[int, int]  # height, width
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """From an image to what a tower takes, CLIP's way unless told otherwise.

    size: side of the result in pixels.
    mean, std: mean and standard deviation of each channel, of colours in [0, 1].
    resize: what the shorter side becomes before the crop, or (height, width) for an image of any shape; None: the
        shorter side becomes `size`.
    resample: number of Pillow's filter.
    fill: colour around an image that is padded to a square, 0 ... 255 in each channel.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: int | Size | None = None
    resample: int = Image.Resampling.BICUBIC.value
    fill: tuple[int, ...] = tuple(int(x * 255) for x in CLIP_MEAN)


class View(NamedTuple):
    """An image as the model sees it.

    A tile gives R rows of image features (`tile_tokens` of the family's config). `rows` has one entry for each image
    token of the prompt: which of the n R rows of the tiles (tile after tile) is there, or -1 for the embedding
    that ends a row of patches (LLaVA-1.6).
    """

    pixels: Tensor  # (n, 3, S, S) tiles, the whole image first
    rows: Tensor  # (image tokens,) long


def single(pixels: Tensor, tile_tokens: int) -> View:
    """One tile (3, S, S), all its rows in order."""
    return View(pixels[None], torch.arange(tile_tokens))


def no_image(size: int) -> View:
    """No tile and no image token: what is shown with a question that has no image."""
    return View(torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.long))


def rows_of(image: int | tuple[int, ...], rows: list[Tensor]) -> Tensor:
    """Of all images' rows those of one image, or of several, one after the other."""
    return torch.cat([rows[number] for number in image]) if isinstance(image, tuple) else rows[image]


def stack(views: list[View], tile_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Views -> all tiles (tiles, 3, S, S), and each view's rows among all their tiles * tile_tokens rows."""
    rows, first = [], 0
    for view in views:
        rows.append(torch.where(view.rows < 0, view.rows, view.rows + first))
        first += len(view.pixels) * tile_tokens
    return torch.cat([view.pixels for view in views]), rows


def preprocess(image: Image.Image, how: Preprocessing) -> Tensor:
    """RGB image -> (3, size, size) fp32: resized, cropped at the centre (black where it is smaller), normalised."""
    width, height = image.size
    if min(width, height) < 1:
        raise BadInput(f"image of {width} x {height} pixels")
    target = how.resize or how.size
    if isinstance(target, int):
        long = int(target * max(width, height) / min(width, height))
        target = (long, target) if width <= height else (target, long)
    image = image.resize(target[::-1], how.resample)
    left, top = (image.width - how.size) // 2, (image.height - how.size) // 2
    return normalise(image.crop((left, top, left + how.size, top + how.size)), how)


def normalise(image: Image.Image, how: Preprocessing) -> Tensor:
    """RGB image -> (3, height, width) fp32, scaled to [0, 1], each channel with mean and deviation of `how`."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32)) / 255  # (height, width, 3)
    return ((pixels - torch.tensor(how.mean)) / torch.tensor(how.std)).permute(2, 0, 1).contiguous()


def pad_to_square(image: Image.Image, fill: tuple[int, ...] = Preprocessing.fill) -> Image.Image:
    """The image centred on a square of the mean colour, as LLaVA's `image_aspect_ratio` "pad" does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
