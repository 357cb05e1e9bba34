"""Finds the objects that a response mentions, and the tokens that each mention is made of.

The words to look for are those of data/entities.txt (how it is made: tools/entities.py). A mention is the
longest run of words that is in the list, from left to right, without overlaps: "hot dog" is one mention
and no dog. Case does not matter; words may be joined by one space or one hyphen, and end where letters and
digits end, so "dog's" mentions a dog and "hotdogs," a hot dog, but "dogma" nothing.

Tokens are found without knowing the tokenizer: `decode` of ever longer beginnings of the response tells how
much of the text each token completes. This takes T calls a response, and works for tokens of any size, down
to bytes: a token that changes nothing readable yet belongs to the next one that does.

FiSAO (arXiv 2410.14148), whose rewards use this, says neither how words are found nor which of their tokens
is rewarded: reconstructed. Known limits: no part of speech ("an orange shirt" mentions an orange) and no
negation ("there is no dog" mentions a dog).
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

ENTITIES = Path(__file__).with_name("entities.txt")
_WORD = re.compile(r"[^\W_]+")


class Mention(NamedTuple):
    """Tokens start <= t < stop of a response, which spell an object word."""

    word: str  # as in the entity list
    entity: str
    start: int
    stop: int


def load_entities() -> dict[str, str]:
    """word -> entity. Lines are "word, tab, entity", or begin with #."""
    lines = ENTITIES.read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


def mentions(ids: Sequence[int], decode: Callable[[list[int]], str], entities: Mapping[str, str]) -> list[Mention]:
    """Mentions of a response in the order of the text.

    Args: token ids; `decode` turns a list of ids into text and leaves out special tokens (Processor.decode);
    word -> entity.
    """
    ids = list(ids)
    text = decode(ids)
    ends = token_ends(ids, decode, text)
    return [Mention(word, entities[word], bisect_right(ends, first), bisect_left(ends, last) + 1)
            for word, first, last in find(text, entities)]


def token_ends(ids: list[int], decode: Callable[[list[int]], str], text: str) -> list[int]:
    """For each token, how many characters of `text` = decode(ids) are complete with it: never falling."""
    same = (len(os.path.commonprefix([decode(ids[:count]), text])) for count in range(1, len(ids) + 1))
    return list(accumulate(same, max))


def find(text: str, entities: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """(word of the list, first character, one past the last), longest first, from left to right."""
    words = [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]
    longest = max(word.count(" ") for word in entities) + 1
    found, i = [], 0
    while i < len(words):
        for count in range(_run(text, words[i : i + longest]), 0, -1):
            name = " ".join(word for word, _, _ in words[i : i + count])
            if name in entities:
                found.append((name, words[i][1], words[i + count - 1][2]))
                break
        i += count  # 1 if there was none
    return found


def _run(text: str, words: list[tuple[str, int, int]]) -> int:
    """How many of these words, from the first on, are joined by one space or hyphen each."""
    count = 1
    while count < len(words) and text[words[count - 1][2] : words[count][1]] in (" ", "-"):
        count += 1
    return count
