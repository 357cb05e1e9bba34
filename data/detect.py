"""What is in a picture, and where: AdaViP's tags, boxes and masks behind one interface.

A detector is a function (picture reference, RGB picture) -> detections. Three are here:

    mask_rcnn(...)          torchvision's Mask R-CNN, the 80 classes of COCO: tag, box and mask at once
    coco_instances(FILE)    ground truth of an instances JSON file of COCO; pictures are found by file name
    scene_objects           ground truth of the scene world (data/scenes.py)

Another one (RAM's tags, GroundingDINO's boxes, SAM's masks, as in the paper: Lu et al. 2025, arXiv
2504.15619, Eq. 5-7) is any function of that kind.

COCO stores masks as polygons or as run lengths, in columns from left to right:

    polygons     x0, y0, x1, y1, ..: the pixels whose middle lies inside (even-odd); several are united
    counts       list: lengths of runs 0, 1, 0, 1, ..
                 string: the same numbers, five bits a character (value + 48), lowest first; the sixth bit
                 says that more follow, the fifth of the last one is the sign; from the fourth number on,
                 differences to the last but one
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.corrupt import to_pixels
from data.scenes import object_masks, parse_reference
from model.tensors import finite, read_file

Box = tuple[float, float, float, float]


class Detection(NamedTuple):
    """One object: class, confidence in 0..1, left, top, right, bottom in pixels, and (H, W) bool."""

    label: str
    score: float
    box: Box
    mask: Tensor


Detect = Callable[[str, Image.Image], list[Detection]]


def box_of(mask: Tensor) -> Box:
    """Smallest box around a mask; zeros when it is empty."""
    rows, columns = mask.nonzero().unbind(1)
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


# ---------------------------------------------------------------------------------------- scene world


def scene_objects(reference: str, image: Image.Image) -> list[Detection]:
    """Detector of the scene world: one detection a class, its mask the pixels that its objects change."""
    scene, without = parse_reference(reference)
    masks = [(label, torch.from_numpy(mask)) for label, mask in object_masks(scene) if label not in without]
    return [Detection(label, 1.0, box_of(mask), mask) for label, mask in masks]


# ---------------------------------------------------------------------------------------- Mask R-CNN


def mask_rcnn(weights: Path | str | None = None, *, min_score: float = 0.5, min_mask: float = 0.5,
              device: torch.device | str = "cpu") -> Detect:
    """Detector: torchvision's maskrcnn_resnet50_fpn, v2 or v1 by the names in the file.

    Args:
        weights: state dict as torchvision publishes it (torch.load with weights_only=True). None: torchvision
            downloads maskrcnn_resnet50_fpn_v2.
        min_score: reconstructed: detections that are less certain are dropped.
        min_mask: reconstructed: probability from which on a pixel belongs to the object.

    Raises ValueError naming a file that does not fit.
    """
    from torchvision.models import detection  # takes seconds, and only this function needs it

    published = detection.MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT
    if weights is None:
        model = detection.maskrcnn_resnet50_fpn_v2(weights=published)
    else:
        state = _read_weights(Path(weights))
        # Only v2 has batch norm in its feature pyramid.
        second = "backbone.fpn.inner_blocks.0.1.weight" in state
        build = detection.maskrcnn_resnet50_fpn_v2 if second else detection.maskrcnn_resnet50_fpn
        model = build(weights=None, weights_backbone=None)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{weights}: not Mask R-CNN's weights ({reason})") from None
    return torchvision_detector(model.to(device).eval(), published.meta["categories"], min_score, min_mask)


def _read_weights(path: Path) -> dict[str, Tensor]:
    return {name: finite(tensor, f"{path}: tensor {name}") for name, tensor in read_file(path).items()}


def torchvision_detector(model: torch.nn.Module, categories: list[str], min_score: float = 0.5,
                         min_mask: float = 0.5) -> Detect:
    """Detector from a model with torchvision's detection interface; label i is categories[i]."""

    @torch.no_grad()
    def detect(reference: str, image: Image.Image) -> list[Detection]:
        device = next(model.parameters()).device
        (found,) = model([to_pixels(image).to(device)])
        masks = found["masks"][:, 0].cpu() >= min_mask  # (N, H, W)
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), masks)
        return [Detection(categories[label], score, tuple(box), mask) for label, score, box, mask in rows
                if score >= min_score]

    return detect


# ---------------------------------------------------------------------------------------- COCO ground truth


def coco_instances(path: Path | str) -> Detect:
    """Detector from an instances JSON file; ValueError when a picture is not in it, or of another size."""
    path = Path(path)
    try:
        data = json.loads(path.read_bytes())
        names = {category["id"]: category["name"] for category in data["categories"]}
        images = {image["file_name"]: image for image in data["images"]}
        annotations: dict[int, list[dict]] = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an instances file of COCO ({type(error).__name__}: {error})") from None

    def detect(reference: str, image: Image.Image) -> list[Detection]:
        name = PurePosixPath(reference).name
        entry = images.get(name) or images.get(reference)
        if entry is None:
            raise ValueError(f"{path}: no picture {name}")
        if image.size != (entry["width"], entry["height"]):
            raise ValueError(f"{path}: {name} is {image.width} x {image.height} pixels, the file says "
                             f"{entry['width']} x {entry['height']}")
        result = []
        for annotation in annotations[entry["id"]]:
            try:
                mask = decode_mask(annotation["segmentation"], image.height, image.width)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise ValueError(f"{path}: annotation {annotation.get('id')}: {error}") from None
            result.append(Detection(names[annotation["category_id"]], 1.0, box_of(mask), mask))
        return result

    return detect


def decode_mask(segmentation: list | dict, height: int, width: int) -> Tensor:
    """Polygons or run lengths -> (H, W) bool."""
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), bool)
        for polygon in segmentation:
            mask |= _polygon(np.asarray(polygon, float).reshape(-1, 2), height, width)
        return torch.from_numpy(mask)
    counts = segmentation["counts"]
    runs = _uncompress(counts) if isinstance(counts, str) else list(counts)
    if segmentation["size"] != [height, width] or sum(runs) != height * width or min(runs) < 0:
        raise ValueError(f"run lengths {segmentation['size']} of {sum(runs)} pixels for a picture of "
                         f"{height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def _polygon(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose middle is inside: going down a column, each crossed edge changes sides."""
    changes = np.zeros((height + 1, width), int)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0)):
        left, right = sorted((x0, x1))
        columns = np.arange(max(0, np.ceil(left - 0.5)), min(width, np.ceil(right - 0.5)), dtype=int)
        if len(columns):
            crossing = y0 + (columns + 0.5 - x0) * (y1 - y0) / (x1 - x0)
            changes[np.clip(np.ceil(crossing - 0.5), 0, height).astype(int), columns] += 1
    return changes[:height].cumsum(0) % 2 == 1


def _uncompress(counts: str) -> list[int]:
    """COCO's string -> run lengths."""
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    return runs
