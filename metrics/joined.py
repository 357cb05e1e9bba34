"""Answers and images joined with the questions of a benchmark: by name, never by order.

An id that is missing, unknown or given twice is refused, and so is an image without a file: a shifted or shortened
file would otherwise give a plausible, wrong score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from common import BadInput, brief, refuse
from data.names import as_id
from metrics.files import examples, read_jsonl

TEXT_KEYS = ("text", "answer", "response", "caption", "model_prediction", "prediction")


def join(path: Path, lines: Iterable[tuple[str, dict]], rows: Sequence[dict],
         name: Callable[[dict], str | None], *, subset: bool = False) -> dict[str, str]:
    """id -> text of exactly the given questions, in their order.

    Args:
        lines: (FILE:LINE, answer) of each answer.
        name: answer -> id of its question, None for an answer that does not count; raises BadInput.
        subset: for those of the questions that are answered; at least one is.

    Raises BadInput with one line for each bad answer and each unknown or repeated id, and one for what is missing.
    """
    ids = [row["id"] for row in rows]
    known, problems, said, first = set(ids), [], {}, {}
    for where, line in lines:
        try:
            if (key := name(line)) is None:
                continue
            if key not in known:
                raise BadInput(f"unknown id {brief(key)} (known: {examples(ids)})")
            if key in said:
                raise BadInput(f"id {brief(key)} was already answered at {first[key]}")
            said[key], first[key] = text_of(line), where
        except BadInput as error:
            problems.append(f"{where}: {error}")
    missing = [key for key in ids if key not in said]
    if missing and not problems and not (subset and said):  # else what is missing may be in a bad line
        problems.append(f"{path}: no answer to {len(missing):,} of {len(ids):,} ids: {examples(missing)}; "
                        "--subset scores the answered ones alone")
    refuse(problems)
    return {key: said[key] for key in ids if key in said}


def numbered(path: Path) -> list[tuple[str, dict]]:
    """(FILE:LINE, object) of a JSONL file or of one JSON list."""
    return [(f"{path}:{number}", line) for number, line in read_jsonl(path)]


def read_text(path: Path) -> str:
    """A UTF-8 text, with or without a byte order mark. BadInput naming the file when it is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def text_of(line: dict) -> str:
    """The one text of an answer. BadInput when there is none, or several that differ."""
    texts = {line[key] for key in TEXT_KEYS if isinstance(line.get(key), str)}
    if len(texts) != 1:
        raise BadInput(f"want one text ({', '.join(TEXT_KEYS)}), found {len(texts)}")
    return texts.pop()


def id_of(line: dict) -> str:
    """The id of an answer. BadInput when there is none."""
    given = next((line[key] for key in ("id", "question_id") if line.get(key) is not None), None)
    if (name := as_id(given)) is None:
        raise BadInput("no id (id, question_id)" if given is None else f"{brief(given)} is no id")
    return name


def with_files(rows: Sequence[dict], images: Path, *folders: str) -> list[dict]:
    """The rows, each `image` a file of the folder `images` or of these folders in it, relative to `images`.

    Raises BadInput that lists the images without a file.
    """
    if not images.is_dir():
        raise BadInput(f"{images}: no such folder")
    names = dict.fromkeys(row["image"] for row in rows if row["image"] is not None)
    for name in names:
        places = (name, *(f"{folder}/{name}" for folder in folders))
        names[name] = next((place for place in places if (images / place).is_file()), None)
    refuse(f"{images / name}: no such image" for name, place in names.items() if place is None)
    return [{**row, "image": names.get(row["image"])} for row in rows]
