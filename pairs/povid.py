"""POVID's pairs: a corrupted response and a noisy image.

Zhou et al. 2024, "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning" (POVID),
arXiv 2402.11411. Given a good response y_w to x about v:

    1. y_l   y_w with invented objects, relations and attributes: pairs/corrupt.py (the paper asks GPT-4V)
    2. v_l   v after t steps of forward diffusion (data/corrupt.py): the model falls back on its priors

    symbol     argument     meaning
    y_w, y_l   pairs        pair records with `chosen` and `rejected`
    v_l        folder       PNG files in here, named by the records' `rejected_image`
    t          noise_step   diffusion step, 0 to 999
               overflow     of noise beyond black and white: clamp it, or wrap around
               seed         of the noise; each record has its own, whatever the order

Departures
- The paper's second stage takes from v_l only tokens: at each position of y_w the one that is most likely
  under v_l, scored under v. Here v_l is kept in the record, for any loss that reads `rejected_image`.
- Released code lets the noisy bytes wrap around: overflow="wrap". The default clamps.
- Each image's noise is drawn once, from a seed; the released code draws again in every epoch.
"""

from collections import Counter
from pathlib import Path
from typing import Literal

from data.corrupt import add_noise, sample_seed
from data.derived import store
from data.images import open_image


def noise_pairs(pairs: list[dict], folder: Path, root: Path | None = None, models: dict | None = None, *,
                noise_step: int = 500, overflow: Literal["clamp", "wrap"] = "clamp",
                seed: int = 0) -> tuple[list[dict], Counter]:
    """Add a noisy image as rejected image to text pairs; none is dropped."""
    made = []
    for pair in pairs:
        noisy = add_noise(open_image(pair["image"], root), noise_step, sample_seed(pair["id"], seed), overflow)
        made.append({**pair, "rejected_image": store(noisy, folder, f"{pair['id']}.noise", root),
                     "source": {"method": "povid", **(models or {}), "step": noise_step, "overflow": overflow,
                                "seed": seed, "text": pair.get("source")}})
    return made, Counter()
