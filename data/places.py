"""Tables of the scene world: words of each class, what is found where, and the background of each place.

Pure data plus eight small painters. The numbers are reconstructed: inclusion probabilities of .15-.85 and
pair rules give the strong scene prior from which language models guess absent objects (the co-occurrence
bias that CHAIR and POPE-adversarial measure). Every word here is checked by the tests against the CHAIR
synonym pipeline: a class word maps to its class and no other word maps to any class.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

SIDE = 96                                                   # pixels of an image side
CELL = 12                                                   # pixels of a grid cell = ViT patch

@dataclass(frozen=True)
class Object:
    """One sprite: variant `sprite` of its class, upper left cell (column, row), width and height in cells."""
    category: str
    sprite: int
    column: int
    row: int
    size: int


@dataclass(frozen=True)
class Scene:
    """What one image shows: everything follows from the seed."""

    seed: int
    place: str
    objects: tuple[Object, ...]


# COCO class -> singular forms used in texts; the first one is the class name.
WORDS: dict[str, tuple[str, ...]] = {
    "person": ("person",), "bicycle": ("bicycle", "bike"), "car": ("car",),
    "motorcycle": ("motorcycle", "motorbike"), "airplane": ("airplane", "plane"), "train": ("train",),
    "truck": ("truck",), "boat": ("boat",), "traffic light": ("traffic light",), "bird": ("bird",),
    "cat": ("cat",), "dog": ("dog",), "horse": ("horse",), "sheep": ("sheep",), "cow": ("cow",),
    "elephant": ("elephant",), "zebra": ("zebra",), "giraffe": ("giraffe",), "backpack": ("backpack",),
    "umbrella": ("umbrella",), "handbag": ("handbag", "purse"), "sports ball": ("sports ball", "ball"),
    "kite": ("kite",), "skateboard": ("skateboard",), "bottle": ("bottle",),
    "wine glass": ("wine glass",), "cup": ("cup",), "fork": ("fork",), "knife": ("knife",),
    "spoon": ("spoon",), "bowl": ("bowl",), "banana": ("banana",), "apple": ("apple",),
    "sandwich": ("sandwich",), "carrot": ("carrot",), "pizza": ("pizza",),
    "donut": ("donut", "doughnut"), "cake": ("cake",), "chair": ("chair",), "couch": ("couch", "sofa"),
    "potted plant": ("potted plant", "houseplant"), "tv": ("tv", "television"), "laptop": ("laptop",),
    "mouse": ("mouse",), "keyboard": ("keyboard",), "cell phone": ("cell phone", "phone"),
    "book": ("book",), "clock": ("clock",), "vase": ("vase",), "teddy bear": ("teddy bear",),
}
IRREGULAR = {"person": "people", "sheep": "sheep", "knife": "knives", "mouse": "mice", "couch": "couches",
             "wine glass": "wine glasses", "sandwich": "sandwiches"}

# Place -> class -> probability of being there (before the pair rules).
PLACES: dict[str, dict[str, float]] = {
    "kitchen": {"cup": .40, "bowl": .35, "wine glass": .20, "bottle": .25, "fork": .30, "knife": .20,
                "spoon": .20, "apple": .25, "banana": .25, "sandwich": .20, "carrot": .15, "pizza": .20,
                "cake": .15, "donut": .15, "chair": .20},
    "living room": {"couch": .60, "tv": .20, "chair": .30, "book": .30, "potted plant": .30, "vase": .25,
                    "teddy bear": .25, "cat": .35, "dog": .25, "clock": .25, "wine glass": .15,
                    "person": .20},
    "office": {"laptop": .60, "keyboard": .35, "mouse": .20, "person": .25, "cell phone": .35, "book": .30,
               "cup": .25, "chair": .30, "clock": .25, "potted plant": .25, "backpack": .15, "bottle": .15},
    "street": {"car": .65, "traffic light": .20, "truck": .30, "bicycle": .30, "motorcycle": .30,
               "person": .50, "handbag": .15, "umbrella": .20, "dog": .20, "train": .15, "airplane": .15},
    "beach": {"boat": .60, "umbrella": .45, "person": .40, "kite": .30, "bird": .20, "dog": .20,
              "sports ball": .20, "airplane": .20, "backpack": .15, "bottle": .20, "book": .15},
    "park": {"dog": .50, "bird": .35, "person": .40, "bicycle": .35, "skateboard": .30, "kite": .25,
             "sports ball": .20, "backpack": .15, "umbrella": .15, "sandwich": .15, "handbag": .15,
             "cat": .15},
    "farm": {"cow": .65, "sheep": .20, "horse": .45, "truck": .35, "dog": .35, "cat": .25, "bird": .30,
             "person": .30, "apple": .15, "carrot": .20, "train": .15},
    "savanna": {"elephant": .60, "zebra": .50, "giraffe": .20, "bird": .40, "truck": .30, "airplane": .25,
                "person": .25, "backpack": .15, "horse": .20, "cow": .20},
}
# (a, b, p): where a is present and b, listed after a, belongs to the place, b is present with probability p.
PAIR_RULES = (
    ("fork", "knife", .80), ("fork", "spoon", .60), ("wine glass", "bottle", .75), ("keyboard", "mouse", .85),
    ("laptop", "cup", .60), ("couch", "tv", .75), ("car", "traffic light", .75), ("person", "handbag", .60),
    ("person", "backpack", .50), ("boat", "bird", .60), ("kite", "sports ball", .70), ("cow", "sheep", .70),
    ("dog", "sports ball", .60), ("zebra", "giraffe", .75), ("elephant", "giraffe", .60),
)
BULKY = frozenset(("car", "airplane", "train", "truck", "boat", "horse", "cow", "elephant", "giraffe",
                   "zebra", "couch", "tv", "person", "bicycle", "motorcycle"))   # mostly two or three cells
IN_THE_SKY = frozenset(("airplane", "kite"))                            # these keep to the upper half
CATEGORIES: tuple[str, ...] = tuple(WORDS)

REMARKS = {                                                 # true in every image of the place
    "kitchen": ("The wall has white tiles.", "The counter is made of wood."),
    "living room": ("The floor is brown.", "A picture hangs on the wall."),
    "office": ("The floor is gray.", "The window is wide."),
    "street": ("The road is gray.", "Tall buildings stand behind the road."),
    "beach": ("The sea is calm.", "The sand is bright."),
    "park": ("The grass is green.", "Some trees stand behind the grass."),
    "farm": ("A red barn stands in the field.", "The field is green and brown."),
    "savanna": ("The grass is dry.", "The sun is low."),
}

Colour = tuple[int, int, int]
Item = TypeVar("Item")


def pick(rng: random.Random, items: Sequence[Item], weights: Sequence[float] | None = None) -> Item:
    """One item, drawn with the given weights, from rng.random(): the one stream Python promises to keep."""
    if weights is None:
        return items[int(rng.random() * len(items))]
    left = rng.random() * sum(weights)
    for item, weight in zip(items, weights):
        left -= weight
        if left < 0:
            return item
    return items[-1]


def _box(canvas: np.ndarray, left: int, top: int, right: int, bottom: int, colour: Colour) -> None:
    canvas[max(top, 0):max(bottom, 0), max(left, 0):max(right, 0)] = colour


def _disc(canvas: np.ndarray, column: int, row: int, radius: int, colour: Colour) -> None:
    rows, columns = np.ogrid[:SIDE, :SIDE]
    canvas[(rows - row) ** 2 + (columns - column) ** 2 <= radius ** 2] = colour


def _fade(canvas: np.ndarray, top: int, bottom: int, upper: Colour, lower: Colour) -> None:
    """Vertical gradient over rows [top, bottom), in integers so that it is exact everywhere."""
    steps = np.arange(bottom - top)[:, None]                                                   # (rows, 1)
    shades = (np.array(upper) * (bottom - top - steps) + np.array(lower) * steps) // (bottom - top)
    canvas[top:bottom] = shades[:, None]                                                      # (rows, 1, 3)


def _kitchen(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (250, 244, 222), (240, 230, 200))
    canvas[6:line:10] = (216, 206, 178)
    canvas[:line, 4 + shift::14] = (216, 206, 178)
    _fade(canvas, line, SIDE, (190, 140, 92), (160, 112, 70))
    _box(canvas, 0, line, SIDE, line + 3, (120, 80, 48))


def _living_room(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (206, 160, 150), (222, 184, 170))
    _box(canvas, 30 + shift, 8, 58 + shift, 28, (112, 72, 60))
    _box(canvas, 33 + shift, 11, 55 + shift, 25, (170, 200, 190))
    _fade(canvas, line, SIDE, (140, 96, 70), (116, 76, 54))
    _box(canvas, 0, line - 2, SIDE, line + 1, (244, 234, 224))


def _office(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (186, 200, 216), (204, 214, 226))
    _box(canvas, 12 + shift, 6, 84 + shift, 34, (236, 246, 252))
    for row in range(10, 34, 5):
        _box(canvas, 12 + shift, row, 84 + shift, row + 1, (168, 184, 200))
    _fade(canvas, line, SIDE, (128, 134, 146), (104, 110, 122))


def _street(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (196, 212, 226), (222, 228, 232))
    for number, (left, top) in enumerate(((0, 12), (20, 22), (42, 6), (62, 18), (80, 10))):
        shade = 138 + 14 * (number % 3)
        _box(canvas, left + shift, top, left + 17 + shift, line, (shade, shade - 10, shade - 4))
    _fade(canvas, line, SIDE, (98, 98, 102), (78, 78, 82))
    for left in range(shift, SIDE, 24):
        _box(canvas, left, line + 18, left + 12, line + 21, (230, 226, 200))


def _beach(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line - 16, (120, 190, 240), (190, 226, 246))
    _fade(canvas, line - 16, line, (30, 120, 180), (70, 170, 206))
    _fade(canvas, line, SIDE, (244, 222, 164), (228, 198, 132))
    _box(canvas, 0, line, SIDE, line + 2, (246, 246, 240))


def _park(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (150, 206, 244), (206, 232, 246))
    for left in (10, 44, 78):
        _box(canvas, left + shift, line - 14, left + 4 + shift, line, (112, 80, 50))
        _disc(canvas, left + 2 + shift, line - 18, 10, (62, 132, 66))
    _fade(canvas, line, SIDE, (116, 184, 84), (84, 154, 64))
    _box(canvas, 0, line + 22, SIDE, line + 30, (214, 200, 164))


def _farm(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (176, 214, 236), (232, 236, 214))
    _box(canvas, 34 + shift, line - 20, 62 + shift, line, (170, 52, 44))
    for step in range(10):
        top, inset = line - 20 - step, 2 * step
        _box(canvas, 32 + inset + shift, top, 64 - inset + shift, top + 1, (110, 40, 36))
    _fade(canvas, line, SIDE, (150, 176, 84), (128, 150, 66))
    for row in range(line + 4, SIDE, 12):
        canvas[row:row + 5] = (146, 112, 66)


def _savanna(canvas: np.ndarray, line: int, shift: int) -> None:
    _fade(canvas, 0, line, (250, 176, 92), (252, 222, 150))
    _disc(canvas, 48 + 2 * shift, line - 8, 9, (255, 244, 190))
    _fade(canvas, line, SIDE, (208, 176, 84), (176, 138, 58))
    for left in range(2 + shift, SIDE, 12):
        _box(canvas, left, line + 6, left + 1, line + 11, (140, 112, 44))
        _box(canvas, left + 5, line + 24, left + 6, line + 30, (140, 112, 44))


_PAINTERS = {"kitchen": _kitchen, "living room": _living_room, "office": _office, "street": _street,
             "beach": _beach, "park": _park, "farm": _farm, "savanna": _savanna}


def background(place: str, seed: int) -> np.ndarray:
    """The empty place, (96, 96, 3) uint8; horizon, furniture and brightness vary a little with the seed."""
    rng = random.Random(f"background {seed}")          # strings are seeded through SHA-512: stable everywhere
    line = 40 + int(rng.random() * 9)
    shift = int(rng.random() * 9) - 4
    tint = [int(rng.random() * 25) - 12 for _ in range(3)]
    canvas = np.zeros((SIDE, SIDE, 3), np.int16)
    _PAINTERS[place](canvas, line, shift)
    return np.clip(canvas + np.array(tint, np.int16), 0, 255).astype(np.uint8)
