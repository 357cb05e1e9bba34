"""AdaViP's vision pairs: remove each object in turn, keep the image that fits the chosen response least.

Lu et al. 2025, "AdaViP: Aligning Multi-modal LLMs via Adaptive Vision-enhanced Preference Optimization",
arXiv 2504.15619, Eq. 5-9. Given a text pair (y_w, y_l | x, v), every class t_i found in v (Eq. 5: tag, Eq. 6:
box, Eq. 7: mask) is removed on its own (Eq. 8: c_i). Candidates are scored with sentences s_1 .. s_m of y_w,

    Score_i = sum_{j=1..m} CLIP(c_i, s_j)                                                           (Eq. 9)
    v_l     = the c_i of least Score_i

and (x, v_l, y_w) becomes the vision-rejected sample.

    symbol     argument                      shape
    y_w, y_l   pairs                         pair records with `chosen` and `rejected`
    c_i        candidates(record)            n x (label, image)
    s_j        sentences(record["chosen"])   m texts
    CLIP       cosine of two embeddings      (n, m)
    Score_i    candidate_scores(...)         (n,)
               any_object                    choose among all objects, as the paper does, not only among those that the
                                             chosen response mentions

Departures
- Eq. 9 prints n (the number of candidates) as upper limit; the sum runs over the m sentences.
- Sentences are split at punctuation (`sentences`); the paper has LLaMA-3 write self-contained ones.
- Eq. 5-8 are `candidates`, a function from a pair record to labelled images. In the scene world it is
  `scene_candidates`: the scene drawn without one class, exactly. For any other image it is

      photo_candidates(detect, fill, folder)

      detect   Eq. 5-7   RAM, GroundingDINO, SAM as in the paper (networks/chain.py), or data/detect.py: Mask R-CNN,
                         COCO's ground truth
      fill     Eq. 8     LaMa as in the paper (data/lama.py), or data/inpaint.py, which needs no weights

- Eq. 6 gives each tag one box. Where a class has several objects, all of them are removed: with one dog of
  two gone, "a dog" would still be true. instances="best" removes only the most certain one.
- Eq. 9 may choose the removal of an object that y_w does not mention, after which y_w is as true as before (4 % of
  the scene world's pairs). Here it chooses among those that y_w mentions, and a pair without any is dropped;
  any_object=True is the paper's rule. What mentions an object (`mentions_of`) is reconstructed.
- The paper says nothing about dilating masks or about objects that fill the image: `dilation` and
  `max_area` are reconstructed.
- The paper does not name its CLIP; any that the loader reads will do. There is no public code of the paper.
"""

import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from common import BadInput
from data.corrupt import to_image, to_pixels
from data.derived import store
from data.detect import Detect, Detection
from data.images import open_image
from data.inpaint import Fill, dilate, fill
from data.mentions import find, load_entities
from data.processor import ClipProcessor
from data.scenes import objects_present, parse_reference, reference
from judges.clip import embed_sentences
from judges.scene import synonyms as chair_words
from metrics import chair
from model.clip import CLIP
from retrieval.embed import embed_images

Candidates = Callable[[dict], list[tuple[str, str]]]
object_words = cache(load_entities)


def scene_candidates(record: dict) -> list[tuple[str, str]]:
    """The record's scene without each of its classes: (class, reference). BadInput when it is no scene."""
    if not record["image"].startswith("scene:"):
        raise BadInput(f"{record['id']}: cannot remove objects from {record['image']!r}; only scenes are "
                       "drawn again, photographs need a detector (--detector)")
    scene, without = parse_reference(record["image"])
    return [(category, reference(scene.seed, (*without, category)))
            for category in sorted(objects_present(scene, without))]


