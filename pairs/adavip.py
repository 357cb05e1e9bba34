"""AdaViP's vision pairs: remove each object in turn, keep the picture that fits the chosen answer least.

Lu et al. 2025, "AdaViP: Aligning Multi-modal LLMs via Adaptive Vision-enhanced Preference Optimization",
arXiv 2504.15619, Eq. 5-9. Given a text pair (y_w, y_l | x, v), every class t_i found in v (Eq. 5: tag, Eq. 6:
box, Eq. 7: mask) is removed on its own (Eq. 8: c_i). Candidates are scored with sentences s_1 .. s_m of y_w,

    Score_i = sum_{j=1..m} CLIP(c_i, s_j)                                                           (Eq. 9)
    v_l     = the c_i of least Score_i

and (x, v_l, y_w) becomes the vision-rejected sample.

    symbol     argument                      shape
    c_i        candidates(record)            n x (label, picture reference)
    s_j        sentences(record["chosen"])   m texts
    CLIP       cosine of two embeddings      (n, m)
    Score_i    candidate_scores(...)         (n,)

Departures
- Eq. 9 prints n (the number of candidates) as upper limit; the sum runs over the m sentences.
- Sentences are split at punctuation (`sentences`); the paper has LLaMA-3 write self-contained ones.
- Eq. 5-8 stand behind one seam, `candidates`, a function from a pair record to labelled pictures. In the
  scene world it is `scene_candidates`: the scene drawn without one class, exactly. For photographs it is the
  place of RAM, GroundingDINO, SAM and LaMa: save each inpainted picture and return its path.
- The paper does not name its CLIP; any that the loader reads will do. There is no public code of the paper.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.processor import ClipProcessor
from data.scenes import objects_present, parse_reference, reference
from model.clip import CLIP
from retrieval.embed import embed_images, embed_texts

Candidates = Callable[[dict], list[tuple[str, str]]]


def scene_candidates(record: dict) -> list[tuple[str, str]]:
    """The record's scene without each of its classes: (class, reference). ValueError when it is no scene."""
    if not record["image"].startswith("scene:"):
        raise ValueError(f"{record['id']}: cannot remove objects from {record['image']!r}; only scenes are "
                         "drawn again, photographs need a `candidates` function (see pairs/adavip.py)")
    scene, without = parse_reference(record["image"])
    return [(category, reference(scene.seed, (*without, category)))
            for category in sorted(objects_present(scene, without))]


def sentences(text: str) -> list[str]:
    """Split a text behind `.`, `!` and `?`."""
    return re.split(r"(?<=[.!?])\s+", text.strip())


def candidate_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Eq. 9: unit vectors of n candidates (n, E) and m sentences (m, E) -> sums of cosines (n,)."""
    return (images @ texts.T).sum(axis=1)


def vision_pairs(pairs: list[dict], clip: CLIP, processor: ClipProcessor, *,
                 candidates: Candidates = scene_candidates, batch_size: int = 64, root: Path | None = None,
                 source: dict | None = None, progress: str = "") -> tuple[list[dict], Counter]:
    """Add a rejected image to text pairs.

    Args:
        pairs: pair records with `chosen` and `rejected`.
        candidates: gives the pictures that lack one object each.
        root: folder that relative file paths start from.
        source: what the pair records shall say about their origin.

    Returns (pair records with `rejected_image`, how many were dropped for which reason). All candidates are
    listed with their scores in `source`, so that each choice can be checked.
    """
    options = [candidates(pair) for pair in pairs]
    said = [sentences(pair["chosen"]) for pair in pairs]
    images = embed_images([image for option in options for _, image in option], clip, processor,
                          batch_size=batch_size, root=root, progress=progress)
    texts = embed_texts([sentence for lines in said for sentence in lines], clip, processor)
    made, dropped = [], Counter()
    for pair, option, lines in zip(pairs, options, said):
        own, images = np.split(images, [len(option)])
        about, texts = np.split(texts, [len(lines)])
        if not option:
            dropped["nothing to remove"] += 1
            continue
        scores = candidate_scores(own, about)
        listing = [{"removed": label, "image": image, "score": round(float(score), 4)}
                   for (label, image), score in zip(option, scores)]
        made.append({**pair, "rejected_image": option[int(scores.argmin())][1],
                     "source": {"method": "adavip", **(source or {}), "text": pair.get("source"),
                                "candidates": listing}})
    return made, dropped
