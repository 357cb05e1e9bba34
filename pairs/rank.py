"""Text pairs: sample several responses, let a judge rank them, best against worst.

This is how the text half of AdaViP's data was made (RLAIF-V, Yu et al. 2024, arXiv 2405.17220): the model
answers a question about an image n times and an annotator counts the wrong and the right claims of each
response. The response with the fewest wrong claims is chosen (right claims decide between equals), the one at the
other end is rejected. All responses are the model's own, so a pair differs in its claims, not in its author.

    symbol        argument        type
    x, v          records         `id`, `image`, `prompt`
    y_1 .. y_n    sample          records -> n texts for each, "" for an unfinished one   (pairs/texts.py)
    annotator     judge           (records, responses of each) -> a `Judgement` or `Score` of each, or None
                                  for a record without a verdict
                  clean_chosen    reconstructed: drop records whose chosen response --judge scene or chair does
                                  not find faithful

Judges are listed in judges/README.md; or pass a function that asks a person. Responses that were cut at the token
limit are unfinished and come as "": an empty response is never ranked.

Departures: RLAIF-V has claims labelled by another VLM and draws pairs at random among responses whose scores
differ; here the ends of the ranking are taken. An image is dropped (and counted) when all its responses are
judged equal, when the judge came to no verdict or when the worst of the responses is known to claim nothing
wrong: such a pair says nothing about hallucination. The score of judges/clip.py is reconstructed.
"""

from collections import Counter
from collections.abc import Callable

from data.records import pair_of
from judges.scores import Judge, Judgement, Score, order

UNFAITHFUL = "the chosen response is not faithful"

Sample = Callable[[list[dict]], list[list[str]]]  # records -> responses to each, "" for one that was cut


def rank_pairs(records: list[dict], sample: Sample, judge: Judge, source: dict | None = None, *,
               clean_chosen: bool = False) -> tuple[list[dict], Counter]:
    """Best against worst response to every record; `source` goes into the pair records."""
    pairs, dropped = [], Counter()
    samples = sample(records)
    for record, texts, verdict in zip(records, samples, judge(records, samples), strict=True):
        if verdict is None:
            dropped["no verdict of the judge"] += 1
            continue
        ranking = order(texts, verdict)
        if reason := _useless([verdict[i] for i in ranking], clean_chosen):
            dropped[reason] += 1
            continue
        best, worst = ranking[0], ranking[-1]
        origin = {"method": "rank", **(source or {}), "samples": len(texts), "chosen": verdict[best]._asdict(),
                  "rejected": verdict[worst]._asdict()}
        pairs.append(pair_of(record, origin, chosen=texts[best], rejected=texts[worst]))
    return pairs, dropped


def _useless(ranked: list[Judgement] | list[Score], clean_chosen: bool) -> str:
    """Why these judgements, best first, give no pair; "" if they do."""
    if len(ranked) < 2:
        return "fewer than two non-empty responses"
    if ranked[-1].faultless:
        return "no response hallucinates"
    if clean_chosen and not ranked[0].faultless:
        return UNFAITHFUL
    return "all responses judged equal" if ranked[0] == ranked[-1] else ""
