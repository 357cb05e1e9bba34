"""Multiple choice: a question, its choices after the letters A, B, ..., and the request for a letter, as LLaVA asks;
and the shares of right answers."""

from collections.abc import Iterable

from metrics.chair import ratio

LETTERS = "ABCDE"
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."


def multiple_choice(question: str, choices: Iterable[str]) -> str:
    """Question and choices, one a line, without the request for a letter."""
    return "\n".join([question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices))])


def share(right: Iterable[bool]) -> dict:
    """{n, right, accuracy}."""
    right = list(right)
    return {"n": len(right), "right": sum(right), "accuracy": ratio(sum(right), len(right))}
