"""Claims: is each thing that a caption says about a scene true? The scene world's AMBER, on captions.

A caption is read claim by claim against the scene's own record. Over the claims C_k of kind k, and the classes F_k of
which there is something to say (below), pooled over captions:

    hallucinated_k = #{false claims in C_k} / #C_k       coverage_k = #{classes in F_k with a true claim} / #F_k
    repetition     = 1 - #{different n-grams of a caption} / #{n-grams of a caption}

| kind      | group     | claim                          | false where                        | F_k: classes ...       |
|-----------|-----------|--------------------------------|------------------------------------|------------------------|
| existence | existence | "a dog"                        | the image shows none               | shown                  |
| count     | attribute | "two dogs", "a dog"            | it shows another number            | shown                  |
| size      | attribute | "a large dog"                  | fewer are large                    | all small or all large |
| position  | relation  | "a dog is on the left"         | fewer are there                    | with one place         |
| pair      | relation  | "next to it there is a dog"    | it is elsewhere, seen from `it`    | shown                  |
| place     | place     | "a kitchen", and its remarks   | it is another place                | the place              |

What is said about a class that the image does not show is one false claim of existence and no other; so is nothing
said of a pair where the thing named before (`it`) is not shown. Sentences are read by their nouns: words around them
do not matter, a position belongs to the noun before it in the sentence, else to the one after it. A sentence without
any claim is counted as `unread`.

Options
    scenes  number of held-out scenes, from the first of the split
    split   held-out scenes: test or dev
    prompt  what the model is asked
    n       length of the n-grams of `repetition`, in words

All of it is this world's own: reconstructed after AMBER (arXiv:2311.07397). Captions without noise make no false
claim and leave nothing unread; every error that pairs/corrupt.py writes is a false claim (tests/test_claims.py).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from data import scenes
from data.places import REMARKS
from data.scene_text import FORMS, SIZE_OF_CELLS, relation, thirds
from data.scenes import held_out, reference
from data.sentences import sentences
from metrics.benchmark import Benchmark, lines
from metrics.chair import percent, ratio

GROUPS = {"existence": ("existence",), "attribute": ("count", "size"), "count": ("count",), "size": ("size",),
          "relation": ("position", "pair"), "position": ("position",), "pair": ("pair",), "place": ("place",),
          "all": ("existence", "count", "size", "position", "pair", "place")}  # fmt: skip
FRACTIONS = {"hallucinated": ("false", "claims"), "coverage": ("covered", "sayable")}  # name -> part, whole
WHOLE = {"hal": ("hallucinating", "n"), "unread": ("unread_sentences", "sentences"),
         "repetition": ("repeated", "n_grams")}  # fmt: skip
NUMBERS = {"a": 1, "an": 1, **{word: n for n, word in enumerate("one two three four five six seven".split(), start=1)}}


def _any(words) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


NOUN = re.compile(rf"\b(?:({_any(NUMBERS)}) )?(?:(small|large) )?({_any(FORMS)})\b")
POSITION = re.compile(r"\b(?:on|in|at) the (left|middle|right|top|bottom)\b")
PAIR = re.compile(r"\b(next to|to the left of|to the right of|above|below) it\b")
PLACE = re.compile(rf"\b({_any(scenes.PLACES)})\b")
REMARK = {remark.lower(): place for place, remarks in REMARKS.items() for remark in remarks}


class Claim(NamedTuple):
    """One thing that a caption says: `what` of the objects of a class, or of the place."""

    kind: str
    category: str | None  # None: the place
    what: object  # None, a number, "large", "left", (relation, class of `it`), place
    number: int  # of the objects it is said of


class Record(NamedTuple):
    """What an image shows: its place, and the objects of each class."""

    place: str
    objects: dict[str, list[scenes.Object]]


def read_record(image: str) -> Record:
    """The record of a scene, with the removed classes left out."""
    scene, without = scenes.parse_reference(image)
    shown = sorted(scenes.objects_present(scene, without))
    return Record(scene.place, {name: [item for item in scene.objects if item.category == name] for name in shown})


def read(text: str) -> tuple[list[Claim], int]:
    """The claims of a caption in order, and how many of its sentences make none."""
    claims, unread, it = [], 0, None
    for sentence in filter(None, sentences(text)):
        found, it = _read_sentence(sentence.lower(), it)
        claims += found
        unread += not found
    return claims, unread


def _read_sentence(sentence: str, it: str | None) -> tuple[list[Claim], str | None]:
    """Claims of a sentence in lower case, and the class it names last; `it` is the one named before."""
    places = [REMARK[sentence]] if sentence in REMARK else PLACE.findall(sentence)
    claims = [Claim("place", None, place, 1) for place in places]
    nouns = list(NOUN.finditer(sentence))
    if not nouns:
        return claims, it
    for noun in nouns:
        claims += _about(noun)
    for found in POSITION.finditer(sentence):
        noun = next((noun for noun in reversed(nouns) if noun.start() < found.start()), nouns[0])
        claims.append(Claim("position", FORMS[noun[3]], found[1], NUMBERS.get(noun[1], 1)))
    if it and (pair := PAIR.search(sentence)):
        claims.append(Claim("pair", FORMS[nouns[0][3]], (pair[1], it), 1))
    return claims, FORMS[nouns[-1][3]]


def _about(noun: re.Match) -> Iterator[Claim]:
    """What "two large dogs" says."""
    number, category = NUMBERS.get(noun[1]), FORMS[noun[3]]
    yield Claim("existence", category, None, 1)
    if number:
        yield Claim("count", category, number, number)
    if noun[2]:
        yield Claim("size", category, noun[2], number or 1)


def is_true(claim: Claim, record: Record) -> bool | None:
    """None where nothing can be true or false: of an object that is not shown only its existence is."""
    items = record.objects.get(claim.category, [])
    if claim.kind == "place":
        return claim.what == record.place
    if claim.kind == "existence":
        return bool(items)
    if not items:
        return None
    if claim.kind == "count":
        return len(items) == claim.what
    if claim.kind == "pair":
        how, others = claim.what[0], record.objects.get(claim.what[1])
        return any(relation(a, b) == how for a in items for b in others if a is not b) if others else None
    return sum(claim.what in _facts(item) for item in items) >= min(claim.number, len(items))


def _facts(item: scenes.Object) -> set[str]:
    """Size and position words that are true of an object."""
    return {SIZE_OF_CELLS[item.size], *thirds(item)} - {""}


def sayable(record: Record) -> set[tuple[str, str | None]]:
    """(kind, class) of all there is to say about an image; (place, None)."""
    facts = {("place", None)}
    for name, items in record.objects.items():
        facts |= {("existence", name), ("count", name), ("pair", name)}
        common = set.intersection(*map(_facts, items))
        facts |= {("size" if word in SIZE_OF_CELLS.values() else "position", name) for word in common}
    return facts


def questions(data: Path | None = None, images: Path | None = None, *, scenes: int = 300,
              split: Literal["test", "dev"] = "test", prompt: str = scenes.CAPTION_PROMPT) -> list[dict]:  # fmt: skip
    """One row a scene: `id`, `image`, `prompt`. data and images are None: everything follows from the seeds."""
    names = [reference(seed) for seed in held_out(split, scenes)]
    return [{"id": name, "image": name, "prompt": prompt} for name in names]


def score(rows: Sequence[dict], said: Mapping[str, str], *, n: int = 4) -> dict:
    """Scores of captions (id -> text): for each kind and group of kinds the counts and the fractions hallucinated and
    coverage; captions with a false claim, sentences without any claim, and repeated n-grams; `rounded` is percent."""
    counts, total = {kind: Counter() for kind in GROUPS["all"]}, Counter(n=len(rows))
    for row in rows:
        text = said[row["id"]]
        total.update(_repeated(text.lower().split(), n))
        total.update(_judge(text, read_record(row["image"]), counts))
    pooled = {group: sum((counts[kind] for kind in kinds), Counter()) for group, kinds in GROUPS.items()}
    return {"n": len(rows), "n_gram": n, **{group: _figures(count, FRACTIONS) for group, count in pooled.items()},
            "captions": _figures(total, WHOLE)}


def _judge(text: str, record: Record, counts: Mapping[str, Counter]) -> dict[str, int]:
    """Adds a caption's claims to the counts of their kinds; what there is to count of the caption itself."""
    claims, unread = read(text)
    judged = [(claim, truth) for claim in claims if (truth := is_true(claim, record)) is not None]
    facts, covered = sayable(record), {(claim.kind, claim.category) for claim, truth in judged if truth}
    for claim, truth in judged:
        counts[claim.kind].update(["claims"] if truth else ["claims", "false"])
    for fact in facts:
        counts[fact[0]].update(["sayable", "covered"] if fact in covered else ["sayable"])
    return {"hallucinating": not all(truth for _, truth in judged), "unread_sentences": unread,
            "sentences": sum(map(bool, sentences(text)))}  # fmt: skip


