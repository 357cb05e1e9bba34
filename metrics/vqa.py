"""VQA accuracy: how many of ten annotators gave the answer of the model?

Paper: Antol et al., "VQA: Visual Question Answering", ICCV 2015, arXiv:1505.00468. Each annotator is left out once:

    accuracy = 1/n sum_i min(1, #{j != i : r(a_j) = r(said)} / 3)
             = [k min(3, k - 1) + (n - k) min(3, k)] / 3n      for k equal answers; n = 10: 0, .3, .6, .9, 1, 1 ...

| symbol | argument | type                                       |
|--------|----------|--------------------------------------------|
| said   | said     | str, the model's words                     |
| a_i    | answers  | n strings, one an annotator                |
| r      | rules    | "evalai" or "classic": the normalisation   |

Normalisation (`normalise`), oddities included, for published figures contain them:
- evalai, as Pythia, LLaVA's m4c_evaluator and lmms-eval do: lower case; commas and question marks removed; 's
  detached; a punctuation mark removed if it touches a space anywhere in the answer, else replaced by a space; the
  first 32 full stops not followed by a digit removed (the look-behind of the released pattern is mistyped and tests
  nothing, and its flag is taken for a count); number words up to ten become digits ("none" is 0); articles go;
  apostrophes of contractions return.
- classic, as the VQA tool: commas, question marks and 's are not treated first, so that a number with a comma makes
  all marks go; and where all annotators agree nothing is normalised, on neither side.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from math import fsum
from typing import Literal

Rules = Literal["evalai", "classic"]
SUFFIX = "\nAnswer the question using a single word or phrase."
MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
FULL_STOPS = re.compile(r"\.(?!\d)")

# A word of this list is also known without any one of its apostrophes.
_CONTRACTIONS = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word
                for word in _CONTRACTIONS.split() for i, mark in enumerate(word) if mark == "'"}  # fmt: skip
CONTRACTIONS["somebody'd"] = "somebodyd"  # sic


@lru_cache(maxsize=65536)
def normalise(text: str, rules: Rules = "evalai") -> str:
    """An answer as it is compared."""
    if rules == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    words = _without_marks(_one_line(text)).lower().split()
    words = [word for word in (NUMBERS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(text: str) -> str:
    marked, number = text, re.search(r"\d,\d", text)
    for mark in MARKS:
        gone = number or f"{mark} " in marked or f" {mark}" in marked
        text = text.replace(mark, "" if gone else " ")
    return FULL_STOPS.sub("", text, count=32)


def accuracy(said: str, answers: Sequence[str], rules: Rules = "evalai") -> float:
    """VQA accuracy of one answer, in [0, 1]."""
    agreed = rules == "classic" and len(set(map(_one_line, answers))) == 1
    read: Callable[[str], str] = _one_line if agreed else lambda text: normalise(text, rules)
    n, k = len(answers), Counter(map(read, answers))[read(said)]
    return (k * min(3, k - 1) + (n - k) * min(3, k)) / (3 * n)


def mean(values: Iterable[float]) -> float:
    """Mean, the same in any order; 0.0 of nothing."""
    values = list(values)
    return fsum(values) / len(values) if values else 0.0


def mean_by(rows: Iterable[Mapping], values: Iterable[float], key: str) -> dict[str, dict]:
    """{value of row[key]: {n, accuracy}}, for the rows that have the key."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values):
        if row.get(key) is not None:
            groups.setdefault(row[key], []).append(value)
    return {name: {"n": len(groups[name]), "accuracy": mean(groups[name])} for name in sorted(groups)}
