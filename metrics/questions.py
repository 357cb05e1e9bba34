"""What is asked, and what the right answer is: the questions of CHAIR and POPE.

A question is a dict:

    key       chair                             pope
    id        unique string                     unique string
    image     picture reference                 picture reference
    image_id  its id, of an instances file      -
    prompt    text for the model                text for the model
    objects   COCO classes the picture shows    -
    split     -                                 random, popular, adversarial or a control row
    label     -                                 "yes" or "no"

Scenes are known exactly. For POPE they also allow two control rows that tell looking from guessing:

    other_picture   the questions of all splits with their labels, asked about another picture of the same
                    place: the accuracy that remains can be had without looking at the objects
    removed         the questions whose answer is "yes", after the object was taken out of the picture: every
                    label is "no", so the share of "yes" (yes_ratio) should be near 0

Photographs are described by annotation files: for chair one JSON object {image id: [classes]} or an instances
file of COCO, for pope the label files of POPE (JSONL with question_id, image, text, label), each a split. How ids
and files of pictures are matched stands in data/names.py.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

from PIL import Image

from common import BadInput, brief, refuse
from data import scenes
from data.coco import read_instances
from data.names import Names, as_id
from metrics.chair import load_synonyms
from metrics.files import read_json, read_jsonl, refuse_repeats
from metrics.pope import SPLITS

CHAIR_PROMPT = scenes.CAPTION_PROMPT
POPE_PROMPT = "{question}"
CONTROLS = ("other_picture", "removed")


def chair_scenes(seeds: Iterable[int], prompt: str = CHAIR_PROMPT) -> list[dict]:
    """One question a scene."""
    rows = []
    for seed in seeds:
        ref, shown = scenes.reference(seed), scenes.objects_present(scenes.sample_scene(seed))
        rows.append({"id": ref, "image": ref, "prompt": prompt, "objects": sorted(shown)})
    return rows


def pope_scenes(seeds: Iterable[int], prompt: str = POPE_PROMPT, seed: int = 0) -> list[dict]:
    """POPE's three splits over scenes and the two control rows. `seed` draws what is asked in the splits."""
    rows, removed = [], {}
    for row in scenes.pope_questions([scenes.sample_scene(s) for s in seeds], random.Random(seed)):
        ref, category = scenes.reference(row["seed"]), row["category"]
        text = scenes.exist_question(category)
        asked = {"prompt": prompt.replace("{question}", text), "label": row["label"]}
        name = f"{row['split']}-{ref}-{category}"
        rows.append({"id": name, "image": ref, "split": row["split"], **asked})
        other = scenes.reference(_same_place(row["seed"]))
        rows.append({"id": f"other_picture-{name}", "image": other, "split": "other_picture", **asked})
        if row["label"] == "yes":  # the same ones in all splits
            key, without = f"removed-{ref}-{category}", scenes.reference(row["seed"], (category,))
            removed[key] = {"id": key, "image": without, "split": "removed", **asked, "label": "no"}
    return rows + list(removed.values())


@lru_cache(maxsize=4096)
def _same_place(seed: int) -> int:
    """The next seed whose scene is of the same place."""
    place = scenes.sample_scene(seed).place
    return next(other for other in count(seed + 1) if scenes.sample_scene(other).place == place)


def chair_photographs(
    path: Path, images: Path | None, number: int | None = None, seed: int = 0, prompt: str = CHAIR_PROMPT
) -> list[dict]:
    """Questions about all annotated images, or a random sample of `number` of them.

    path: annotation file; images: folder of the photographs, or None where no model is asked.
    Raises BadInput naming bad entries, classes that CHAIR does not know and images without a file.
    """
    rows = _sample(read_objects(path), number, seed, path)
    known = set(load_synonyms().values())
    shown = dict.fromkeys(name for row in rows for name in row["objects"])
    refuse(f"{path}: class {brief(name)} is none of the 80 that CHAIR knows" for name in shown if name not in known)
    files = _image_files(images, [row["id"] for row in rows]) if images else {}
    return [{**row, "image": files.get(row["id"], row["id"]), "prompt": prompt} for row in rows]


