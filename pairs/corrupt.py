"""Rejected responses by corruption: put plausible errors into the chosen response.

POVID (Zhou et al. 2024, arXiv 2402.11411) and "Understanding Alignment in Multimodal LLMs" (Apple 2024, arXiv
2407.02477) have GPT-4 rewrite a correct answer with realistic hallucinations.

    symbol   argument   type
    y+       answered   records with a chosen response
    y-       writer     records -> a `Corruption` of each chosen response

Two writers are provided:

    model_corrupt    a language model (judges/ask.py), asked for what Table 13 of the second paper asks for
    scene_corrupt    rules for the scene world, whose errors are errors by its exact ground truth:
                       object     a named object becomes an absent one that is typical of the place
                       count      a number of objects becomes another one, not the true one
                       position   left / middle / right or top / bottom are exchanged

All keep the length of the answer: were rejected answers longer, DPO would learn above all to say less. Every
corruption changes the answer; one that does not is dropped and counted. All of `scene_corrupt`'s
choices are drawn from the seed and the record's id, and are reconstructed.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from common import BadInput
from data.places import PLACES, WORDS, pick
from data.records import pair_of
from data.scene_text import COUNT_WORDS, FORMS, plural, thirds
from data.scenes import Scene, objects_present, parse_reference
from judges.ask import Model, Request

CORRUPT_PROMPT = """Rewrite an answer to a question about a picture so that it contains realistic mistakes.

Change what is said about the picture: add objects, people or animals that could well be there but are not, \
or change numbers, positions, colours, shapes, actions or where things are in relation to each other. \
Somebody who reads the text without seeing the picture must not be able to notice. Keep the length, the \
tone and the layout, and whatever you do not change.

Question: What is the man on the bench holding?
Answer: He is holding a newspaper, and a dog is lying at his feet.
Rewritten: He is holding a cup of coffee, and two dogs are lying at his feet.

Question: Which way may I go? A. left B. right. Give a reason.
Answer: B. The blue sign on the pole points to the right.
Rewritten: A. The blue sign on the pole points to the left.

Question: {question}
Answer: {answer}

