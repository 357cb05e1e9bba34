"""The scene world: seeded 96 x 96 images with exact ground truth, so that nothing has to be downloaded.

A scene is one of eight places with two to seven objects (emoji art, data/sprites) on an 8 x 8 grid of
12-pixel cells, the patches of the small ViT. Everything follows from the seed, and objects never overlap,
so an image with one class removed (`render(scene, without=("dog",))`) is exactly the scene in which that
class never existed: the counterfactual image which AdaViP (arXiv:2504.15619) makes with a detector, a
segmenter and an inpainter.

| reference                 | image                                     |
| scene:7                   | the image of sample_scene(7)              |
| scene:7?without=cat,dog   | the same image without any cat or dog     |

All sizes, probabilities and rules of the world are reconstructed: the tables are in data/places.py,
captions and questions (re-exported here) in data/scene_text.py.
"""

import functools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from common import BadInput
from data.places import BULKY, CATEGORIES, CELL, IN_THE_SKY, PAIR_RULES, PLACES, SIDE, Object, Scene, background, pick
from data.scene_text import CAPTION_PROMPT, WORDS, caption, exist_question, plural, pope_questions, questions  # noqa: F401

TRAIN, PAIRS, DEV, TEST = 0, 1_000_000, 2_000_000, 3_000_000      # first seed of each part
MAX_DIGITS = 18                                                   # of a seed in a reference
GRID = SIDE // CELL
MAX_OBJECTS = 7
COUNT_WEIGHTS = (.75, .18, .07)                                   # one, two, three objects of a class
SIZE_WEIGHTS = {True: (.10, .45, .45), False: (.35, .45, .20)}    # bulky or not: one, two, three cells
HORIZON = 5                                                       # lowest row edge a ground object reaches
COVERED = .15                                                     # share of pixels that labels a patch
SPRITES = Path(__file__).resolve().parent / "sprites"


@functools.cache
def _tiles() -> dict[tuple[str, int, int], np.ndarray]:
    """(category, variant, size in cells) -> RGBA tile, (12 * size, 12 * size, 4) int32."""
    index = json.loads((SPRITES / "index.json").read_text())
    tiles = {}
    for size in (1, 2, 3):
        side = size * CELL
        atlas = np.array(Image.open(SPRITES / f"atlas_{side}.png").convert("RGBA"), dtype=np.int32)
        variants: dict[str, int] = {}
        for number, (category, *_) in enumerate(index["tiles"]):
            top, left = number // index["columns"] * side, number % index["columns"] * side
            variant = variants[category] = variants.get(category, -1) + 1
            tiles[category, variant, size] = atlas[top:top + side, left:left + side]
    return tiles


@functools.cache
def _variants() -> dict[str, int]:
    """Class -> number of its sprites."""
    return {category: sum(key[0] == category and key[2] == 1 for key in _tiles()) for category in CATEGORIES}


def _sample_classes(rng: random.Random, place: str) -> list[str]:
    """Two to seven classes: independent inclusion by the place's table, raised by the pair rules."""
    table = PLACES[place]
    chosen: list[str] = []
    for category, probability in table.items():
        rules = [p for a, b, p in PAIR_RULES if b == category and a in chosen]
        if rng.random() < max([probability, *rules]):
            chosen.append(category)
    while len(chosen) < 2:
        rest = [category for category in table if category not in chosen]
        chosen.append(pick(rng, rest, [table[category] for category in rest]))
    while len(chosen) > MAX_OBJECTS:
        chosen.remove(pick(rng, chosen))
    return chosen


def _free_corners(taken: np.ndarray, size: int, sky: bool) -> list[tuple[int, int]]:
    """Upper left cells (column, row) where a size x size object fits on its side of the horizon."""
    return [(column, row) for row in range(GRID - size + 1) for column in range(GRID - size + 1)
            if (row + size < HORIZON) == sky and not taken[row:row + size, column:column + size].any()]


def _arrange(rng: random.Random, classes: list[str]) -> tuple[Object, ...]:
    """Put objects on the grid, largest first; one that does not fit is made smaller."""
    wanted = [(pick(rng, (1, 2, 3), SIZE_WEIGHTS[category in BULKY]), category) for category in classes]
    taken = np.zeros((GRID, GRID), bool)
    objects = []
    for size, category in sorted(wanted, key=lambda pair: -pair[0]):
        corners: list[tuple[int, int]] = []
        while size and not (corners := _free_corners(taken, size, category in IN_THE_SKY)):
            size -= 1
        if corners:
            column, row = pick(rng, corners)
            taken[row:row + size, column:column + size] = True
            objects.append(Object(category, int(rng.random() * _variants()[category]), column, row, size))
    return tuple(objects)


