"""Captions, questions and POPE questions of the scene world, from templates and the exact ground truth.

Captions have two to six sentences of four kinds (opening, position, pair, relation to the object named
before) and name objects from large to small. `noise` is the source of hallucination: with that probability
a caption names one absent object, drawn by how typical it is of the place, mostly at the end, where
captions of real models drift to the prior (LURE, arXiv:2310.00754). Questions follow POPE
(arXiv:2305.10355): yes and no are balanced exactly.

All texts draw from rng.random() only, and every word is one of about 200; none but the class words of
data/places.py is a CHAIR synonym. Probabilities are reconstructed.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data.places import CATEGORIES, CELL, IRREGULAR, PLACES, REMARKS, SIDE, WORDS, Object, Scene, pick

CAPTION_PROMPT = "Describe the image in detail."
COUNT_WORDS = ("one", "two", "three")

GRID = SIDE // CELL
SIZE_OF_CELLS = {1: "small", 2: "", 3: "large"}
OMITTED = .04                                               # share of classes (but the first) left out
SIZE_SPOKEN = .75                                           # share of small and large objects said to be so
ON = ("beach", "farm", "savanna", "street")                 # "on a beach", but "in a park"
LAST = .70                                                  # share of absent objects that come last


@dataclass(frozen=True)
class _Group:
    """All objects of one class as the caption names them; `objects` is empty for an imagined one."""
    category: str
    count: int
    size: str                                               # "small", "large" or "" if neither or mixed
    positions: tuple[str, ...]                              # true position phrases, "on the left" ...
    objects: tuple[Object, ...]


def plural(word: str) -> str:
    """Plural of a class word: "dog" -> "dogs", "knife" -> "knives"."""
    return IRREGULAR.get(word, word + "s")


FORMS = {form: category for category, words in WORDS.items() for word in words for form in (word, plural(word))}


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def horizontal(item: Object) -> str:
    """Third of the image in which the centre lies."""
    centre = item.column + item.size / 2
    return ("on the left", "in the middle", "on the right")[int(3 * centre / GRID)]


def vertical(item: Object) -> str:
    """Whether the centre lies in the top or the bottom third, "" in between."""
    centre = item.row + item.size / 2
    return "at the top" if centre < GRID / 3 else "at the bottom" if centre > 2 * GRID / 3 else ""


def thirds(item: Object) -> list[str]:
    """Where the centre of an object lies: "left", "middle" or "right", then "top", "bottom" or nothing."""
    return [phrase.split()[-1] for phrase in (horizontal(item), vertical(item)) if phrase]


def relation(item: Object, other: Object) -> str:
    """Where `item` is, seen from `other`: "next to" across at most one cell, else by the longer axis."""
    gap = [max(getattr(a, axis) - getattr(b, axis) - b.size for a, b in ((item, other), (other, item)))
           for axis in ("column", "row")]
    if max(gap) <= 1:
        return "next to"
    across = 2 * (item.column - other.column) + item.size - other.size
    down = 2 * (item.row - other.row) + item.size - other.size
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


def _groups(scene: Scene) -> list[_Group]:
    """Objects by class, salient first: by the largest size, then by number, then from the left."""
    groups = []
    for category in CATEGORIES:
        items = tuple(item for item in scene.objects if item.category == category)
        if items:
            sizes = {SIZE_OF_CELLS[item.size] for item in items}
            sides = {horizontal(item) for item in items}
            positions = tuple(sides) if len(sides) == 1 else ()
            if len(items) == 1 and vertical(items[0]):
                positions += (vertical(items[0]),)
            size = sizes.pop() if len(sizes) == 1 else ""
            groups.append(_Group(category, len(items), size, positions, items))
    return sorted(groups, key=lambda g: (-max(o.size for o in g.objects), -g.count, g.objects[0].column))


def _absent(scene: Scene) -> tuple[list[str], list[float]]:
    """Classes that belong to the place but are not in the image, and how typical they are."""
    present = {item.category for item in scene.objects}
    table = {category: p for category, p in PLACES[scene.place].items() if category not in present}
    return list(table), list(table.values())


def _imagined(scene: Scene, rng: random.Random) -> _Group:
    """One absent object with an invented size and position."""
    return _Group(pick(rng, *_absent(scene)), 1, pick(rng, ("small", "", "large")),
                  (pick(rng, ("on the left", "in the middle", "on the right")),), ())


def _noun(group: _Group, rng: random.Random) -> str:
    """ "a large dog", "two small cats"."""
    word = pick(rng, WORDS[group.category], (2, 1)[:len(WORDS[group.category])])
    spoken = group.size and rng.random() < SIZE_SPOKEN
    phrase = (f"{group.size} " if spoken else "") + (word if group.count == 1 else plural(word))
    return _article(phrase) if group.count == 1 else f"{COUNT_WORDS[group.count - 1]} {phrase}"


def _be(group: _Group) -> str:
    return "is" if group.count == 1 else "are"


def _opening(place: str, groups: list[_Group], rng: random.Random) -> tuple[str, int]:
    """First sentence and the number of groups it names."""
    kind, where = pick(rng, ("bare", "one", "two"), (.40, .40, .20)), "on" if place in ON else "in"
    if kind == "bare":
        return pick(rng, (f"This is {_article(place)}.", f"The photo was taken {where} {_article(place)}.",
                          f"The image shows {_article(place)}.")), 0
    named = groups[:2] if kind == "two" else groups[:1]
    nouns = " and ".join(_noun(group, rng) for group in named)
    return pick(rng, (f"The image shows {_article(place)} with {nouns}.",
                      f"This is {_article(place)} with {nouns}.",
                      f"{where} this {place} there {_be(named[0])} {nouns}.")), len(named)


def _position(group: _Group, rng: random.Random) -> str:
    """Sentence of kind "A large dog is on the left."; groups without a common position are just there."""
    noun, be = _noun(group, rng), _be(group)
    if not group.positions:
        return pick(rng, (f"There {be} {noun} in the scene.", f"You can see {noun} in the image."))
    position = pick(rng, group.positions, (3, 1)[:len(group.positions)]) + pick(rng, ("", " of the image"))
    return pick(rng, (f"{noun} {be} {position}.", f"{position} there {be} {noun}.",
                      f"There {be} {noun} {position}.", f"{noun} can be seen {position}."))


def _pair(first: _Group, second: _Group, rng: random.Random) -> str:
    nouns = f"{_noun(first, rng)} and {_noun(second, rng)}"
    return pick(rng, (f"There {_be(first)} {nouns} in the scene.", f"You can see {nouns}.",
                      f"The scene has {nouns}."))


def _related(group: _Group, previous: _Group, rng: random.Random) -> str:
    """Sentence of kind "Next to it there is a cup."; `previous` is a single object."""
    if group.objects and previous.objects:
        where = relation(group.objects[0], previous.objects[0])
    else:
        where = pick(rng, ("next to", "to the left of", "to the right of"))
    noun = _noun(group, rng)
    return pick(rng, (f"{where} it there is {noun}.", f"{noun} is {where} it."))


def _body(groups: Sequence[_Group], previous: _Group | None, rng: random.Random, room: int) -> list[str]:
    """Sentences for the groups after the opening, at most `room`; `previous` is what "it" can mean."""
    sentences, left = [], list(groups)
    while left:
        group, tight = left.pop(0), len(left) + 1 > room - len(sentences)
        if left and (tight or rng.random() < .15):
            sentences.append(_pair(group, left.pop(0), rng))
            previous = None
        elif previous and previous.count == group.count == 1 and rng.random() < .40:
            sentences.append(_related(group, previous, rng))
            previous = group
        else:
            sentences.append(_position(group, rng))
            previous = group
    return sentences


def caption(scene: Scene, rng: random.Random, noise: float = 0.0) -> str:
    """Several sentences about the scene; with probability `noise` one of them names one absent object."""
    first, *rest = _groups(scene)
    groups = [first] + [group for group in rest if rng.random() >= OMITTED]
    if rng.random() < noise:
        last = rng.random() < LAST
        groups.insert(len(groups) if last else int(rng.random() * len(groups)), _imagined(scene, rng))
    opening, named = _opening(scene.place, groups, rng)
    remark = len(groups) == named or rng.random() < .50
    previous = groups[0] if named == 1 else None
    sentences = [opening] + _body(groups[named:], previous, rng, room=5 - remark)
    if remark:
        sentences.append(pick(rng, REMARKS[scene.place]))
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def exist_question(category: str) -> str:
    """ "Is there a dog in the image?" """
    return f"Is there {_article(category)} in the image?"


def _exist(scene: Scene, rng: random.Random, pairs: int) -> list[tuple[str, str, str]]:
    """`pairs` present and as many absent classes; of the absent, 60 % typical of the place, the rest any."""
    present = [group.category for group in _groups(scene)]
    absent = [category for category in CATEGORIES if category not in present]
    typical, weights = _absent(scene)
    rows = []
    for _ in range(min(pairs, len(present))):
        rows.append((exist_question(present.pop(int(rng.random() * len(present)))), "Yes", "exist"))
        category = pick(rng, typical, weights) if typical and rng.random() < .60 else pick(rng, absent)
        rows.append((exist_question(category), "No", "exist"))
        absent.remove(category)
        if category in typical:
            del weights[typical.index(category)]
            typical.remove(category)
    return rows


def _where(scene: Scene, rng: random.Random, wanted: int) -> list[tuple[str, str, str]]:
    single = [group for group in _groups(scene) if group.count == 1]
    rows = []
    for _ in range(min(wanted, len(single))):
        group = single.pop(int(rng.random() * len(single)))
        rows.append((f"Where is the {group.category}?", group.positions[0].capitalize() + ".", "where"))
    return rows


def _count(scene: Scene, rng: random.Random) -> tuple[str, str, str]:
    """Half of the time about a class with several objects, where there is one."""
    groups = _groups(scene)
    several = [group for group in groups if group.count > 1]
    group = pick(rng, several if several and rng.random() < .5 else groups)
    answer = COUNT_WORDS[group.count - 1].capitalize() + "."
    return f"How many {plural(group.category)} are there?", answer, "count"


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(question, answer, kind) for a row, 6.4 on average: exist 70 %, where 18 %, count 7 %, place 5 %.

    "Yes" and "No" are equally many in every list, and no question occurs twice.
    """
    rows = _exist(scene, rng, pairs=2 + (rng.random() < .32))
    rows += _where(scene, rng, wanted=1 + (rng.random() < .17))
    if rng.random() < .45:
        rows.append(_count(scene, rng))
    if rng.random() < .32:
        rows.append(("What place is this?", _article(scene.place).capitalize() + ".", "place"))
    return sorted(rows, key=lambda row: rng.random())


