"""mDPO's vision pairs: the rejected picture is a small crop of the picture itself.

Wang et al. 2024, "mDPO: Conditional Preference Optimization for Multimodal Large Language Models", arXiv
2406.11839. Given a text pair (y_w, y_l | x, v), v_c keeps less than 20 % of v, and (x, v_c, y_w) becomes the
vision-rejected sample: an answer about the whole picture should be less likely when most of it is not shown.
    symbol   argument     type
    v        image        picture reference of a pair record
    v_c      crop_pairs   PNG file in `folder`, named by the record's `rejected_image`

Departure: mDPO crops the preprocessed pixels inside the forward pass (data/corrupt.py has that `crop`; it
needs no files). Here the window is drawn on the picture itself, once per record, so that it can be looked at
and every loss that reads `rejected_image` can use it.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.corrupt import crop, sample_seed, to_image, to_pixels
from data.derived import store
from data.images import open_image


def crop_pairs(pairs: list[dict], folder: Path, *, seed: int = 0, scale: tuple[float, float] = (0.01, 0.2),
               ratio: tuple[float, float] = (3 / 4, 4 / 3), root: Path | None = None,
               source: dict | None = None, progress: str = "") -> list[dict]:
    """Add a crop as rejected image to text pairs.

    Args:
        pairs: pair records with `chosen` and `rejected`.
        folder: where the crops are written; their names come from the records' ids.
        seed: of the windows; each record has its own, whatever the order.
        scale, ratio: bounds of the window's share of the area and of its width / height.
        root: folder that relative file paths start from, also those of the crops.
        source: what the pair records shall say about their origin.
    """
    made = []
    for pair in tqdm(pairs, desc=progress, disable=None if progress else True, unit="picture"):
        pixels = to_pixels(open_image(pair["image"], root))  # (3, H, W)
        image = to_image(crop(pixels, sample_seed(pair["id"], seed), scale, ratio))
        origin = {"method": "mdpo", **(source or {}), "seed": seed, "text": pair.get("source")}
        made.append({**pair, "rejected_image": store(image, folder, f"{pair['id']}.crop", root),
                     "source": origin})
    return made
