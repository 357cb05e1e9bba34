"""Multiple choice: a question, its choices after the letters A, B, ..., and the request for a letter, as LLaVA asks."""

from __future__ import annotations

from collections.abc import Iterable

LETTERS = "ABCDE"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."


def multiple_choice(question: str, choices: Iterable[str]) -> str:
    """Question and choices, one a line, without the request for a letter."""
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))])
