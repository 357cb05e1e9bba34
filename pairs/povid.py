"""POVID's pairs: a corrupted answer and a noisy picture.

Zhou et al. 2024, "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning" (POVID),
arXiv 2402.11411. Given a good answer y_w to x about v:

    1. y_l   y_w with invented objects, relations and attributes: pairs/corrupt.py (the paper asks GPT-4V)
    2. v_l   v after t steps of forward diffusion (data/corrupt.py): the model falls back on its priors

    symbol     argument      type
    y_w, y_l   pairs         pair records with `chosen` and `rejected`
    v_l        noise_pairs   PNG file in `folder`, named by the record's `rejected_image`
    t          step          500

Departures
- The paper's second stage takes from v_l only tokens: at each position of y_w the one that is most likely
  under v_l, scored under v. Here v_l stands in the record, for any loss that reads `rejected_image`.
- Released code lets the noisy bytes wrap around: overflow="wrap". The default clamps.
- Each picture's noise is drawn once, from a seed; the released code draws anew in every epoch.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from data.corrupt import add_noise, sample_seed
from data.derived import store
from data.images import open_image


def noise_pairs(pairs: list[dict], folder: Path, *, step: int = 500, overflow: str = "clamp", seed: int = 0,
                root: Path | None = None, source: dict | None = None, progress: str = "") -> list[dict]:
    """Add a noisy picture as rejected image to text pairs.

    Args:
        pairs: pair records with `chosen` and `rejected`.
        folder: where the noisy pictures are written; their names come from the records' ids.
        step, overflow: of the noise, see data/corrupt.py.
        seed: of the noise; each record has its own, whatever the order.
        root: folder that relative file paths start from, also those of the noisy pictures.
        source: what the pair records shall say about their origin.
    """
    made = []
    for pair in tqdm(pairs, desc=progress, disable=None if progress else True, unit="picture"):
        noisy = add_noise(open_image(pair["image"], root), step, sample_seed(pair["id"], seed), overflow)
        origin = {"method": "povid", **(source or {}), "step": step, "overflow": overflow, "seed": seed,
                  "text": pair.get("source")}
        made.append({**pair, "rejected_image": store(noisy, folder, f"{pair['id']}.noise", root),
                     "source": origin})
    return made
