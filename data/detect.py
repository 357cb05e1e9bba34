"""What is in an image, and where: AdaViP's tags, boxes and masks with one interface.

A detector is a function (image reference, RGB image) -> detections:

    mask_rcnn(...)          torchvision's Mask R-CNN, the 80 classes of COCO: tag, box and mask at once
    coco_instances(FILE)    ground truth of an instances file of COCO (data/coco.py)
    scene_objects           ground truth of the scene world (data/scenes.py)

    ram_dino_sam(...)       RAM's tags, GroundingDINO's boxes, SAM's masks, as in the paper (networks/chain.py)

Another one is any function of that kind.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from common import BadInput, read_json
from data.coco import check_masks, decode_mask, read_instances, segmentation_of
from data.corrupt import to_pixels
from data.names import Names
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


def overview(image: Image.Image, detections: list[Detection]) -> Image.Image:
    """RGB image -> the same with each object's mask tinted, its box and its tag; at least one object."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image  # take a second, for the gallery alone
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    colours = [f"hsl({i * 137 % 360}, 90%, 50%)" for i in range(len(detections))]
    masks = torch.stack([found.mask for found in detections])  # (n, H, W)
    shown = draw_segmentation_masks(pil_to_tensor(image), masks, 0.5, colours)
    boxes, labels = torch.tensor([found.box for found in detections]), [found.label for found in detections]
    return to_pil_image(draw_bounding_boxes(shown, boxes, labels, colours, width=2))


def box_of(mask: Tensor) -> Box:
    """Smallest box around a mask; zeros when it is empty."""
    rows, columns = mask.nonzero().unbind(1)
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def scene_objects(reference: str, image: Image.Image) -> list[Detection]:
    """Detector of the scene world: one detection a class, its mask the pixels that its objects change."""
    scene, without = parse_reference(reference)
    masks = [(label, torch.from_numpy(mask)) for label, mask in object_masks(scene) if label not in without]
    return [Detection(label, 1.0, box_of(mask), mask) for label, mask in masks]


def mask_rcnn(weights: Path | str | None = None, *, min_score: float = 0.5, min_mask: float = 0.5,
              device: torch.device | str = "cpu") -> Detect:
    """Detector: torchvision's maskrcnn_resnet50_fpn, v2 or v1 by the names in the file.

    Args:
        weights: state dict as torchvision publishes it (torch.load with weights_only=True). None: torchvision
            downloads maskrcnn_resnet50_fpn_v2.
        min_score: reconstructed: detections that are less certain are dropped.
        min_mask: reconstructed: probability from which on a pixel belongs to the object.

    Raises BadInput naming a file that does not fit.
    """
    from torchvision.models import detection  # takes seconds, and only this function needs it

    published = detection.MaskRCNN_ResNet50_FPN_V2_Weights.DEFAULT
    if weights is None:
        model = detection.maskrcnn_resnet50_fpn_v2(weights=published)
    else:
        state = read_file(Path(weights))
        for name, tensor in state.items():
            finite(tensor, f"{weights}: tensor {name}")
        second = "backbone.fpn.inner_blocks.0.1.weight" in state  # only v2 has batch norm in its feature pyramid
        build = detection.maskrcnn_resnet50_fpn_v2 if second else detection.maskrcnn_resnet50_fpn
        model = build(weights=None, weights_backbone=None)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInput(f"{weights}: not Mask R-CNN's weights ({reason})") from None
    return torchvision_detector(model.to(device).eval(), published.meta["categories"], min_score, min_mask)


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


def coco_instances(path: Path | str, *, box_masks: bool = True) -> Detect:
    """Detector from an instances file of COCO; images are found by name, folders apart (data/names.py).

    Args:
        box_masks: reconstructed: the mask of an annotation without segmentation is its box. An object that is left
            out would still be in the image that is to lack it; a box takes some surroundings away with it.
            False: such a file is refused.

    Raises BadInput naming everything that is wrong with the file; the detector does for an image that is not in
    it, may be several, or has another size.
    """
    found = read_instances(read_json(path), path)
    check_masks(found, path, box_masks)
    ids = {image["file_name"]: key for key, image in found.images.items()}
    names = Names(path, ids, ids)

    def detect(reference: str, image: Image.Image) -> list[Detection]:
        name = names.find(reference)
        if name is None:
            raise BadInput(f"{path}: no image {PurePosixPath(reference).name}")
        entry = found.images[ids[name]]
        if image.size != (entry["width"], entry["height"]):
            raise BadInput(f"{path}: {name} is {image.width} x {image.height} pixels, the file says "
                           f"{entry['width']} x {entry['height']}")
        objects = [(label, decode_mask(segmentation_of(row), image.height, image.width))
                   for label, row in found.annotations[ids[name]]]
        return [Detection(label, 1.0, box_of(mask), mask) for label, mask in objects]

    return detect
