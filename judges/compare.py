"""A model as judge: which of two answers about an image hallucinates less?

"Understanding Alignment in Multimodal LLMs" (Apple 2024, arXiv 2407.02477), on online preference data: a
stronger VLM, or the policy itself (self-rewarding), is shown the image, the question and two answers. The
prompt says what the paper's does (its Table 14), in other words. The verdict is free text: see `verdict`.

With n answers every two of them are compared once (n (n - 1) / 2 requests) and

    score of an answer = comparisons won - comparisons lost

Judges like one place better than the other, so which answer comes first is drawn for each comparison, from
the seed, the record's id and the two places: neither the batch nor the order of the records matters. A
comparison without a clear verdict counts for neither; a record without any is dropped by the ranking
(pairs/rank.py) and counted there.
"""

import random
import re
from itertools import combinations

from judges.ask import Model, Request, read_reply
from judges.scores import Judge, Score

JUDGE_PROMPT = """Two answers to a question about the picture follow. Decide which one hallucinates less.

- Whatever an answer states must be visible in the picture: objects, their number, attributes, colours, \
actions and where things are.
- What the picture leaves open should not be stated as certain.
- Between equally accurate answers, prefer the one that is shorter, answers what was asked and adds nothing \
beside the point.
- The order of the answers means nothing.

Question: {question}

Response 1: {first}

Response 2: {second}

Which response hallucinates less? Begin with "Response 1" or "Response 2", then say why in one sentence."""


# `{n}`: the number of a response.
MARKED = r"\[\[\s*(?:response )?{n}\s*\]\]|\\boxed\{+(?:\\text\{)?\s*(?:response )?{n}\b|<answer>\s*(?:response )?{n}\b"
FIRST = (r"\A(?:(?:the |my )?(?:final |better |best )?(?:answer|verdict|choice|response)(?: is\b:?|:)\s*)?"
         r"(?:(?:response|answer) ?)?{n}(?=\s*(?:$|[.:,;)\n-]|because|since|as\b|is better|is preferable|is more"
         r"|hallucinates less|has fewer))")
PREFERRED = (r"(?:prefer|choose|pick|select|favou?r) response {n}\b"
             r"|response {n} (?:is|seems|was) (?:clearly |slightly |much |the )*"
             r"(?:better|preferable|more accurate|winner)\b"
             r"|response {n} (?:hallucinates less|has fewer)"
             r"|(?:better|best|preferred) (?:one |response |answer )?(?:is|:) (?:response )?{n}\b")
WORSE = (r"response {n} (?:hallucinates more|has more (?:errors|hallucinations|mistakes)"
         r"|(?:is|seems|was) (?:clearly |slightly |much )*(?:worse|less accurate)"
         r"|(?:does not|doesn't) hallucinate less)")
RIGHT = r"response {n} (?:is|seems|was) (?:clearly |the )*(?:right|correct|accurate)\b"
DENIED = re.compile(r"\b(?:not|neither|nor|never|cannot|if|whether|unless)\b|n't\b")


def verdict(text: str) -> int | None:
    """0 when the text prefers Response 1, 1 when Response 2, None when that is not clear.

    Thoughts before the answer do not count. Then the first of these that names a response decides, if all that it
    finds name the same one:

        a marked answer        [[2]], \\boxed{2}, <answer>2</answer>
        how the text begins    "Response 2, because ..."
        a comparison           "I prefer response 2", "response 2 hallucinates less", "response 1 is worse"
        praise of one          "response 2 is right"
    """
    answer = read_reply(text).text.strip().lower()
    plain = re.sub(r"[*_#`\"“”]", "", answer).replace("’", "'").strip()
    better, worse = _named(PREFERRED, plain), _named(WORSE, plain)
    for named in (_named(MARKED, answer), _named(FIRST, plain),
                  better | {3 - number for number in worse}, _named(RIGHT, plain)):
        if named:
            return named.pop() - 1 if len(named) == 1 else None
    return None


def _named(pattern: str, text: str) -> set[int]:
    """Numbers of the responses in the matches of a pattern, denied ones left out."""
    matches = re.finditer(pattern.replace("{n}", "([12])"), text)
    found = [match for match in matches if not DENIED.search(re.split(r"[.,;:!?\n]", text[: match.start()])[-1])]
    return {int(number) for match in found for number in match.groups() if number}


def model_judge(model: Model, *, seed: int = 0) -> Judge:
    """A judge for pairs/rank.py that compares every two answers of a record."""

    def judge(records: list[dict], answers: list[list[str]]) -> list[list[Score] | None]:
        duels = [(row, *(pair if _draw(seed, record, pair) else pair[::-1]))
                 for row, (record, texts) in enumerate(zip(records, answers, strict=True))
                 for pair in combinations([i for i, text in enumerate(texts) if text.strip()], 2)]
        replies = model.ask([
            Request(records[row]["image"], JUDGE_PROMPT.format(
                question=records[row]["prompt"], first=answers[row][one], second=answers[row][two]))
            for row, one, two in duels])
        scores, undecided = [[0] * len(texts) for texts in answers], {row for row, _, _ in duels}
        for (row, one, two), reply in zip(duels, replies, strict=True):
            choice = verdict(reply.text)
            if choice is not None:
                undecided.discard(row)
                scores[row][one] += 1 - 2 * choice
                scores[row][two] -= 1 - 2 * choice
        return [None if row in undecided else list(map(Score, values)) for row, values in enumerate(scores)]

    return judge


def _draw(seed: int, record: dict, pair: tuple[int, int]) -> bool:
    """Whether the pair keeps its order."""
    return random.Random(f"{seed}:{record['id']}:{pair[0]}:{pair[1]}").random() < 0.5