def _repeated(words: Sequence[str], n: int) -> dict[str, int]:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return {"n_grams": len(grams), "repeated": len(grams) - len(set(grams))}


def _figures(count: Mapping[str, int], ratios: Mapping[str, tuple[str, str]]) -> dict:
    figures = {name: ratio(count[part], count[whole]) for name, (part, whole) in ratios.items()}
    return {key: count[key] for pair in ratios.values() for key in pair} | {**figures, "rounded": percent(figures)}


def table(scores: Mapping) -> list[tuple]:
    """A line for each kind, in percent; then one for the captions as a whole."""
    columns, whole = ("hallucinated", "coverage", "claims", "false"), []
    for name, (figure, (part, total)) in zip(("captions", "sentences", f"{scores['n_gram']}-grams"), WHOLE.items()):
        whole += lines([(f"{name}: {figure}", scores["captions"])], (figure, "", total, part), 1)
    return [("", *columns), *lines([(group, scores[group]) for group in GROUPS], columns, 1), *whole]


BENCHMARK = Benchmark(
    rules="claims of captions against the scene's record (metrics/claims.py)",
    questions=questions, score=score, table=table, max_new_tokens=96,
    figures={**{f"false {kind}": f"{kind}.rounded.hallucinated" for kind in ("existence", "attribute", "relation")},
             "false": "all.rounded.hallucinated", "coverage": "all.rounded.coverage",
             "repetition": "captions.rounded.repetition"},
    tradeoff=("coverage", "false"),
)  # fmt: skip
