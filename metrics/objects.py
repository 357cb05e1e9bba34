"""What images show: annotation files, samples of them, and their image files.

An annotation file is one JSON object {image id: [classes]} or an instances file of COCO. How ids and names of image
files are matched: data/names.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from common import BadInput, brief, refuse
from data.coco import read_instances
from data.names import Names
from metrics.files import read_json


def read_objects(path: Path) -> list[dict]:
    """What images show: rows of `id` and `objects` (classes).

    path: {image id: [classes]}, or an instances file of COCO, where `id` is the file name and a row has `image_id`.


    CHAIR's published figures also count the classes that COCO's captions name as shown: an instances file alone
    is stricter. Raises BadInput naming bad entries.
    """
    table = read_json(path)
    if not isinstance(table, dict) or not table:
        raise BadInput(f"{path}: want a filled JSON object {{image id: [classes]}}, or an instances file of COCO")
    if {"images", "annotations"} <= table.keys():
        found = read_instances(table, path)
        if not found.images:
            raise BadInput(f"{path}: lists no images")
        return [{"id": image["file_name"], "image_id": key,
                 "objects": list(dict.fromkeys(name for name, _ in found.annotations[key]))}
                for key, image in found.images.items()]  # fmt: skip
    refuse(
        f"{path}: image {brief(key)}: want a list of class names"
        for key, names in table.items()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names)
    )
    return [{"id": key, "objects": names} for key, names in table.items()]


def sample(items: list, number: int | None, seed: int, path: Path) -> list:
    """`number` of the entries of a file, drawn with `seed`; all where it is None."""
    if number is None:
        return items
    if number > len(items):
        raise BadInput(f"{path}: has {len(items)} entries, {number} are asked for")
    return random.Random(seed).sample(items, number)


def image_files(folder: Path, keys: Sequence[str]) -> dict[str, str]:
    """Image id -> file name in the folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    suffixes = {"", *Image.registered_extensions()}  # there may be texts of the same names
    names = Names(folder, sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes))
    files = {key: names.find(key) for key in keys}
    refuse(f"{folder}: no file for image {brief(key)}" for key in keys if files[key] is None)
    return files
