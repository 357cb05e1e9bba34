"""mDPO's vision pairs: the rejected image is a small crop of the image itself.

Wang et al. 2024, "mDPO: Conditional Preference Optimization for Multimodal Large Language Models", arXiv
2406.11839. Given a text pair (y_w, y_l | x, v), v_c keeps less than 20 % of v, and (x, v_c, y_w) becomes the
vision-rejected sample: a response about the whole image should be less likely when most of it is not shown.

    symbol      argument   meaning
    y_w, y_l    pairs      pair records with `chosen` and `rejected`
    v_c         folder     PNG files in here, named by the records' `rejected_image`
                seed       of the windows; each record has its own, whatever the order

Departure: mDPO crops the preprocessed pixels inside the forward pass (data/corrupt.py has that `crop`; it
needs no files). Here the window is drawn on the image itself, once per record, so that it can be looked at
and every loss that reads `rejected_image` can use it.
"""

from collections import Counter
from pathlib import Path

from data.corrupt import crop, sample_seed, to_image, to_pixels
from data.derived import store
from data.images import open_image

SCALE, RATIO = (0.01, 0.2), (3 / 4, 4 / 3)  # bounds of the share of the area, and of width / height


def crop_pairs(pairs: list[dict], folder: Path, root: Path | None = None, models: dict | None = None, *,
               seed: int = 0) -> tuple[list[dict], Counter]:
    """Add a crop as rejected image to text pairs; none is dropped."""
    made = []
    for pair in pairs:
        pixels = to_pixels(open_image(pair["image"], root))  # (3, H, W)
        image = to_image(crop(pixels, sample_seed(pair["id"], seed), SCALE, RATIO))
        made.append({**pair, "rejected_image": store(image, folder, f"{pair['id']}.crop", root),
                     "source": {"method": "mdpo", **(models or {}), "seed": seed, "text": pair.get("source")}})
    return made, Counter()
