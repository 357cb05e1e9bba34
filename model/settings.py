"""How a folder's images are to be made: the settings that `transformers` saves, read into `Preprocessing`.

    processor_config.json      as "image_processor": {...}, written by transformers 5; counts where both are there
    preprocessor_config.json   by earlier versions, and for an image processor saved by itself

What is left out is CLIP's, with the side that the vision tower takes. What a file of CLIP or LLaVA may say:

    image_processor_type   CLIP, Llava or LlavaNextImageProcessor, BLIP's BlipImageProcessor, and these with Fast or Pil
                           appended (feature_extractor_type CLIPFeatureExtractor in the oldest)
    size                   n or {"shortest_edge": n}; {"height": h, "width": w} for an image of any shape
    crop_size              S or {"height": S, "width": S}, where S is the side that the tower takes
    do_center_crop         false if `size` is already S x S
    resample               the number of one of Pillow's filters
    do_normalize           with image_mean and image_std of the three channels
    do_pad                 of LlavaImageProcessor: padded to a square with the mean colour ("pad"); of
                           LlavaNextImageProcessor and CLIP's it concerns batches and changes no image
    image_grid_pinpoints   those of config.json

Everything else that would change an image is refused. Further fields of processor_config.json (patch_size,
vision_feature_select_strategy, num_additional_image_tokens) count image tokens, which config.json decides here.
"""

import re
from pathlib import Path

from PIL.Image import Resampling

from common import BadInput, read_json
from model.config import refuse
from model.layouts import SETTINGS
from model.views import CLIP_MEAN, CLIP_STD, Preprocessing

MAX_RESIZE = 2**11  # of the shorter side when resized; the longer one may be MAX_RATIO (data/images.py) times that
KINDS = ("CLIP", "Llava", "LlavaNext")


def read_preprocessing(folder: Path, size: int, aspect: str | None = None,
                       kinds: tuple[str, ...] = KINDS) -> Preprocessing:
    """The settings of a folder whose tower takes images of `size` pixels a side.

    Args:
        aspect: how the images of a model are shown (`find_aspect` of its family); None: those of a CLIP.
        kinds: of image processors that the family knows.
    Raises BadInput naming the file and the setting that does not fit or is not supported.
    """
    where, raw = image_settings(folder)
    kind = kind_of(where, raw, kinds)
    if aspect is None and kind not in ("CLIP", None):
        raise BadInput(f"{where}: {kind}ImageProcessor does not belong to a CLIP")
    refuse(raw, where, do_resize=(True,), do_rescale=(True,), rescale_factor=(1 / 255,), do_normalize=(True, False),
           do_center_crop=(True, False), do_pad=(True, False), use_square_size=(False,),
           resample=tuple(sorted(map(int, Resampling))))
    resize, crop = size_of(raw, "size", where) or size, size_of(raw, "crop_size", where) or size
    cropped = raw.get("do_center_crop", True) or aspect == "anyres"  # whose tiles are of `crop_size`
    if cropped and crop not in (size, (size, size)):
        raise BadInput(f"{where}: crop_size={raw['crop_size']!r} does not fit the vision tower's {size} x {size}")
    if not cropped and resize != (size, size):
        raise BadInput(f"{where}: do_center_crop=False needs a size of height {size} and width {size}, as the"
                       " vision tower takes")
    if aspect == "anyres" and resize not in (size, (size, size)):
        raise BadInput(f"{where}: size={raw['size']!r} is not the side of a tile, {size}")
    mean, std, fill = colours(raw, where)
    return Preprocessing(size, mean, std, None if resize == size else resize, int(raw.get("resample", 3)), fill)


def colours(raw: dict, where: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, ...]]:
    """(mean, deviation, colour of padding), of three channels; the last is the mean as a colour, whether or not images
    are normalised."""
    mean, std = channels_of(raw, "image_mean", CLIP_MEAN, where), channels_of(raw, "image_std", CLIP_STD, where)
    if min(std) == 0:
        raise BadInput(f"{where}: image_std={raw['image_std']!r} divides by 0")
    fill = tuple(int(x * 255) for x in mean)
    return (mean, std, fill) if raw.get("do_normalize", True) else ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), fill)


def image_settings(folder: Path) -> tuple[str, dict]:
    """(where they are, for messages; the settings that are not null). BadInput naming an unreadable file."""
    new, old = (folder / name for name in SETTINGS)
    where, raw = f"{new}: image_processor", read_json(new).get("image_processor") if new.is_file() else None
    if raw is None:
        where, raw = str(old), read_json(old) if old.is_file() else {}
    if not isinstance(raw, dict):
        raise BadInput(f"{where} is no object")
    return where, {key: value for key, value in raw.items() if value is not None}


def kind_of(where: str, raw: dict, kinds: tuple[str, ...] = KINDS) -> str | None:
    """One of the kinds; None where the settings do not say. BadInput on any other."""
    key = "image_processor_type" if "image_processor_type" in raw else "feature_extractor_type"
    if key not in raw:
        return None
    pattern = rf"({'|'.join(kinds)})(ImageProcessor|FeatureExtractor)(Fast|Pil)?"
    if not (found := re.fullmatch(pattern, str(raw[key]))):
        raise BadInput(f"{where}: {key}={raw[key]!r:.80} is not supported (supported: {', '.join(kinds)}"
                       "ImageProcessor)")
    return found[1]


def size_of(raw: dict, key: str, where: str) -> int | tuple[int, int] | None:
    """n: the shorter side; (height, width); None where the settings do not say."""
    value = raw.get(key, {})
    sides = value if isinstance(value, dict) else {"shortest_edge": value}
    sides = {k: v for k, v in sides.items() if v is not None}
    if sides.keys() not in ({"shortest_edge"}, {"height", "width"}, set()) or not all(
        type(side) is int and 0 < side <= MAX_RESIZE for side in sides.values()
    ):
        raise BadInput(f"{where}: {key}={value!r:.80} is not supported (supported: shortest_edge, or height and"
                       f" width, of at most {MAX_RESIZE} pixels)")
    if not sides:
        return None
    return sides.get("shortest_edge") or (sides["height"], sides["width"])


def channels_of(raw: dict, key: str, default: tuple[float, ...], where: str) -> tuple[float, ...]:
    """Three numbers from 0 to 1 under `key`, one for each channel. Raises BadInput naming the file."""
    value = raw.get(key, default)
    fits = isinstance(value, (list, tuple)) and len(value) == 3 and all(type(x) in (int, float) for x in value)
    if not fits or not all(0 <= x <= 1 for x in value):
        raise BadInput(f"{where}: {key}={value!r:.80} is not three numbers from 0 to 1")
    return tuple(map(float, value))
