"""What a judge says of responses, and how responses are ordered by it.

Every judge has one signature, `Judge`: (records, responses of each) -> for each record a verdict on each of its
responses, or None where it came to no verdict.

A `Judgement` counts claims, a `Score` only compares. FiSAO's verifier scores words instead: judges/words.py.
"""

from collections.abc import Callable
from typing import NamedTuple


class Judgement(NamedTuple):
    """What an annotator finds in one answer."""

    wrong: int  # claims that the image does not bear out
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
    faultless = False  # it does not say

    @property
    def key(self) -> tuple[float, ...]:
        return (-self.score,)


Judge = Callable[[list[dict], list[list[str]]], list[list[Judgement] | list[Score] | None]]  # None: no verdict


def one_by_one(annotator: Callable[[dict, list[str]], list[Judgement]]) -> Judge:
    """A judge that asks an annotator about one record after the other."""
    return lambda records, answers: [annotator(*each) for each in zip(records, answers, strict=True)]


def order(answers: list[str], judgements: list[Judgement] | list[Score]) -> list[int]:
    """Indices of the non-empty answers, best first; equals keep their order."""
    filled = [i for i, answer in enumerate(answers) if answer.strip()]
    return sorted(filled, key=lambda i: judgements[i].key)
