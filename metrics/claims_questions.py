"""Questions about scenes: is an object there, how many are there, where is it? The scene world's AMBER, on answers.

Over the questions of a kind, the answers being those of the scene's own record:

    accuracy = #{right answers} / #{questions}          chance = 1 / #{labels}

| kind      | question                        | labels, each equally often | right where the first label word is      |
|-----------|---------------------------------|----------------------------|------------------------------------------|
| existence | "Is there a dog in the image?"  | yes, no                    | the label                                |
| count     | "How many dogs are there?"      | one, two, three            | the label                                |
| position  | "Where is the dog?"             | left, middle, right        | the label, or a true "top" or "bottom"   |

These are the kinds of question that model/tiny was trained on (data/scene_text.py). It never saw a yes/no question
about numbers or places, or one about sizes or two objects: its answers to those would say nothing. Of an absent object,
60 % are typical of the place. Two control rows tell looking from guessing, as for POPE:

    other_picture   all the questions with their labels, asked about the next scene of the same place: the accuracy
                    that remains can be had without looking at the objects
    removed         the questions of existence whose label is "yes", after the object was taken out of the image:
                    every label is "no"

Options
    scenes  number of held-out scenes, from the first of the split
    split   held-out scenes: test or dev
    seed    of the draw of the questions

Reconstructed after AMBER (arXiv:2311.07397) and POPE (arXiv:2305.10355).
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from data.places import CATEGORIES, PLACES, pick
from data.scene_text import COUNT_WORDS, exist_question, plural, thirds
from data.scenes import held_out, parse_reference, reference
from metrics.benchmark import CONTROLS, Benchmark, lines
from metrics.chair import percent, ratio
from metrics.claims import Record, read_record
from metrics.pope import same_place

LABELS = {"existence": ("yes", "no"), "count": COUNT_WORDS, "position": ("left", "middle", "right")}
WORDS = {**LABELS, "position": (*LABELS["position"], "top", "bottom")}  # what an answer can say
TYPICAL = 0.6


def questions(data: Path | None = None, images: Path | None = None, *, scenes: int = 300,
              split: Literal["test", "dev"] = "test", seed: int = 0) -> list[dict]:  # fmt: skip
    """Rows of `id`, `image`, `prompt`, `part` (a kind or a control row), `kind`, `label`, and `right` (words), at most
    `scenes` of a kind. data and images are None: everything follows from the seeds."""
    rng = random.Random(seed)
    candidates = [row for number in held_out(split, scenes) for row in _candidates(number, rng)]
    asked = [row for kind in LABELS for row in _balanced(candidates, kind, scenes, rng)]
    return asked + [_elsewhere(row) for row in asked] + [_removed(row) for row in asked if row["label"] == "yes"]


def _candidates(seed: int, rng: random.Random) -> list[dict]:
    """All that can be asked about a scene, and the existence of one present and one absent object."""
    record = read_record(reference(seed))
    rows = [_row(seed, "existence", pick(rng, tuple(record.objects)), "yes"),
            _row(seed, "existence", _absent(record, rng), "no")]  # fmt: skip
    for name, items in record.objects.items():
        rows.append(_row(seed, "count", name, COUNT_WORDS[len(items) - 1]))
        if len(items) == 1:
            rows.append(_row(seed, "position", name, *thirds(items[0])))
    return rows


def _absent(record: Record, rng: random.Random) -> str:
    typical = {name: p for name, p in PLACES[record.place].items() if name not in record.objects}
    if typical and rng.random() < TYPICAL:
        return pick(rng, tuple(typical), tuple(typical.values()))
    return pick(rng, [name for name in CATEGORIES if name not in record.objects])


def _row(seed: int, kind: str, category: str, *right: str) -> dict:
    text = {"existence": exist_question(category), "count": f"How many {plural(category)} are there?",
            "position": f"Where is the {category}?"}[kind]  # fmt: skip
    return {"id": f"{kind}-{reference(seed)}-{category}", "image": reference(seed), "prompt": text, "part": kind,
            "kind": kind, "category": category, "label": right[0], "right": list(right)}  # fmt: skip


def _balanced(rows: Sequence[dict], kind: str, most: int, rng: random.Random) -> list[dict]:
    """Equally many rows of each label, drawn at random: as many as the rarest one has, at most `most` in all."""
    by_label = [[row for row in rows if (row["kind"], row["label"]) == (kind, label)] for label in LABELS[kind]]
    each = min(most // len(by_label), *map(len, by_label))
    return [row for same in by_label for row in rng.sample(same, each)]


def _elsewhere(row: dict) -> dict:
    """The same question about another image of the same place."""
    other = reference(same_place(_seed(row["image"])))
    return {**row, "id": f"other_picture-{row['id']}", "image": other, "part": "other_picture"}


def _removed(row: dict) -> dict:
    """The same question after the object was taken out of the image."""
    without = reference(_seed(row["image"]), (row["category"],))
    return {**row, "id": f"removed-{row['id']}", "image": without, "part": "removed", "label": "no", "right": ["no"]}


def _seed(image: str) -> int:
    return parse_reference(image)[0].seed


def read_answer(text: str, kind: str) -> str:
    """The first word of an answer that this kind of question can be answered with; "" for none."""
    return next((word for word in re.findall(r"[a-z]+", text.lower()) if word in WORDS[kind]), "")


def score(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    """Scores of answers (id -> text): n, right, other (no label word), accuracy and chance of each kind and control
    row, and `said`, how often each label word was; `kinds` is the mean of the kinds, each counting the same."""
    scores = {part: _part([row for row in rows if row["part"] == part], said)
              for part in dict.fromkeys(row["part"] for row in rows)}  # fmt: skip
    kinds = [scores[kind] for kind in LABELS if kind in scores]
    mean = {name: ratio(sum(kind[name] for kind in kinds), len(kinds)) for name in ("accuracy", "chance")}
    return {**scores, "kinds": {**mean, "rounded": percent({"accuracy": mean["accuracy"]})}}


def _part(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    words = [read_answer(said[row["id"]], row["kind"]) for row in rows]
    right = sum(word in row["right"] for word, row in zip(words, rows))
    figures = {"accuracy": ratio(right, len(rows))}
    return {"n": len(rows), "right": right, "other": words.count(""), "said": dict(sorted(Counter(words).items())),
            **figures, "chance": ratio(sum(1 / len(LABELS[row["kind"]]) for row in rows), len(rows)),
            "rounded": percent(figures)}  # fmt: skip


def table(scores: Mapping) -> list[tuple]:
    """A line for each kind, their mean, and the control rows, in percent."""
    columns = ("accuracy", "chance", "n", "right", "other")
    parts = [(name, scores[name]) for name in (*LABELS, "kinds", *CONTROLS) if name in scores]
    return [("", *columns), *lines(parts, columns, 1)]


BENCHMARK = Benchmark(
    rules="questions about scenes, labels balanced: existence, count, position (metrics/claims_questions.py)",
    questions=questions, score=score, table=table, max_new_tokens=8,
    figures={**{kind: f"{kind}.rounded.accuracy" for kind in LABELS}, "mean": "kinds.rounded.accuracy"},
)  # fmt: skip
