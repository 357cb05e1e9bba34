"""Text pairs: sample several answers, let an annotator rank them, best against worst.

This is how the text half of AdaViP's data was made (RLAIF-V, Yu et al. 2024, arXiv 2405.17220): the model
answers a question about a picture n times and an annotator counts the wrong and the right claims of each
answer. The answer with the fewest wrong claims is chosen (right claims decide between equals), the one at the
other end is rejected. All answers are the model's own, so a pair differs in its claims, not in its author.

    symbol        argument     type
    x, v          record       image record with `id`, `image`, `prompt`
    y_1 .. y_n    answers      n texts
    annotator     annotator    (record, answers) -> one `Judgement` for each answer

The annotator is the seam. In the scene world it is the scene's own record: what the picture shows is known
exactly. For photographs, pass a function that asks a person or a stronger model.

Departures: RLAIF-V has claims labelled by another VLM and draws pairs at random among answers whose scores
differ; here the ends of the ranking are taken. A picture is dropped (and counted) when all its answers are
judged equal or when the worst of them claims nothing wrong: such a pair says nothing about hallucination.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from data.scenes import objects_present, parse_reference
from metrics.chair import load_synonyms, mentions


class Judgement(NamedTuple):
    """What an annotator finds in one answer."""

    wrong: int  # claims that the picture does not bear out
    right: int  # distinct claims that it does


Annotator = Callable[[dict, list[str]], list[Judgement]]
synonyms = cache(load_synonyms)


def judge_scene(record: dict, answers: list[str]) -> list[Judgement]:
    """Annotator of the scene world: mentions of absent objects (repeats count), present objects named.

    Raises ValueError when the record's picture is not a scene.
    """
    if not record["image"].startswith("scene:"):
        raise ValueError(f"{record['id']}: nobody knows what {record['image']!r} shows; to rank answers "
                         "about photographs, pass an annotator or pairs that were ranked elsewhere")
    shown = objects_present(*parse_reference(record["image"]))
    judgements = []
    for answer in answers:
        named = [name for _, name in mentions(answer, synonyms())]
        judgements.append(Judgement(sum(name not in shown for name in named), len(shown & set(named))))
    return judgements


def order(answers: list[str], judgements: list[Judgement]) -> list[int]:
    """Indices of the non-empty answers, best first; equals keep their order."""
    filled = [i for i, answer in enumerate(answers) if answer.strip()]
    return sorted(filled, key=lambda i: (judgements[i].wrong, -judgements[i].right))


def rank_pairs(records: list[dict], answers: list[list[str]], annotator: Annotator = judge_scene,
               source: dict | None = None) -> tuple[list[dict], Counter]:
    """Best against worst answer of every record.

    Args:
        records: image records.
        answers: the sampled answers of each record.
        source: what the pair records shall say about their origin (model, seed, ...).

    Returns (pair records, how many pictures were dropped for which reason).
    """
    pairs, dropped = [], Counter()
    for record, texts in zip(records, answers, strict=True):
        judgements = annotator(record, texts)
        ranking = order(texts, judgements)
        if reason := _useless([judgements[i] for i in ranking]):
            dropped[reason] += 1
            continue
        best, worst = ranking[0], ranking[-1]
        pairs.append({
            "id": record["id"], "image": record["image"], "prompt": record["prompt"],
            "chosen": texts[best], "rejected": texts[worst], "rejected_image": None,
            "source": {"method": "rank", **(source or {}), "samples": len(texts),
                       "chosen": judgements[best]._asdict(), "rejected": judgements[worst]._asdict()},
        })
    return pairs, dropped


def _useless(ranked: list[Judgement]) -> str:
    """Why these judgements, best first, give no pair; "" if they do."""
    if len(ranked) < 2:
        return "fewer than two non-empty answers"
    if ranked[-1].wrong == 0:
        return "no answer hallucinates"
    return "all answers judged equal" if ranked[0] == ranked[-1] else ""


def best_answers(records: list[dict], answers: list[list[str]],
                 annotator: Annotator = judge_scene) -> list[str]:
    """The best answer of every record; "" when all its answers are empty."""
    best = []
    for record, texts in zip(records, answers, strict=True):
        ranking = order(texts, annotator(record, texts))
        best.append(texts[ranking[0]] if ranking else "")
    return best