def sample_scene(seed: int) -> Scene:
    """The scene of a seed >= 0; the same on every machine and Python version."""
    rng = random.Random(seed)
    place = pick(rng, tuple(PLACES))
    classes = _sample_classes(rng, place)
    for category in tuple(classes):
        extra = min(pick(rng, (0, 1, 2), COUNT_WEIGHTS), MAX_OBJECTS - len(classes))
        classes += [category] * extra
    return Scene(seed, place, _arrange(rng, classes))


def _check_categories(names: Iterable[str], where: str) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in CATEGORIES]
    if unknown:
        raise BadInput(f"{where}: unknown class {unknown[0]!r}, known: {', '.join(CATEGORIES)}")
    return tuple(category for category in CATEGORIES if category in names)


def render(scene: Scene, without: Iterable[str] = ()) -> Image.Image:
    """The image (RGB, 96 x 96), leaving out all objects of the classes in `without`; about 1 ms."""
    without = _check_categories(without, f"scene {scene.seed}, without")
    pixels = background(scene.place, scene.seed).astype(np.int32)                               # (96, 96, 3)
    for item in scene.objects:
        if item.category not in without:
            tile = _tiles()[item.category, item.sprite, item.size]
            top, left, side = item.row * CELL, item.column * CELL, item.size * CELL
            window = pixels[top:top + side, left:left + side]                                   # a view
            alpha = tile[..., 3:]
            window[:] = (window * (255 - alpha) + tile[..., :3] * alpha + 127) // 255
    return Image.fromarray(pixels.astype(np.uint8))


def objects_present(scene: Scene, without: Iterable[str] = ()) -> set[str]:
    """Classes of the objects in the image."""
    return {item.category for item in scene.objects} - set(without)


def object_masks(scene: Scene) -> list[tuple[str, np.ndarray]]:
    """(class, (96, 96) bool) for every class present: the pixels that change when it is left out."""
    full, present = np.array(render(scene)), objects_present(scene)
    return [(category, (full != np.array(render(scene, (category,)))).any(axis=-1))
            for category in CATEGORIES if category in present]


def patch_labels(scene: Scene) -> np.ndarray:
    """Class index of each 12-pixel patch, (8, 8) int64; len(CATEGORIES) is the background.

    A patch is the object's where its sprite covers 15 % of the pixels; the best covered patch always is.
    """
    labels = np.full((GRID, GRID), len(CATEGORIES), np.int64)
    for item in scene.objects:
        opaque = _tiles()[item.category, item.sprite, item.size][..., 3] > 127
        share = opaque.reshape(item.size, CELL, item.size, CELL).mean(axis=(1, 3))            # (size, size)
        window = labels[item.row:item.row + item.size, item.column:item.column + item.size]   # a view
        window[share >= min(COVERED, share.max())] = CATEGORIES.index(item.category)
    return labels


def held_out(split: str, number: int) -> range:
    """Seeds of the first scenes of the dev or test split. Raises BadInput when there are not that many."""
    if not 0 < number <= TEST - DEV:
        raise BadInput(f"--scenes {number}: a split has 1 to {TEST - DEV:,} scenes")
    first = {"dev": DEV, "test": TEST}[split]
    return range(first, first + number)


def reference(seed: int, without: Iterable[str] = ()) -> str:
    """The image reference of a scene, with the left-out classes in the order of CATEGORIES."""
    without = _check_categories(without, f"scene:{seed}")
    return f"scene:{seed}" + (f"?without={','.join(without)}" if without else "")


def parse_reference(ref: str) -> tuple[Scene, tuple[str, ...]]:
    """Scene and left-out classes of a reference; BadInput naming the reference if it is malformed."""
    head, mark, query = ref.partition("?")
    digits = head.removeprefix("scene:")
    if digits == head or not (digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS):
        raise BadInput(f"image reference {ref[:80]!r}: want scene:SEED or scene:SEED?without=CLASS,CLASS,"
                       f" the seed a whole number of at most {MAX_DIGITS} digits")
    if not mark:
        return sample_scene(int(digits)), ()
    names = query.removeprefix("without=")
    if names == query:
        raise BadInput(f"image reference {ref!r}: after '?' only without=CLASS,CLASS is known")
    return sample_scene(int(digits)), _check_categories(names.split(","), f"image reference {ref!r}")


def open_scene(ref: str) -> Image.Image:
    """The image of a reference."""
    return render(*parse_reference(ref))
