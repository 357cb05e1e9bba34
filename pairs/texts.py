"""The responses that pairs start from where the input brings none: samples of the policy, and chosen responses.

    records -> sample_responses -> a judge ranks them -> the best against the worst (pairs/rank.py)
                                                      -> the best alone becomes `chosen`

Where only a chosen response is wanted, a stronger model may write it instead: the author of `chosen_responses` is
`best_responses` of the policy, or another model's reply.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from judges.ask import Reply
from judges.scores import Judge, order
from model.generate import answers
from pairs.rank import Sample

Author = Callable[[list[dict]], list[Reply]]  # records -> a response to each, or why there is none


def chosen_responses(records: list[dict], author: Author) -> tuple[list[dict], Counter]:
    """Records with a `chosen` response; how many were dropped for which reason."""
    replies = author(records)
    kept = [{**record, "chosen": reply.text} for record, reply in zip(records, replies, strict=True) if reply.text]
    return kept, Counter(reply.problem or "an empty answer" for reply in replies if not reply.text)


def best_responses(records: list[dict], sample: Sample, judge: Judge) -> list[Reply]:
    """The policy as author: its best sample, by a judge."""
    samples = sample(records)
    rankings = [order(texts, verdict) if verdict is not None else []
                for texts, verdict in zip(samples, judge(records, samples), strict=True)]
    return [Reply(texts[ranking[0]]) if ranking else Reply("", "no finished answer, or no verdict")
            for texts, ranking in zip(samples, rankings)]


def sample_responses(records: list[dict], seeds: Mapping[str, int], **options) -> list[list[str]]:
    """Responses of the policy to each record, "" for one that was cut at the token limit.

    Args:
        seeds: id of a record -> seed of its samples, so that they do not depend on the other records.
        options: the other arguments of `answers`.
    """
    return answers(images=[record["image"] for record in records], prompts=[record["prompt"] for record in records],
                   seeds=[seeds[record["id"]] for record in records], finished=True, **options)
