"""RAM's tags, GroundingDINO's boxes, SAM's masks: the eyes of AdaViP (Lu et al. 2025, arXiv 2504.15619, Eq. 5-7).

    t_1 .. t_n = RAM(v)                 tags (Eq. 5), those that name an object
    b_i        = GroundingDINO(v, t_i)  boxes (Eq. 6)
    m_i        = SAM(v, b_i)            masks (Eq. 7)

A tag may also be a place, an action or a look ("kitchen", "stand", "red"), which nothing can remove. The paper does not
say which tags it keeps: here it is those whose word is in data/entities.txt, reconstructed; objects_only=False keeps
all. Its thresholds are not given either. That a file is missing is said at once, but each network is loaded when it is
first needed.
"""

from functools import cache
from pathlib import Path

import torch
from PIL import Image

from common import refuse
from data.detect import Detect, Detection
from data.mentions import load_entities
from networks import dino, ram, sam

FILES = {"ram": ram.PUBLISHED, "ram_tags": f"ram_tag_list.txt ({ram.LISTS})", "dino": dino.PUBLISHED,
         "dino_tokenizer": dino.TOKENIZER, "sam": sam.PUBLISHED}


def ram_dino_sam(files: dict[str, Path | None], *, tag_threshold: float = 0.68, box_threshold: float = 0.35,
                 overlap: float = 0.7, objects_only: bool = True, device: torch.device | str = "cpu") -> Detect:
    """Detector (data/detect.py): one detection a box, its label the tag, its score GroundingDINO's.

    Args:
        files: "ram", "ram_tags", "dino", "dino_tokenizer", "sam" and, if there is one, "ram_thresholds".
        tag_threshold: of all tags where no file has a threshold for each.
        box_threshold: least score of a box.
        overlap: boxes of one tag that share more count as one.
        objects_only: pass over tags that name no object.
    Raises BadInput naming every file that is missing, with what it is and where it is published.
    """
    refuse(f"{files.get(name) or '--' + name.replace('_', '-')}: not found; wanted is {what}"
           for name, what in FILES.items() if not (files.get(name) and Path(files[name]).is_file()))
    names, thresholds = ram.read_tags(files["ram_tags"], files.get("ram_thresholds"), tag_threshold)
    entities = load_entities()
    tagger = cache(lambda: ram.load_ram(files["ram"], len(names), device))
    finder = cache(lambda: dino.load_dino(files["dino"], files["dino_tokenizer"], device))
    cutter = cache(lambda: sam.load_sam(files["sam"], device))

    def detect(reference: str, image: Image.Image) -> list[Detection]:
        image = image.convert("RGB")
        found = tagger().tags(image, names, thresholds)
        tags = [tag for tag, _ in found if not objects_only or tag.lower() in entities]
        boxes = finder().boxes(image, tags, threshold=box_threshold, overlap=overlap) if tags else []
        if not boxes:
            return []
        masks = cutter().masks(image, torch.tensor([box for *_, box in boxes]))
        return [Detection(tag, score, box, mask) for (tag, score, box), mask in zip(boxes, masks) if mask.any()]

    return detect
