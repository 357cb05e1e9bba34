"""Text pairs: sample several answers, let a judge rank them, best against worst.

This is how the text half of AdaViP's data was made (RLAIF-V, Yu et al. 2024, arXiv 2405.17220): the model
answers a question about a picture n times and an annotator counts the wrong and the right claims of each
answer. The answer with the fewest wrong claims is chosen (right claims decide between equals), the one at the
other end is rejected. All answers are the model's own, so a pair differs in its claims, not in its author.

    symbol        argument     type
    x, v          records      image records with `id`, `image`, `prompt`
    y_1 .. y_n    answers      n texts for each
    annotator     annotator    (record, answers) -> one `Judgement` for each answer
    judge         judge        (records, answers of each) -> a `Judgement` or `Score` for each answer of each

The judge is the seam, three stand ready:

    judge_scene          the scene's own record: what the picture shows is known exactly (the default)
    clip_judge           mean cosine of CLIP between the picture and the answer's sentences
    model_judge          a VLM compares every two answers (pairs/judge.py): the policy itself, another local
                         LLaVA or a server (pairs/ask.py)

or pass a function that asks a person. Answers that were cut at the token limit are unfinished and come as
"": an empty answer is never ranked.

Departures: RLAIF-V has claims labelled by another VLM and draws pairs at random among answers whose scores
differ; here the ends of the ranking are taken. A picture is dropped (and counted) when all its answers are
judged equal, when the judge came to no verdict or when the worst of the answers is known to claim nothing
wrong: such a pair says nothing about hallucination. The score of `clip_judge` is reconstructed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.processor import ClipProcessor
from data.scenes import objects_present, parse_reference
from metrics.chair import load_synonyms, mentions
from model.clip import CLIP
from pairs.adavip import sentences
from retrieval.embed import embed_images, embed_texts


class Judgement(NamedTuple):
    """What an annotator finds in one answer."""

    wrong: int  # claims that the picture does not bear out
    right: int  # distinct claims that it does

    @property
    def key(self) -> tuple[float, ...]:
        """Sorts the best first."""
        return self.wrong, -self.right

    @property
    def faultless(self) -> bool:
        """Whether the answer is known to claim nothing wrong."""
        return self.wrong == 0


class Score(NamedTuple):
    """What a judge says that only compares answers; higher is better."""

    score: float

    @property
    def key(self) -> tuple[float, ...]:
        return (-self.score,)

    @property
    def faultless(self) -> bool:
        return False


Annotator = Callable[[dict, list[str]], list[Judgement]]
Judge = Callable[[list[dict], list[list[str]]],
                 list[list[Judgement] | list[Score] | None]]  # None: no verdict
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


def one_by_one(annotator: Annotator) -> Judge:
    """A judge that asks an annotator about one record after the other."""
    return lambda records, answers: [annotator(record, texts)
                                     for record, texts in zip(records, answers, strict=True)]


def clip_judge(clip: CLIP, processor: ClipProcessor, *, batch_size: int = 64, root: Path | None = None,
               progress: str = "") -> Judge:
    """A judge by likeness: mean cosine of a CLIP model between the picture and the sentences of an answer.

    The mean, not AdaViP's sum, so that more sentences are no merit. Relative paths of pictures start at
    `root`.
    """

    def judge(records: list[dict], answers: list[list[str]]) -> list[list[Score]]:
        pictures = embed_images([record["image"] for record in records], clip, processor,
                                batch_size=batch_size, root=root, progress=progress)  # (M, E)
        said = [sentences(answer) for texts in answers for answer in texts]
        rows = embed_texts([sentence for lines in said for sentence in lines], clip, processor)
        lines = iter(np.split(rows, np.cumsum([len(each) for each in said])))
        return [[Score(round(float((next(lines) @ picture).mean()), 6)) for _ in texts]
                for picture, texts in zip(pictures, answers, strict=True)]

    return judge


def order(answers: list[str], judgements: list[Judgement] | list[Score]) -> list[int]:
    """Indices of the non-empty answers, best first; equals keep their order."""
    filled = [i for i, answer in enumerate(answers) if answer.strip()]
    return sorted(filled, key=lambda i: judgements[i].key)


def rank_pairs(records: list[dict], answers: list[list[str]], annotator: Annotator = judge_scene,
               source: dict | None = None, *, judge: Judge | None = None) -> tuple[list[dict], Counter]:
    """Best against worst answer of every record.

    Args:
        records: image records.
        answers: the sampled answers of each record, "" for an unfinished one.
        source: what the pair records shall say about their origin (model, judge, seed, ...).
        judge: takes the place of the annotator.

    Returns (pair records, how many pictures were dropped for which reason).
    """
    pairs, dropped = [], Counter()
    verdicts = (judge or one_by_one(annotator))(records, answers)
    for record, texts, judgements in zip(records, answers, verdicts, strict=True):
        if judgements is None:
            dropped["no verdict of the judge"] += 1
            continue
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


def _useless(ranked: list[Judgement] | list[Score]) -> str:
    """Why these judgements, best first, give no pair; "" if they do."""
    if len(ranked) < 2:
        return "fewer than two non-empty answers"
    if ranked[-1].faultless:
        return "no answer hallucinates"
    return "all answers judged equal" if ranked[0] == ranked[-1] else ""


def best_answers(records: list[dict], answers: list[list[str]], annotator: Annotator = judge_scene, *,
                 judge: Judge | None = None) -> list[str]:
    """The best answer of every record; "" when all its answers are empty or the judge came to no verdict."""
    best = []
    verdicts = (judge or one_by_one(annotator))(records, answers)
    for texts, judgements in zip(answers, verdicts, strict=True):
        ranking = order(texts, judgements) if judgements is not None else []
        best.append(texts[ranking[0]] if ranking else "")
    return best
