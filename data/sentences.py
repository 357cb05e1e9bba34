"""Where sentences end: one rule for all that splits texts. Reconstructed, as no paper states its own.

A sentence ends at `.`, `!` or `?` with what closes after it, unless a small letter follows, and at the end of a
line. Abbreviations, initials and the numbers of a list end nothing.
"""

import re

END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s+[^\sa-z]|\s*$)|(?=\s*\n)""")
ABBREVIATION = r"mr|mrs|ms|dr|prof|st|vs|e\.g|i\.e|approx|(?-i:[A-Z])"
NO_END = re.compile(rf"(?:^|[\s(\"“])(?:{ABBREVIATION})\.$|(?:^|\n)\s*\d+\.$", re.I)


def sentence_end(text: str, start: int, whole: bool) -> int | None:
    """Where the sentence that goes on at `start` ends; None if that cannot be told yet.

    Marks at the very end count only in a `whole` text: "3." may become "3.5".
    """
    for found in END.finditer(text, start):
        if not whole and not text[found.end() :].strip():
            return None
        if found.end() > start and not (found.group() == "." and NO_END.search(text[: found.end()])):
            return found.end()
    return len(text) if whole else None


def split_sentences(text: str) -> list[tuple[str, str]]:
    """Text -> (sentence, white space after it); together they are the text again."""
    result, start = [], 0
    while start < len(text):
        first = start + len(text[start:]) - len(text[start:].lstrip())
        end = sentence_end(text, first, whole=True)
        after = end + len(text[end:]) - len(text[end:].lstrip())
        result.append((text[start:end], text[end:after]))
        start = after
    return result


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them; [""] for an empty one."""
    return [sentence for sentence, _ in split_sentences(text.strip())] or [""]
