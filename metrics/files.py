"""Files of answers and annotations: read strictly, all problems counted and the first ones named."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from common import BadInput, brief, parse_json, refuse
from data.names import as_id


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