def read_objects(path: Path) -> list[dict]:
    """What is in pictures: rows of `id` and `objects` (classes).

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


def pope_photographs(
    paths: Sequence[Path],
    images: Path | None,
    number: int | None = None,
    seed: int = 0,
    prompt: str = POPE_PROMPT,
    asked: Mapping[tuple[str, str, str], str] | None = None,
) -> list[dict]:
    """Questions of POPE label files, one split each, or of a random sample of `number` lines of each.

    A file's split is random, popular or adversarial if its name says so, else its stem. The ids of several
    files are made unique as SPLIT-ID. `asked` (`read_asked`): LLaVA's ids, which are then used instead; of its
    splits, only those of the label files count. Raises BadInput naming bad lines and lines without their partner.
    """
    names = {path: next((name for name in SPLITS if name in path.stem), path.stem) for path in paths}
    refuse_repeats((names[path] for path in paths), "label files: split")
    refuse(f"{path}: {name!r} is the name of a control row, not of a split"
           for path, name in names.items() if name in CONTROLS)  # fmt: skip
    rows = []
    for path, split in names.items():
        labels = _read_labels(path, split)
        if asked is not None:
            labels = _rename(labels, asked, split, path)
        elif len(paths) > 1:
            labels = [{**row, "id": f"{split}-{row['id']}"} for row in labels]
        rows += _sample(labels, number, seed, path)
    if images:
        _want_folder(images)
        files = dict.fromkeys(row["image"] for row in rows)
        refuse(f"{images / name}: no such image" for name in files if not os.path.isfile(images / name))
    return [{**row, "prompt": prompt.replace("{question}", row["text"])} for row in rows]


def _read_labels(path: Path, split: str) -> list[dict]:
    """Rows of `id`, `split`, `image`, `text` and `label`."""
    lines = read_jsonl(path, ("question_id", "image", "text", "label"))
    refuse_repeats((as_id(row["question_id"]) for _, row in lines), f"{path}: question_id")
    refuse(f"{path}:{number}: label {brief(row['label'])}: want 'yes' or 'no'"
           for number, row in lines if row["label"] not in ("yes", "no"))  # fmt: skip
    return [{"id": as_id(row["question_id"]), "split": split, "label": row["label"],
             "image": as_id(row["image"]), "text": as_id(row["text"])} for _, row in lines]


def read_asked(path: Path) -> dict[tuple[str, str, str], str]:
    """LLaVA's question file: (category, image, first line of the question) -> id. BadInput naming bad lines."""
    lines = [row for _, row in read_jsonl(path, ("question_id", "image", "text", "category"))]
    rows = [{key: as_id(row[key]) for key in ("question_id", "image", "text", "category")} for row in lines]
    keys = [(row["category"], row["image"], row["text"].split("\n")[0]) for row in rows]
    refuse_repeats((row["question_id"] for row in rows), f"{path}: question_id")
    refuse_repeats((" / ".join(key) for key in keys), f"{path}: question")
    return {key: row["question_id"] for key, row in zip(keys, rows)}


def _rename(rows: list[dict], asked: Mapping[tuple[str, str, str], str], split: str, path: Path) -> list[dict]:
    """The rows of a split under LLaVA's ids."""
    ids = {key[1:]: name for key, name in asked.items() if key[0] == split}
    if not ids:
        raise BadInput(f"{path}: split {brief(split)} by its name, the question file has "
                       f"{', '.join(map(brief, sorted({key[0] for key in asked})))}")
    times = Counter((row["image"], row["text"]) for row in rows)
    refuse(f"{path}: {brief(' / '.join(key))}: {times[key]} labels, asked {int(key in ids)} times"
           for key in {**ids, **times} if times[key] != 1 or key not in ids)  # fmt: skip
    return [{**row, "id": ids[row["image"], row["text"]]} for row in rows]


def _sample(items: list, number: int | None, seed: int, path: Path) -> list:
    if number is None:
        return items
    if number > len(items):
        raise BadInput(f"{path}: has {len(items)} entries, {number} are asked for")
    return random.Random(seed).sample(items, number)


def _want_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")


def _image_files(folder: Path, keys: Sequence[str]) -> dict[str, str]:
    """Image id -> file name in the folder."""
    _want_folder(folder)
    suffixes = {"", *Image.registered_extensions()}  # there may be texts of the same names
    names = Names(folder, sorted(path.name for path in folder.iterdir() if path.suffix.lower() in suffixes))
    files = {key: names.find(key) for key in keys}
    refuse(f"{folder}: no file for image {brief(key)}" for key in keys if files[key] is None)
    return files