def photo_candidates(detect: Detect, folder: Path, *, fill: Fill = fill, root: Path | None = None,
                     **options) -> Candidates:
    """A `candidates` for images that cannot be drawn again: find each class, cut it out, fill the hole.

    Args:
        folder: where the filled images are written, one PNG file for each image and class.
        root: folder that relative file paths start from, also those of the filled images.
        options: of `removable`.
    """

    @cache  # images repeat
    def without_objects(reference: str) -> list[tuple[str, str]]:
        image = open_image(reference, root)
        pixels = to_pixels(image)  # (3, H, W)
        return [(label, store(to_image(fill(pixels, hole)), folder, f"{reference} without {label}", root))
                for label, hole in removable(detect(reference, image), **options)]

    return lambda record: without_objects(record["image"])


def removable(detections: list[Detection], *, dilation: int = 15, max_area: float = 0.8,
              instances: str = "all") -> list[tuple[str, Tensor]]:
    """One hole for each class: (class, (H, W) bool), classes in alphabetical order.

    Args:
        dilation: reconstructed: side of the square by which masks grow, so that no rim of the object stays.
        max_area: reconstructed: classes whose holes take a larger share of the image, or all of it, are passed over.
        instances: "all" objects of a class, or the "best": that of the highest score.
    """
    if instances not in ("all", "best"):
        raise BadInput(f"instances {instances!r}: want 'all' or 'best'")
    masks: dict[str, Tensor] = {}
    for found in sorted(detections, key=lambda found: -found.score):
        if found.label not in masks:
            masks[found.label] = found.mask
        elif instances == "all":
            masks[found.label] = masks[found.label] | found.mask
    holes = [(label, dilate(mask, dilation)) for label, mask in sorted(masks.items()) if mask.any()]
    return [(label, hole) for label, hole in holes if hole.float().mean() <= max_area and not hole.all()]


def mentions_of(text: str, labels: list[str]) -> list[bool]:
    """Which classes a text mentions: by CHAIR's words for COCO's, by those of data/entities.txt, or, of a class that
    neither knows, by its own name."""
    synonyms, entities = chair_words(), object_words()
    said = {name for _, name in chair.mentions(text, synonyms)}
    said |= {entities[word] for word, *_ in find(text, entities)}
    result = []
    for label in labels:
        names = {synonyms.get(label.lower()), entities.get(label.lower())} - {None}
        named = re.search(rf"\b{re.escape(label)}\b", text, re.IGNORECASE)
        result.append(bool(names & said) if names else named is not None)
    return result


def candidate_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Eq. 9: unit vectors of n candidates (n, E) and m sentences (m, E) -> sums of cosines (n,)."""
    return (images @ texts.T).sum(axis=1)


def adavip_pairs(pairs: list[dict], clip: CLIP, clip_processor: ClipProcessor,
                 candidates: Candidates = scene_candidates, batch_size: int = 64, root: Path | None = None,
                 models: dict | None = None, *, any_object: bool = False) -> tuple[list[dict], Counter]:
    """Add a rejected image to text pairs.

    All candidates are listed with their scores in `source`, so that each choice can be checked.
    """
    options = [candidates(pair) for pair in pairs]
    # One pass of each tower for the whole chunk, then each pair has its own rows again.
    images = embed_images([image for option in options for _, image in option], clip, clip_processor,
                          batch_size=batch_size, root=root)
    images = np.split(images, np.cumsum([len(option) for option in options]))[:-1]
    texts = embed_sentences([pair["chosen"] for pair in pairs], clip, clip_processor)
    made, dropped = [], Counter()
    for pair, option, own, about in zip(pairs, options, images, texts):
        if not option:
            dropped["nothing to remove"] += 1
            continue
        scores = candidate_scores(own, about)
        mentioned = mentions_of(pair["chosen"], [label for label, _ in option])
        allowed = np.array(mentioned) | any_object
        if not allowed.any():
            dropped["no removed object is mentioned in the chosen response"] += 1
            continue
        listing = [{"removed": label, "image": image, "score": round(float(score), 4), "mentioned": is_said}
                   for (label, image), score, is_said in zip(option, scores, mentioned)]
        made.append({**pair, "rejected_image": option[int(np.where(allowed, scores, np.inf).argmin())][1],
                     "source": {"method": "adavip", **(models or {}), "text": pair.get("source"),
                                "candidates": listing}})
    return made, dropped
