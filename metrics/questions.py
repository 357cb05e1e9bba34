"""What is asked, and what the right answer is: the questions of CHAIR and POPE.

A question is a dict:

    key       chair                             pope
    id        unique string                     unique string
    image     picture reference                 picture reference
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
file of COCO, for pope the label files of POPE (JSONL with question_id, image, text, label), each a split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path

from data import scenes
from metrics.files import read_json, read_jsonl, refuse, refuse_repeats
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
    Raises ValueError naming every bad entry and every image without a file.
    """
    table = read_objects(path)
    keys = _sample(list(table), number, seed, path)
    files = _image_files(images, keys) if images else {}
    rows = [{"id": key, "image": files.get(key, key), "prompt": prompt} for key in keys]
    return [{**row, "objects": table[row["id"]]} for row in rows]


def read_objects(path: Path) -> dict[str, list[str]]:
    """Image id -> classes, from {image id: [classes]} or an instances file of COCO (ids: its file names).

    CHAIR's published figures also count the classes that COCO's captions name as shown: an instances file alone
    is stricter. Raises ValueError naming every bad entry.
    """
    table = read_json(path)
    if isinstance(table, dict) and table.keys() >= {"images", "annotations", "categories"}:
        try:
            names = {row["id"]: row["name"] for row in table["categories"]}
            files = {row["id"]: row["file_name"] for row in table["images"]}
            shown: dict[str, dict] = {name: {} for name in files.values()}
            for row in table["annotations"]:
                shown[files[row["image_id"]]][names[row["category_id"]]] = None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an instances file of COCO ({type(error).__name__}: {error})") from None
        table = {name: list(classes) for name, classes in shown.items()}
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path}: want a filled JSON object {{image id: [classes]}}")
    refuse(
        f"{path}: image {key!r}: want a list of class names"
        for key, names in table.items()
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names)
    )
    return table


class KnownObjects:
    """What pictures show, where that is known: of scenes always, of photographs if an annotation file lists them.

    Args:
        path: as for `read_objects`. An id stands for the picture of this name, of this stem, or of the number
            at the end of its stem.
    """

    def __init__(self, path: Path | None = None):
        self.table = {key: set(names) for key, names in read_objects(path).items()} if path else {}
        self.classes = set().union(*self.table.values())  # what was looked for

    def __call__(self, reference: str) -> tuple[set[str], set[str]] | None:
        """(classes shown, classes that were looked for) of a picture reference, None where nobody knows."""
        if reference.startswith("scene:"):
            return scenes.objects_present(*scenes.parse_reference(reference)), set(scenes.CATEGORIES)
        key = next((name for name in _names(Path(reference)) if name in self.table), None)
        return None if key is None else (self.table[key], self.classes)


def pope_photographs(
    paths: Sequence[Path],
    images: Path | None,
    number: int | None = None,
    seed: int = 0,
    prompt: str = POPE_PROMPT,
    asked: Path | None = None,
) -> list[dict]:
    """Questions of POPE label files, one split each, or of a random sample of `number` lines of each.

    A file's split is random, popular or adversarial if its name says so, else its stem. The ids of several
    files are made unique as SPLIT-ID. `asked`: LLaVA's question file, whose ids are then used instead; it is
    joined by category, image and question. Raises ValueError naming every bad line and every line without its
    partner.
    """
    rows = []
    for path in paths:
        split = next((name for name in SPLITS if name in path.stem), path.stem)
        labels = [row for _, row in read_jsonl(path, ("question_id", "image", "text", "label"))]
        refuse_repeats((str(row["question_id"]) for row in labels), f"{path}: question_id")
        for row in _sample(labels, number, seed, path):
            name = str(row["question_id"]) if len(paths) == 1 else f"{split}-{row['question_id']}"
            keep = {key: str(row[key]) for key in ("image", "text", "label")}
            question = prompt.replace("{question}", keep["text"])
            rows.append({"id": name, "split": split, "prompt": question, **keep})
    refuse_repeats((row["id"] for row in rows), "label files: id")
    if images:
        names = dict.fromkeys(row["image"] for row in rows)
        refuse(f"{images / name}: no such image" for name in names if not (images / name).is_file())
    return _rename(rows, asked) if asked else rows


def _rename(rows: list[dict], asked: Path) -> list[dict]:
    """The rows under the ids of LLaVA's question file."""
    lines = read_jsonl(asked, ("question_id", "image", "text", "category"))
    keys = [(str(row["category"]), str(row["image"]), str(row["text"]).split("\n")[0]) for _, row in lines]
    ids = {key: str(row["question_id"]) for key, (_, row) in zip(keys, lines)}
    refuse_repeats((str(row["question_id"]) for _, row in lines), f"{asked}: question_id")
    refuse_repeats((" / ".join(key) for key in keys), f"{asked}: question")
    wanted = {(row["split"], row["image"], row["text"]): row for row in rows}
    refuse(
        [f"{asked}: does not ask {' / '.join(key)}" for key in wanted if key not in ids]
        + [f"{asked}:{number}: has no label" for key, (number, _) in zip(keys, lines) if key not in wanted]
    )
    return [{**row, "id": ids[key]} for key, row in wanted.items()]


def _sample(items: list, number: int | None, seed: int, path: Path) -> list:
    if number is None:
        return items
    if number > len(items):
        raise ValueError(f"{path}: has {len(items)} entries, {number} are asked for")
    return random.Random(seed).sample(items, number)


def _names(path: Path) -> tuple[str, str, str]:
    """The ids that a picture's file answers to."""
    digits = re.search(r"\d+$", path.stem)
    return path.name, path.stem, str(int(digits[0])) if digits else path.stem


def _image_files(folder: Path, keys: Sequence[str]) -> dict[str, str]:
    """Image id -> file name in the folder: the id itself, its stem, or the number at the end of its stem."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        for name in _names(path):
            files.setdefault(name, path.name)
    refuse(f"{folder}: no file for image {key!r}" for key in keys if key not in files)
    return {key: files[key] for key in keys}
