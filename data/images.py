"""Images: where they come from.

An image is named by a reference: a file path, or `scene:SEED` / `scene:SEED?without=dog,cat` for an image of the scene
world (data/scenes.py), drawn on the spot. What a model is shown of it is in model/views.py. `image` of a record is one
reference, or a list of several.

Colours are what Pillow's `convert("RGB")` gives, as in LLaVA: greyscale is copied to the three channels, CMYK
converted, transparency dropped (hidden colours show). Images are not rotated by their EXIF tag;
`transformers.load_image` does rotate. One departure: 16-bit greyscale keeps its high byte, as Pillow does in
16-bit RGB files, where `convert` would clip nearly everything to white.
"""

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common import BadInput

IMAGE = "<image>"  # marks the place of an image in a text
MAX_PIXELS = 2**26  # 8192 x 8192; a larger image is a mistake or a decompression bomb
MAX_SIDE = 2**14  # padded to a square, a longer side would take gigabytes
MAX_RATIO = 200  # of the sides; resizing the short one of a thinner image would make a huge one


def references(image: str | list[str] | None) -> list[str | None]:
    """The references of a record's `image`, in order; of a question without an image, None alone."""
    return image if isinstance(image, list) else [image]


def is_scene(image: str | list[str]) -> bool:
    """Whether all images are drawn."""
    return all(reference.startswith("scene:") for reference in references(image))


def cut_at_images(text: str, images: int) -> list[str]:
    """A text and its images in order, `<image>` for each: where it marks several, else before the text."""
    if images > 1 and text.count(IMAGE) == images:
        return [part for part in re.split(f"({IMAGE})", text) if part]
    return [IMAGE] * images + [text]


def open_image(reference: str, root: Path | str | None = None) -> Image.Image:
    """The image of a reference, in RGB; relative paths start at `root`.

    Raises BadInput naming the file when it is truncated or damaged, or as from `image_size`.
    """
    if reference.startswith("scene:"):
        from data.scenes import open_scene  # here: who opens photographs does not load the scene world

        return open_scene(reference)
    with _opened(Path(root or ".") / reference) as image:
        return _rgb(image)


def image_size(reference: str, root: Path | str | None = None) -> tuple[int, int]:
    """(height, width) of the image of a reference; of a file only the header is read.

    Raises BadInput naming the reference when it is no scene, or the file when it is missing, no regular file, no
    image, empty, larger than MAX_PIXELS, longer than MAX_SIDE, thinner than 1 : MAX_RATIO, or of numbers without
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
                if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
                    raise BadInput(f"values of mode {image.mode}, whose range is not known")
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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit; old Pillow says "I" of PNG files
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def data_url(image: Image.Image, kind: str, **options) -> str:
    """An image inside a URL, as Pillow saves it in a format ("PNG", "JPEG")."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
