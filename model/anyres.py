"""LLaVA-1.6's images: an overview and tiles of a higher resolution ("anyres").

Liu et al. 2024, "LLaVA-NeXT: Improved reasoning, OCR, and world knowledge" (blog; merge type "spatial_unpad").

    1. resolution  the pinpoint of the checkpoint that keeps most of the image's pixels, and of those the
                   smallest canvas                                                    (`best_resolution`)
    2. tiles       the overview, squashed to S x S; then the image fitted into the canvas, centred on black,
                   cut into S x S tiles row by row                                    (`tiles`)
    3. merge       the overview's patches; then the tiles' patches put together to one map, rows or columns of
                   it that show only black left out, the newline embedding after each row   (`merge`)

Step 3 moves features and computes nothing, so it is one list of indices, `View.rows`; the model only gathers.
How many image tokens an image takes follows from its size and the pinpoints alone: with the five published
ones at S = 336, 640 x 480 pixels take 2340 and 1024 x 1024 take 2928.

Follows `transformers` (LlavaNextImageProcessorPil, LlavaNextForConditionalGeneration). The original
repository differs in a detail: in step 3 it does not round a scaled side to 7 decimals before the cut to an
integer, so that one row or column more or less may stay (94 x 47 pixels, for example). Of two equally good
pinpoints the file's first is taken: a small square is shown on the wide canvas by llava-hf's files, on the
tall one by original ones, which list (width, height).

A checkpoint that was trained with tiles may also be shown single views, as Re-Align does (`aspect="pad"`): all
patches of one padded tile and no newline, which is what the original code computes for one view an image.
`transformers` would put one newline after an image of a single tile, but its processor never makes one.

Sizes and pinpoints are (height, width).

Shapes: S side of a tile, p patches a side, P = p^2, n tiles with overview.
"""

import math

import torch
from PIL import Image
from torch import Tensor

from model.views import Preprocessing, Size, View, normalise


def anyres(image: Image.Image, pinpoints: tuple[Size, ...], how: Preprocessing, patches: int) -> View:
    """RGB image -> n tiles and the rows of their n * patches features."""
    size = image.height, image.width
    canvas = best_resolution(size, pinpoints)
    return View(tiles(image, canvas, how), image_rows(size, pinpoints, how.size, patches))


def image_rows(size: Size, pinpoints: tuple[Size, ...], side: int, patches: int) -> Tensor:
    """What `merge` gives for an image of `size` in tiles of `side` pixels: (image tokens,)."""
    canvas = best_resolution(size, pinpoints)
    return merge(size, (canvas[0] // side, canvas[1] // side), math.isqrt(patches))


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The pinpoint that keeps most of the image's pixels and wastes least; the first of equals."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def tiles(image: Image.Image, canvas: Size, how: Preprocessing) -> Tensor:
    """RGB image -> (n, 3, S, S) fp32: the overview, then the tiles of the canvas row by row."""
    side = how.size
    height, width = _fit((image.height, image.width), canvas)
    large = Image.new("RGB", canvas[::-1])  # black
    large.paste(_resize(image, (height, width), how), ((canvas[1] - width) // 2, (canvas[0] - height) // 2))
    corners = [(x, y) for y in range(0, canvas[0], side) for x in range(0, canvas[1], side)]
    cut = [large.crop((x, y, x + side, y + side)) for x, y in corners]
    return torch.stack([normalise(tile, how) for tile in (_resize(image, (side, side), how), *cut)])


def merge(size: Size, grid: Size, p: int) -> Tensor:
    """Which patch features an image of `size` shows, in order: (image tokens,) long, -1 for the newline.

    Args:
        grid: tiles (down, across), each of p x p patches.
    """
    (down, across), P = grid, p * p
    places = P + torch.arange(down * across * P).view(down, across, p, p).transpose(1, 2)  # (down, p, across, p)
    places = places.reshape(down * p, across * p)  # index of the feature at each place of the large map
    top, left = _margins(size, tuple(places.shape))
    places = places[top : len(places) - top, left : places.shape[1] - left]
    newline = torch.full((len(places), 1), -1)
    return torch.cat([torch.arange(P), torch.cat([places, newline], 1).flatten()])


def _fit(size: Size, canvas: Size) -> Size:
    """Size of the image when it fills the canvas in one direction; the other side is rounded up."""
    by_height, by_width = canvas[0] / size[0], canvas[1] / size[1]
    if by_width < by_height:
        return min(math.ceil(size[0] * by_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * by_height), canvas[1])


def _margins(size: Size, places: Size) -> Size:
    """Rows above (and below) and columns on the left (and right) of the large map that show only black."""
    if size[1] / size[0] > places[1] / places[0]:
        shown = int(round(size[0] * (places[1] / size[1]), 7))
        return (places[0] - shown) // 2, 0
    shown = int(round(size[1] * (places[0] / size[0]), 7))
    return 0, (places[1] - shown) // 2


def _resize(image: Image.Image, size: Size, how: Preprocessing) -> Image.Image:
    return image.resize(size[::-1], how.resample)
