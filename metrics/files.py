"""Files of answers and annotations: read strictly, every problem named at once.

Answers are JSONL with an id (`id`, `question_id` or `image_id`) and a text (`text`, or the names other tools
give it). They are joined with the questions by id; an id that is missing, unknown or given twice is refused,
because a shifted or shortened file would otherwise give a plausible, wrong score. POPE's own answer files
have no id; there the order counts, and each line's `question` must equal the question in the same place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

TEXT_KEYS = ("text", "answer", "response", "caption", "model_prediction")
ID_KEYS = {"chair": ("image_id", "id", "question_id"), "pope": ("question_id", "id")}  # first found wins


def read_answers(path: Path, questions: Sequence[dict], benchmark: str) -> dict[str, str]:
    """Question id -> answer, for exactly the given questions (metrics/questions.py).

    Raises ValueError with one line for each bad line, and for each id given twice or on only one side.
    """
    lines, ids = read_jsonl(path), ID_KEYS[benchmark]
    by_order = benchmark == "pope" and not any(key in row for _, row in lines for key in ids)
    problems, said, first = [], {}, {}
    for place, (number, row) in enumerate(lines):
        texts = {row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)}
        key = _id_by_order(row, place, questions) if by_order else _id(row, ids)
        if len(texts) != 1:
            problems.append(f"{path}:{number}: want one text ({', '.join(TEXT_KEYS)}), found {len(texts)}")
        elif key is None and by_order:
            problems.append(f"{path}:{number}: no id, and not the question in the same place")
        elif key is None:
            problems.append(f"{path}:{number}: no id ({', '.join(ids)})")
        elif key in first:
            problems.append(f"{path}:{number}: id {key!r} was already answered in line {first[key]}")
        else:
            said[key], first[key] = texts.pop(), number
    if not problems:  # else what is missing may stand in a bad line
        wanted = dict.fromkeys(question["id"] for question in questions)
        problems += [f"{path}:{first[key]}: unknown id {key!r}" for key in said if key not in wanted]
        problems += [f"{path}: no answer to id {key!r}" for key in wanted if key not in said]
    refuse(problems)
    return said


def _id(row: dict, names: Sequence[str]) -> str | None:
    return next((str(row[name]) for name in names if isinstance(row.get(name), (str, int))), None)


def _id_by_order(row: dict, place: int, questions: Sequence[dict]) -> str | None:
    same = place < len(questions) and row.get("question", "") == questions[place].get("text")
    return questions[place]["id"] if same else None


def read_jsonl(path: Path, needs: Sequence[str] = ()) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank; `needs` are keys with a string or a number.

    Raises ValueError with one line for each bad line.
    """
    problems, rows = [], []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno})")
            continue
        if not isinstance(row, dict):
            problems.append(f"{path}:{number}: want a JSON object, found {type(row).__name__}")
        elif missing := [key for key in needs if not isinstance(row.get(key), (str, int))]:
            problems.append(f"{path}:{number}: has no {', '.join(missing)}")
        else:
            rows.append((number, row))
    refuse(problems or ([] if rows else [f"{path}: has no lines"]))
    return rows


def read_json(path: Path) -> object:
    """A JSON file. Raises ValueError naming the file, and the line or every key that is given twice."""
    twice: list[str] = []

    def unique(items: list[tuple]) -> dict:
        twice.extend(key for key, times in Counter(key for key, _ in items).items() if times > 1)
        return dict(items)

    try:
        value = json.loads(_read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    refuse(f"{path}: {key!r} is given twice" for key in twice)
    return value


def refuse(problems: Iterable[str]) -> None:
    """ValueError with one line a problem, if there is any."""
    if problems := list(problems):
        raise ValueError("\n".join(problems))


def refuse_repeats(names: Iterable[str], where: str) -> None:
    """ValueError naming each name that occurs more than once."""
    refuse(f"{where} {name!r} is given {times} times" for name, times in Counter(names).items() if times > 1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
