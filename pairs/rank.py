"""Text pairs: sample several answers, let a judge rank them, best against worst.

This is how the text half of AdaViP's data was made (RLAIF-V, Yu et al. 2024, arXiv 2405.17220): the model
answers a question about a picture n times and an annotator counts the wrong and the right claims of each
answer. The answer with the fewest wrong claims is chosen (right claims decide between equals), the one at the
other end is rejected. All answers are the model's own, so a pair differs in its claims, not in its author.

    symbol        argument     type
    x, v          records      image records with `id`, `image`, `prompt`
    y_1 .. y_n    answers      n texts for each
    annotator     annotator    (record, answers) -> one `Judgement` for each answer (judges/scores.py)
    judge         judge        (records, answers of each) -> a `Judgement` or `Score` for each answer of each

The judge is the seam (judges/scores.py):

    judges/scene.py      the scene's own record: what the picture shows is known exactly (the default)
    judges/clip.py       mean cosine of CLIP between the picture and the answer's sentences
    judges/compare.py    a VLM compares every two answers: the policy itself, another local LLaVA or a server
                         (judges/ask.py)
    judges/reward.py     a reward model

or pass a function that asks a person. Answers that were cut at the token limit are unfinished and come as
"": an empty answer is never ranked.

Departures: RLAIF-V has claims labelled by another VLM and draws pairs at random among answers whose scores
differ; here the ends of the ranking are taken. A picture is dropped (and counted) when all its answers are
judged equal, when the judge came to no verdict or when the worst of the answers is known to claim nothing
wrong: such a pair says nothing about hallucination. The score of judges/clip.py is reconstructed.
"""

from __future__ import annotations

from collections import Counter

from judges.scene import judge_scene
from judges.scores import Annotator, Judge, Judgement, Score, one_by_one, order


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
