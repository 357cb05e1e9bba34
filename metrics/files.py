"""Files of answers and annotations: read strictly, all problems counted and the first ones named.

Answers are JSONL, or one JSON list, with an id (`id`, `question_id` or `image_id`) and a text (`text`, or the names
other tools give it). They are joined with the questions by id; an id that is missing, unknown or given twice is
refused, because a shifted or shortened file would otherwise give a plausible, wrong score. An id of CHAIR may name
its picture in any way of data/names.py. POPE's own answer files have no id; there the order counts, and each line's
`question` must equal the question in the same place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from common import BadInput, brief, parse_json, refuse
from data.names import Names, as_id

TEXT_KEYS = ("text", "answer", "response", "caption", "model_prediction")
ID_KEYS = {"chair": ("image_id", "id", "question_id"), "pope": ("question_id", "id")}  # first found wins


def read_answers(
    path: Path, questions: Sequence[dict], benchmark: str, *, subset: bool = False, also: Collection[str] = ()
) -> dict[str, str]:
    """Question id -> answer, for exactly the given questions (metrics/questions.py).

    Args:
        subset: for those of the questions that are answered; at least one is.
        also: further ids that may be answered; those answers are left out.

    Raises BadInput with one line for each bad line and each unknown or repeated id, and one for those that miss.
    """
    rows = read_jsonl(path)
    name = _names(path, rows, questions, benchmark, also)
    problems, said, first = [], {}, {}
    for place, (number, row) in enumerate(rows):
        try:
            key, text = name(place, row), _text(row)
            if key in first:
                raise BadInput(f"id {brief(key)} was already answered at {first[key]}")
        except BadInput as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            said[key], first[key] = text, number
    answered = [question["id"] for question in questions if question["id"] in said]
    missing = [question["id"] for question in questions if question["id"] not in said]
    if missing and not problems and not (subset and answered):  # else what is missing may stand in a bad line
        problems.append(f"{path}: no answer to {len(missing):,} of {len(questions):,} ids: {examples(missing)}; "
                        "--subset scores the answered ones alone")
    refuse(problems)
    return {key: said[key] for key in answered}


def _names(path: Path, rows: Sequence[tuple[int, dict]], questions: Sequence[dict], benchmark: str,
           also: Collection[str]) -> Callable[[int, dict], str]:
    """(place, row) -> the id that the row answers; that function raises BadInput if there is none."""
    keys, ids = ID_KEYS[benchmark], [question["id"] for question in questions]
    if benchmark == "chair":
        find = Names("questions", ids, {q["id"]: q["image_id"] for q in questions if "image_id" in q}).find
    else:
        find = {key: key for key in (*also, *ids)}.get

    def by_id(place: int, row: dict) -> str:
        given = next((row[key] for key in keys if row.get(key) is not None), None)
        if (name := as_id(given)) is None:
            raise BadInput(f"no id ({', '.join(keys)})" if given is None else f"{brief(given)} is no id")
        if (key := find(name)) is None:
            raise BadInput(f"unknown id {brief(name)} (known: {examples(ids)})")
        return key

    def by_order(place: int, row: dict) -> str:
        if place >= len(questions) or row.get("question", "") != questions[place].get("text"):
            raise BadInput("no id, and not the question in the same place")
        return ids[place]

    ordered = benchmark == "pope" and not any(key in row for _, row in rows for key in keys)
    return by_order if ordered else by_id


def _text(row: dict) -> str:
    texts = {row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)}
    if len(texts) != 1:
        raise BadInput(f"want one text ({', '.join(TEXT_KEYS)}), found {len(texts)}")
    return texts.pop()


def read_jsonl(path: Path, needs: Sequence[str] = ()) -> list[tuple[int, dict]]:
    """(number, object) of each line that is not blank, or of each item if the file is one JSON list.

    needs: keys with a string or a whole number. Raises BadInput with one line for each bad line.
    """
    data = _read(path)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        items = list(enumerate(_parse_file(path, data), start=1))
    else:
        items = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    problems, rows = [], []
    for number, item in items:
        try:
            row = _parse(item) if isinstance(item, bytes) else item
            if not isinstance(row, dict):
                raise BadInput(f"want a JSON object, found {type(row).__name__}")
            if missing := [key for key in needs if as_id(row.get(key)) is None]:
                raise BadInput(f"has no {', '.join(missing)}")
        except BadInput as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            rows.append((number, row))
    refuse(problems or ([] if rows else [f"{path}: has no lines"]))
    return rows


def read_json(path: Path) -> object:
    """A JSON file. Raises BadInput naming the file, and what `common.parse_json` or `_parse` refuses."""
    return _parse_file(path, _read(path))


def _parse_file(path: Path, data: bytes) -> object:
    try:
        return _parse(data)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def _parse(data: bytes) -> object:
    """`common.parse_json`; refuses keys given twice, and halves of characters, which nothing could write again."""
    twice: list[str] = []

    def unique(items: list[tuple]) -> dict:
        made = dict(items)
        if len(made) < len(items):
            twice.extend(key for key, times in Counter(key for key, _ in items).items() if times > 1)
        return made

    value = parse_json(data, unique)
    if twice:
        raise BadInput(f"{examples(twice)} given twice")
    if re.search(rb"\\u[dD][89a-fA-F]", data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadInput(f"holds half a character, the lone surrogate {half!r}") from None
    return value


def examples(names: Sequence[str]) -> str:
    """The first three names, and how many there are beside them."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(brief, names[:3])) + more


def refuse_repeats(names: Iterable[str], where: str) -> None:
    """BadInput naming each name that occurs more than once."""
    refuse(f"{where} {brief(name)} is given {times} times" for name, times in Counter(names).items() if times > 1)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
