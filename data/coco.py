"""Instances files of COCO: which objects an image shows, and where.

    images        id, file_name; for masks also width, height
    categories    id, name
    annotations   image_id, category_id; for masks also segmentation, or at least bbox: left, top, width, height

A file is checked as a whole when it is read, so that no image fails later. A segmentation is one of

    polygons      lists x0, y0, x1, y1, ..: the pixels whose middle lies inside (even-odd); several are united
    run lengths   {"size": [height, width], "counts": ..}, in columns from left to right. counts as a list: lengths
                  of runs 0, 1, 0, 1, .. As a string: the same numbers, five bits a character (value + 48), lowest
                  first; the sixth bit says that more follow, the fifth of the last one is the sign; from the
                  fourth number on, differences to the last but one
"""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import BadInput, brief, refuse
from data.names import as_id

LISTS = ("images", "categories", "annotations")
FAR = 1e9  # pixels; what lies farther away is no coordinate


class Instances(NamedTuple):
    """A checked file. Ids are texts: 7 and "7" are the same."""

    images: dict[str, dict]  # id -> entry, file names are unique
    annotations: dict[str, list[tuple[str, dict]]]  # image id -> [(class, entry)]


def read_instances(data: dict, path: Path | str) -> Instances:
    """The content of a file (`common.read_json`), but for masks. Raises BadInput naming the bad entries: lists,
    ids or names that are absent, of another type or given twice, annotations of unknown images or classes."""
    refuse(f"{path}: not an instances file of COCO: {key!r} must be a list of objects" for key in LISTS
           if not isinstance(data.get(key), list) or not set(map(type, data[key])) <= {dict})  # fmt: skip
    problems: list[str] = []
    images = _by_id(data["images"], "image", "file_name", problems)
    classes = _by_id(data["categories"], "category", "name", problems)
    names = Counter(name for image in images.values() if isinstance(name := image.get("file_name"), str))
    problems += [f"file_name {brief(name)} is given {times} times" for name, times in names.items() if times > 1]
    annotations: dict[str, list[tuple[str, dict]]] = {key: [] for key in images}
    for row in data["annotations"]:
        image, category = as_id(row.get("image_id")), as_id(row.get("category_id"))
        if image in images and category in classes:
            annotations[image].append((classes[category].get("name"), row))
        else:
            key, known = ("category_id", "categories") if image in images else ("image_id", "images")
            problems.append(f"{_named(row)}: {key} {brief(row.get(key))} is none of the {known}")
    refuse(f"{path}: {problem}" for problem in problems)
    return Instances(images, annotations)


def _by_id(rows: list[dict], kind: str, name: str, problems: list[str]) -> dict[str, dict]:
    """Id -> entry."""
    found: dict[str, dict] = {}
    for row in rows:
        key, text = as_id(row.get("id")), row.get(name)
        if key is None or key in found:
            fault = "no number or text" if key is None else "given twice"
            problems.append(f"{kind} id {brief(row.get('id'))} is {fault}")
            continue
        if not isinstance(text, str) or not text or not text.isprintable():
            problems.append(f"{kind} {brief(key)}: {name} {brief(text)} is no name")
        found[key] = row
    return found


def _named(row: dict) -> str:
    return f"annotation {brief(row['id'])}" if "id" in row else "annotation without id"


# ---------------------------------------------------------------------------------------- masks


def check_masks(found: Instances, path: Path | str, box_masks: bool = True) -> None:
    """Raises BadInput naming the images without a size and the annotations that `decode_mask` would refuse."""
    problems = []
    for key, image in found.images.items():
        height, width = size = image.get("height"), image.get("width")
        if not all(type(n) in (int, float) and n >= 1 and n % 1 == 0 for n in size):
            wrong = f"width {brief(width)}, height {brief(height)}: numbers of pixels are wanted"
            problems.append(f"image {brief(key)}: {wrong}")
            continue
        for _, row in found.annotations[key]:
            try:
                _shape(segmentation_of(row, box_masks), height, width)
            except BadInput as error:
                problems.append(f"{_named(row)}: {error}")
    refuse(f"{path}: {problem}" for problem in problems)


def segmentation_of(row: dict, box_masks: bool = True) -> object:
    """An annotation's segmentation, not yet checked.

    Args:
        box_masks: reconstructed: where there is none (the key is absent, null or an empty list), the box is the
            polygon. The mask then holds more than the object, but surely the object. False: BadInput.
    """
    segmentation = row.get("segmentation")
    if segmentation not in (None, []):
        return segmentation
    box = row.get("bbox")
    if not box_masks or not _numbers(box) or len(box) != 4 or min(box[2:]) <= 0:
        raise BadInput(f"no segmentation, bbox {brief(box)}" if box_masks else "no segmentation")
    left, top, width, height = box
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def decode_mask(segmentation: list | dict, height: int, width: int) -> Tensor:
    """Polygons or run lengths -> (H, W) bool. BadInput if it is neither, or is of another size."""
    shape = _shape(segmentation, height, width)
    if isinstance(segmentation, list):
        mask = np.zeros((height, width), bool)
        for polygon in shape:
            mask |= _polygon(np.asarray(polygon, float).reshape(-1, 2), height, width)
        return torch.from_numpy(mask)
    flat = np.repeat(np.arange(len(shape)) % 2 == 1, shape)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(width, height).T))


def _shape(segmentation: object, height: int, width: int) -> list:
    """The checked polygons, or the checked run lengths."""
    if isinstance(segmentation, dict):
        return _runs(segmentation, height, width)
    if not isinstance(segmentation, list) or not all(map(_numbers, segmentation)):
        raise BadInput(f"segmentation {brief(segmentation)}: a list of polygons or run lengths are wanted")
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise BadInput(f"polygon of {len(polygon)} numbers: x and y of three corners or more are wanted")
    return segmentation


def _numbers(value: object) -> bool:
    """Whether it is a list of coordinates."""
    return (isinstance(value, list) and set(map(type, value)) <= {int, float}
            and -FAR < min(value, default=0) and max(value, default=0) < FAR)  # fmt: skip


def _runs(segmentation: dict, height: int, width: int) -> list[int]:
    counts, size = segmentation.get("counts"), segmentation.get("size")
    runs = _uncompress(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not set(map(type, runs)) <= {int} or min(runs, default=0) < 0:
        raise BadInput(f"counts {brief(counts)}: no run lengths")
    if size != [height, width] or sum(runs) != height * width:
        raise BadInput(f"run lengths {brief(size)} of {brief(sum(runs))} pixels for an image of {height} x {width}")
    return runs


def _uncompress(counts: str) -> list[int]:
    """COCO's string -> run lengths. BadInput where it is none."""
    bits = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(bits < 32)  # where numbers end
    first = np.append(0, last[:-1] + 1)
    ended = len(bits) and 0 <= bits.min() and bits.max() < 64 and not bits[-1] & 32
    if not ended or (last - first).max() > 9:  # no image has as many pixels
        raise BadInput(f"counts {brief(counts)}: no run lengths")
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)  # within its number
    runs = np.add.reduceat((bits & 31) << 5 * place, first)
    runs -= (bits[last] & 16) << 5 * place[last] + 1  # negative
    for start in (1, 2):
        runs[start::2] = runs[start::2].cumsum()
    return runs.tolist()


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
