"""The responses that pairs start from where the input brings none: samples of the policy, and chosen responses.

    records -> sample_responses -> a judge ranks them -> the best against the worst (pairs/rank.py)
                                                      -> the best alone becomes `chosen`

Where only a chosen response is wanted, a stronger model may write it instead: the author of `chosen_responses` is
`best_responses` of the policy, another model's reply, or the scene's own caption.

The papers' chosen responses are written by people or stronger models. The policy's best sample may still hallucinate
(one in six of the embedded model's does), and what follows then learns from it: a `referee` keeps such records out.
A rejected response that is written from the chosen one may differ in wording only: `names_another` tells.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from common import refuse
from data import scenes
from data.check import refuse_several
from data.corrupt import sample_seed
from judges.ask import Reply
from judges.scene import judge_mentions, synonyms
from judges.scores import Judge, order
from metrics.chair import mentions
from model.generate import answers
from pairs.rank import UNFAITHFUL, Sample

Author = Callable[[list[dict]], list[Reply]]  # records -> a response to each, or why there is none


def chosen_responses(records: list[dict], author: Author, referee: Judge | None = None) -> tuple[list[dict], Counter]:
    """Records with a `chosen` response, which the referee, if there is one, finds faithful; how many were dropped for
    which reason."""
    replies = author(records)
    answered = [{**record, "chosen": reply.text} for record, reply in zip(records, replies, strict=True) if reply.text]
    kept = faithful(answered, referee) if referee else answered
    dropped = Counter(reply.problem or "an empty response" for reply in replies if not reply.text)
    return kept, dropped + Counter({UNFAITHFUL: len(answered) - len(kept)})


def faithful(answered: list[dict], referee: Judge) -> list[dict]:
    """The records whose `chosen` claims nothing wrong; one without a verdict is not known to."""
    verdicts = referee(answered, [[record["chosen"]] for record in answered])
    return [record for record, verdict in zip(answered, verdicts, strict=True) if verdict and verdict[0].faultless]


def names_another(rejected: str, chosen: str) -> bool:
    """Whether it names an object, in CHAIR's words, that the chosen response does not name."""
    (found,) = judge_mentions({name for _, name in mentions(chosen, synonyms())}, [rejected])
    return found.wrong > 0


def best_responses(records: list[dict], sample: Sample, judge: Judge) -> list[Reply]:
    """The policy as author: its best sample, by a judge."""
    samples = sample(records)
    rankings = [order(texts, verdict) if verdict is not None else []
                for texts, verdict in zip(samples, judge(records, samples), strict=True)]
    return [Reply(texts[ranking[0]]) if ranking else Reply("", "no finished response, or no verdict")
            for texts, ranking in zip(samples, rankings)]


def scene_captions(records: list[dict], seed: int = 0) -> list[Reply]:
    """The scene world as author: a caption without errors, as the embedded model was trained on.

    Raises BadInput that lists the records that are no scenes or ask for something else than a description.
    """
    refuse_several(records, "--author scene")
    refuse(f"{record['id']}: --author scene describes scenes, and answers {scenes.CAPTION_PROMPT!r} only"
           for record in records
           if not record["image"].startswith("scene:") or record["prompt"] != scenes.CAPTION_PROMPT)
    return [Reply(scenes.caption(_shown(record["image"]), random.Random(sample_seed(record["id"], seed))))
            for record in records]


def _shown(reference: str) -> scenes.Scene:
    """A scene of the objects that its image shows."""
    scene, without = scenes.parse_reference(reference)
    return replace(scene, objects=tuple(item for item in scene.objects if item.category not in without))


def sample_responses(records: list[dict], seeds: Mapping[str, int], **options) -> list[list[str]]:
    """Responses of the policy to each record, "" for one that was cut at the token limit.

    Args:
        seeds: id of a record -> seed of its samples, so that they do not depend on the other records.
        options: the other arguments of `answers`.
    """
    return answers(images=[record["image"] for record in records], prompts=[record["prompt"] for record in records],
                   seeds=[seeds[record["id"]] for record in records], finished=True, **options)