def _take(rng: random.Random, items: Sequence[str], k: int) -> list[str]:
    return sorted(items, key=lambda item: rng.random())[:k]


def pope_questions(scenes: Sequence[Scene], rng: random.Random) -> list[dict]:
    """POPE's three splits over the given scenes: rows {seed, category, split, label}, label "yes" or "no".

    Each scene asks for up to three present classes (the same in all splits) and as many absent ones:
    "random" draws them uniformly, "popular" takes the most frequent classes of these scenes, "adversarial"
    those that most often occur together with the present ones. Ties are broken by the order of CATEGORIES.
    """
    presence = [{item.category for item in scene.objects} for scene in scenes]
    frequency = Counter(category for present in presence for category in present)
    together = Counter((a, b) for present in presence for a in present for b in present)
    rows = []
    for scene, present in zip(scenes, presence):
        positives = _take(rng, [category for category in CATEGORIES if category in present], 3)
        absent = [category for category in CATEGORIES if category not in present]
        negatives = {
            "random": _take(rng, absent, len(positives)),
            "popular": sorted(absent, key=lambda c: -frequency[c]),
            "adversarial": sorted(absent, key=lambda c: -sum(together[c, p] for p in present)),
        }
        for split, names in negatives.items():
            labelled = [(c, "yes") for c in positives] + [(c, "no") for c in names[:len(positives)]]
            rows += [{"seed": scene.seed, "category": category, "split": split, "label": label}
                     for category, label in labelled]
    return rows
