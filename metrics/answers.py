"""Answers and images joined with the questions of a benchmark: by id, never by order.

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


def join(path: Path, rows: Sequence[dict], key: Callable[[dict], str | None], *, subset: bool = False,
         answers: Iterable[tuple[str, dict]] | None = None) -> dict[str, str]:
    """id -> text of exactly the given questions, in their order.

    Args:
        key: an answer -> id of its question, None for an answer that does not count; raises BadInput.
        subset: for those of the questions that are answered; at least one is.
        answers: (FILE:LINE, answer) of each; None reads `path`, JSONL or one JSON list.

    Raises BadInput with one line for each bad answer and each unknown or repeated id, and one for what is missing.
    """
    ids = [row["id"] for row in rows]
    known, problems, said, first = set(ids), [], {}, {}
    for where, answer in numbered(path) if answers is None else answers:
        try:
            if (name := key(answer)) is None:
                continue
            if name not in known:
                raise BadInput(f"unknown id {brief(name)} (known: {examples(ids)})")
            if name in said:
                raise BadInput(f"id {brief(name)} was already answered at {first[name]}")
            said[name], first[name] = text_of(answer), where
        except BadInput as error:
            problems.append(f"{where}: {error}")
    missing = [name for name in ids if name not in said]
    if missing and not problems and not (subset and said):  # else what is missing may be in a bad line
        problems.append(f"{path}: no answer to {len(missing):,} of {len(ids):,} ids: {examples(missing)}; "
                        "--subset scores the answered ones alone")
    refuse(problems)
    return {name: said[name] for name in ids if name in said}


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


def text_of(answer: dict) -> str:
    """The one text of an answer. BadInput where it has none, or several that differ."""
    texts = {answer[key] for key in TEXT_KEYS if isinstance(answer.get(key), str)}
    if len(texts) != 1:
        raise BadInput(f"want one text ({', '.join(TEXT_KEYS)}), found {len(texts)}")
    return texts.pop()


def given(answer: dict, keys: Sequence[str] = ("id", "question_id")) -> str:
    """The first of these keys that the answer has, as an id. BadInput if there is none."""
    value = next((answer[key] for key in keys if answer.get(key) is not None), None)
    if (name := as_id(value)) is None:
        raise BadInput(f"no id ({', '.join(keys)})" if value is None else f"{brief(value)} is no id")
    return name


def with_files(rows: Sequence[dict], images: Path | None, *folders: str) -> list[dict]:
    """The rows, each `image` a file of the folder `images` or of these folders in it, relative to `images`; as they are
    without a folder, as no model is asked then.

    Raises BadInput that lists the images without a file.
    """
    if images is None:
        return list(rows)
    if not images.is_dir():
        raise BadInput(f"{images}: no such folder")
    names = dict.fromkeys(row["image"] for row in rows if row["image"] is not None)
    for name in names:
        places = (name, *(f"{folder}/{name}" for folder in folders))
        names[name] = next((place for place in places if (images / place).is_file()), None)
    refuse(f"{images / name}: no such image" for name, place in names.items() if place is None)
    return [{**row, "image": names.get(row["image"])} for row in rows]


def checked(where: Path, items: object, **kinds: type) -> list[dict]:
    """The items, if they are a list of objects that hold these keys with values of these types. Raises BadInput."""
    if not isinstance(items, list) or not items:
        raise BadInput(f"{where}: a list of entries is wanted")
    refuse(f"{where}: entry {number} has no {key} ({kind.__name__})" for number, item in enumerate(items)
           for key, kind in kinds.items() if not isinstance(item, dict) or type(item.get(key)) is not kind)
    return items