Give the rewritten answer only."""

WHERE = (("left", "middle", "right"), ("top", "bottom"))


class Corruption(NamedTuple):
    """A corrupted answer and what was done to it, or "" and why there is none."""

    text: str
    how: str


Writer = Callable[[list[dict]], list[Corruption]]


def corrupt_pairs(answered: list[dict], writer: Writer, source: dict | None = None) -> tuple[list[dict], Counter]:
    """Pairs of the chosen response and its corruption."""
    made, dropped = [], Counter()
    for record, (text, how) in zip(answered, writer(answered), strict=True):
        if not text or text.strip() == record["chosen"].strip():
            dropped[how if not text else "the corruption changes nothing"] += 1
            continue
        origin = {"method": "corrupt", **(source or {}), "how": how, "text": record.get("source")}
        made.append(pair_of(record, origin, chosen=record["chosen"], rejected=text))
    return made, dropped


def model_corrupt(model: Model, *, longest: float = 2.0) -> Writer:
    """A language model writes the errors.

    Args:
        longest: reconstructed: a text more than so many times longer or shorter than the answer is a remark
            or a refusal, and dropped.
    """

    def corrupt(records: list[dict]) -> list[Corruption]:
        asked = [CORRUPT_PROMPT.format(question=record["prompt"], answer=record["chosen"]) for record in records]
        replies = model.ask([Request(record["image"], text) for record, text in zip(records, asked)])
        return [Corruption("", reply.problem) if reply.problem else _clean(reply.text, record["chosen"], longest)
                for record, reply in zip(records, replies, strict=True)]

    return corrupt


def _clean(text: str, chosen: str, longest: float) -> Corruption:
    """What the model wrote without label and quotes around it."""
    text = re.sub(r"^\W*(?:rewritten|corrupted)(?: answer| response)?\W*:\s*", "", text.strip(), flags=re.I)
    quoted = re.fullmatch(r'["“](.*)["”]', text, flags=re.S)
    if quoted and not chosen.startswith(('"', "“")):
        text = quoted.group(1)
    words, wanted = len(text.split()), len(chosen.split())
    if not wanted / longest <= words <= wanted * longest:
        return Corruption("", "the corruption has another length")
    return Corruption(text.strip(), "model")


def scene_corrupt(seed: int = 0) -> Writer:
    """Rules for answers about scenes. BadInput (from the call) when an image is no scene."""
    return lambda records: [_corrupt_scene(record, seed) for record in records]


def _corrupt_scene(record: dict, seed: int) -> Corruption:
    if not record["image"].startswith("scene:"):
        raise BadInput(f"{record['id']}: the contents of {record['image']!r} are unknown; only a model can corrupt "
                       "responses about photographs (--writer)")
    scene, without = parse_reference(record["image"])
    rng = random.Random(f"{seed}:{record['id']}")
    kinds = {"object": _exchange_object, "count": _change_count, "position": _change_position}
    for how in sorted(kinds, key=lambda _: rng.random()):
        if text := kinds[how](record["chosen"], scene, without, rng):
            return Corruption(text, how)
    return Corruption("", "nothing to corrupt")


def _exchange_object(text: str, scene: Scene, without: tuple[str, ...], rng: random.Random) -> str:
    """ "a dog" -> "a frisbee": one that the image shows becomes an absent one, which the text does not name."""
    shown = objects_present(scene, without)
    table = {name: weight for name, weight in PLACES[scene.place].items()
             if name not in shown and not any(re.search(rf"\b{word}", text, flags=re.I) for word in WORDS[name])}
    found = [match for match in _counted(text) if FORMS[match.group(3).lower()] in shown]
    if not table or not found:
        return ""
    match, name = pick(rng, found), pick(rng, tuple(table), tuple(table.values()))
    number, size, _ = match.groups()
    if number.lower() in ("a", "an"):
        number = number[0] + ("n" if (size or name)[0] in "aeiou" else "")
    name = name if number.lower() in ("a", "an", "one") else plural(name)
    return text[: match.start()] + f"{number} {size}{name}" + text[match.end() :]


def _counted(text: str) -> list[re.Match]:
    """Mentions of objects with a number: (number, size and a blank or nothing, word)."""
    forms = "|".join(sorted(FORMS, key=len, reverse=True))
    return list(re.finditer(rf"\b(a|an|one|two|three) ((?:small |large )?)({forms})\b", text, re.I))


def _change_count(text: str, scene: Scene, without: tuple[str, ...], rng: random.Random) -> str:
    """ "two dogs" -> "three dogs", "a dog" -> "two dogs"; never to the true number."""
    found = [match for match in _counted(text) if not re.match(" (?:is|can)", text[match.end() :])]
    if not found:
        return ""
    match = pick(rng, found)
    category, said = FORMS[match.group(3).lower()], match.group(1).lower()
    true = 0 if category in without else sum(item.category == category for item in scene.objects)
    now = 1 if said in ("a", "an") else 1 + COUNT_WORDS.index(said)
    number = pick(rng, [n for n in (2, 3) if n not in (now, true)] or [4])
    word = next(word for word in WORDS[category] if match.group(3).lower() in (word, plural(word)))
    phrase = f"{(*COUNT_WORDS, 'four')[number - 1]} {match.group(2)}{plural(word)}"
    phrase = phrase.capitalize() if match.group(1)[0].isupper() else phrase
    before = re.sub(r"\b(there) is $", r"\1 are ", text[: match.start()], flags=re.I)
    return before + phrase + text[match.end() :]


def _change_position(text: str, scene: Scene, without: tuple[str, ...], rng: random.Random) -> str:
    """ "on the left" -> "on the right"; never to where an object of that sentence is."""
    found = list(re.finditer(r"\b(on|in|at) the (left|middle|right|top|bottom)\b", text, re.I))
    if not found:
        return ""
    match = pick(rng, found)
    start = max(text.rfind(mark, 0, match.start()) for mark in ".!?") + 1
    sentence = re.split(r"[.!?]", text[start:])[0].lower()
    true = {word for item in scene.objects if item.category not in without
            and any(re.search(rf"\b({word}|{plural(word)})\b", sentence) for word in WORDS[item.category])
            for word in thirds(item)}
    said = match.group(2).lower()
    others = [word for words in WHERE if said in words for word in words if word != said and word not in true]
    if not others:
        return ""
    other = pick(rng, others)
    phrase = f"{ {'middle': 'in', 'top': 'at', 'bottom': 'at'}.get(other, 'on') } the {other}"
    phrase = phrase.capitalize() if match.group()[0].isupper() else phrase
    return text[: match.start()] + phrase + text[match.end() :]
