"""What images show: annotation files, captions files, and samples of them.

An annotation file is one JSON object {image id: [classes]} or an instances file of COCO. How ids and names of image
files are matched: data/names.py.
"""

import random
from pathlib import Path

from common import BadInput, read_json
from data.coco import read_instances
from metrics.files import each, field, read_list, read_table, texts


def read_objects(path: Path) -> list[dict]:
    """What images show: rows of `id` and `objects` (classes). Raises BadInput naming bad entries.

    path: {image id: [classes]}, or an instances file of COCO, where `id` is the file name and a row has `image_id`.
    """
    table = read_json(path)
    if {"images", "annotations"} <= table.keys():
        found = read_instances(table, path)
        if not found.images:
            raise BadInput(f"{path}: lists no images")
        return [{"id": image["file_name"], "image_id": key,
                 "objects": list(dict.fromkeys(name for name, _ in found.annotations[key]))}
                for key, image in found.images.items()]  # fmt: skip
    return each(read_table(path), lambda item: {"id": item[0], "objects": texts(dict([item]), item[0])})


def read_captions(path: Path) -> dict[str, list[str]]:
    """Image id -> its reference captions, of a captions file of COCO. Raises BadInput naming bad entries."""
    notes = each(read_list(path, "annotations"), lambda note: (field(note, "image_id", int), field(note, "caption")))
    found: dict[str, list[str]] = {}
    for image, caption in notes:
        found.setdefault(str(image), []).append(caption)
    return found


def sample(items: list, number: int | None, seed: int, path: Path) -> list:
    """`number` of the entries of a file, drawn with `seed`; all where it is None."""
    if number is None:
        return items
    if number > len(items):
        raise BadInput(f"{path}: has {len(items)} entries, {number} are asked for")
    return random.Random(seed).sample(items, number)
