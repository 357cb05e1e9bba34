"""What benchmarks read from official files: entries of the right shape, answers joined with their questions, image
files that exist. All that is wrong is counted, and the first problems are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from common import BadInput, brief, refuse
from data.names import as_id
from metrics.files import TEXT_KEYS, examples, read_jsonl

TEXTS = (*dict.fromkeys((*TEXT_KEYS, "prediction")),)


def join(path: Path, rows: Sequence[dict], key: Callable[[dict], str], *, subset: bool = False) -> dict[str, str]:
    """Question id -> text, of an answers file (JSONL, or one JSON list).

    Args:
        key: an answer of the file -> id of its question; raises BadInput where it has none.
        subset: for those of the questions that are answered; at least one is.

    Raises BadInput: one line for each answer without text or question and each second answer to a question, and one
    for the questions without an answer.
    """
    problems, said, first = [], {}, {}
    for number, answer in read_jsonl(path):
        try:
            name, text = key(answer), _text(answer)
            if name in first:
                raise BadInput(f"id {brief(name)} was already answered at {first[name]}")
        except BadInput as error:
            problems.append(f"{path}:{number}: {error}")
        else:
            said[name], first[name] = text, number
    missing = [row["id"] for row in rows if row["id"] not in said]
    if missing and not problems and not (subset and len(missing) < len(rows)):
        problems.append(f"{path}: no answer to {len(missing):,} of {len(rows):,} ids: {examples(missing)}; "
                        "--subset scores the answered ones alone")  # fmt: skip
    refuse(problems)
    return {row["id"]: said[row["id"]] for row in rows if row["id"] in said}


def by_id(rows: Sequence[dict], keys: Sequence[str]) -> Callable[[dict], str]:
    """A `key` for `join`: the first of these keys that the answer has is the question's id."""
    known = {row["id"]: row["id"] for row in rows}

    def key(answer: dict) -> str:
        name = given(answer, keys)
        if name not in known:
            raise BadInput(f"unknown id {brief(name)} (known: {examples(list(known))})")
        return name

    return key


def given(answer: Mapping, keys: Sequence[str]) -> str:
    """The value of the first of these keys that the answer has, as an id. Raises BadInput if there is none."""
    value = next((answer[key] for key in keys if answer.get(key) is not None), None)
    if (name := as_id(value)) is None:
        raise BadInput(f"no id ({', '.join(keys)})" if value is None else f"{brief(value)} is no id")
    return name


def _text(answer: Mapping) -> str:
    texts = {answer[key] for key in TEXTS if isinstance(answer.get(key), str)}
    if len(texts) != 1:
        raise BadInput(f"want one text ({', '.join(TEXTS)}), found {len(texts)}")
    return texts.pop()


def checked(where: Path, items: object, **kinds: type) -> list[dict]:
    """The items, if they are a list of objects that hold these keys with values of these types. Raises BadInput."""
    if not isinstance(items, list) or not items:
        raise BadInput(f"{where}: a list of entries is wanted")
    refuse(f"{where}: entry {number} has no {key} ({kind.__name__})" for number, item in enumerate(items)
           for key, kind in kinds.items() if not isinstance(item, dict) or type(item.get(key)) is not kind)  # fmt: skip
    return items


def unique(where: Path, rows: Sequence[dict]) -> list[dict]:
    """The rows, if no two have the same id. Raises BadInput."""
    counted: dict[str, int] = {}
    for row in rows:
        counted[row["id"]] = counted.get(row["id"], 0) + 1
    refuse(f"{where}: id {brief(name)} is given {times} times" for name, times in counted.items() if times > 1)
    return list(rows)


def refuse_missing(images: Path | None, rows: Iterable[dict]) -> None:
    """BadInput naming the images that the folder lacks; without a folder nothing is asked of them."""
    if images is not None:
        names = sorted({row["image"] for row in rows})
        refuse(f"{images / name}: no such image" for name in names if not (images / name).is_file())
