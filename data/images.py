"""Pictures: where they come from and how CLIP wants them.

A picture is named by a reference: a file path, or `scene:SEED` / `scene:SEED?without=dog,cat` for a picture
of the scene world (data/scenes.py), drawn on the spot.

Preprocessing follows CLIP and equals the slow image processor of `transformers` pixel for pixel: shorter side
to the target size (Pillow, bicubic), centre crop, scale to [0, 1], normalise each channel. A folder may set the
numbers and the filter (data/settings.py). What comes before depends on the checkpoint (`aspect` in
model/config.py):

    crop     nothing: what lies outside the centre square is lost           llava-hf's LLaVA-1.5
    pad      centred on a square of the mean colour (122, 116, 104)         original LLaVA-1.5; Re-Align also 1.6
    anyres   an overview and tiles of a higher resolution (data/anyres.py)  LLaVA-1.6

Colours are what Pillow's `convert("RGB")` gives, as in LLaVA: greyscale is copied to the three channels, CMYK
converted, transparency dropped (hidden colours show). Pictures are not rotated by their EXIF tag;
`transformers.load_image` does rotate. One departure: 16-bit greyscale keeps its high byte, as Pillow does in
16-bit RGB files, where `convert` would clip nearly everything to white.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common import BadInput

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 2**26  # 8192 x 8192; a larger picture is a mistake or a decompression bomb
MAX_SIDE = 2**14  # padded to a square, a longer side would take gigabytes
MAX_RESIZE = 2**11  # of the shorter side when resized; the longer one may be MAX_RATIO times that
MAX_RATIO = 200  # of the sides; resizing the short one of a thinner picture would make a huge one


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to what a tower takes, CLIP's way unless told otherwise.

    size: side of the result in pixels.
    mean, std: mean and standard deviation of each channel, of colours in [0, 1].
    resize: what the shorter side becomes before the crop, or (height, width) for a picture of any shape; None: the
        shorter side becomes `size`.
    resample: number of Pillow's filter.
    fill: colour around a picture that is padded to a square, 0 ... 255 in each channel.
    """

    size: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resize: int | tuple[int, int] | None = None
    resample: int = Image.Resampling.BICUBIC.value
    fill: tuple[int, ...] = tuple(int(x * 255) for x in CLIP_MEAN)


class View(NamedTuple):
    """A picture as the model sees it.

    `rows` has one entry for each image token of the prompt: which of the n P patch features of the tiles (tile
    after tile) stands there, or -1 for the embedding that ends a row of patches (LLaVA-1.6).
    """

    pixels: Tensor  # (n, 3, S, S) tiles, the whole picture first
    rows: Tensor  # (image tokens,) long


def single(pixels: Tensor, patches: int) -> View:
    """One tile (3, S, S), all its patches in order."""
    return View(pixels[None], torch.arange(patches))


def stack(views: list[View], patches: int) -> tuple[Tensor, list[Tensor]]:
    """Views -> all tiles (tiles, 3, S, S), and each view's rows among all their (tiles * patches) features."""
    rows, first = [], 0
    for view in views:
        rows.append(torch.where(view.rows < 0, view.rows, view.rows + first))
        first += len(view.pixels) * patches
    return torch.cat([view.pixels for view in views]), rows


def open_image(reference: str, root: Path | str | None = None) -> Image.Image:
    """The picture behind a reference, in RGB; relative paths start at `root`.

    Raises BadInput naming the file when it is truncated or damaged, or as from `image_size`.
    """
    if reference.startswith("scene:"):
        from data.scenes import open_scene  # here: who opens photographs does not load the scene world

        return open_scene(reference)
    with _opened(Path(root or ".") / reference) as image:
        return _rgb(image)


def image_size(reference: str, root: Path | str | None = None) -> tuple[int, int]:
    """(height, width) of the picture behind a reference; of a file only the header is read.

    Raises BadInput naming the reference when it is no scene, or the file when it is missing, no regular file, no
    picture, empty, larger than MAX_PIXELS, longer than MAX_SIDE, thinner than 1 : MAX_RATIO, or of numbers without
    a known range (32-bit, floats). What only decoding shows, damaged pixels, passes: `open_image` finds it.
    """
    if reference.startswith("scene:"):
        from data.scenes import SIDE, parse_reference

        parse_reference(reference)
        return SIDE, SIDE
    with _opened(Path(root or ".") / reference) as image:
        return image.height, image.width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file with its header read and found good; whatever fails inside is one BadInput naming the file."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise BadInput("no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on sizes checked here and on dropped transparency
            with Image.open(path) as image:
                _check_size(*image.size)
                _check_mode(image)
                yield image
    except FileNotFoundError:
        raise BadInput(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise BadInput(f"{path}: not a readable image (no format that Pillow knows)") from None
    except Exception as error:  # Pillow's decoders raise almost anything on broken files
        raise BadInput(f"{path}: not a readable image ({str(error) or type(error).__name__})") from None


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise BadInput(f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadInput(f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if max(width, height) > MAX_SIDE:
        raise BadInput(f"{width} x {height} pixels: one side is longer than {MAX_SIDE}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise BadInput(f"{width} x {height} pixels: one side is more than {MAX_RATIO} times the other")


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise BadInput(f"values of mode {image.mode}, whose range is not known")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit; old Pillow says "I" of PNG files
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
    """The picture centred on a square of the mean colour, as LLaVA's `image_aspect_ratio` "pad" does."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
