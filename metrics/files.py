"""Files of questions, annotations, answers and replies: read strictly, all problems named at once as FILE:LINE.

The readers give pairs (FILE:LINE, entry). `each` makes a value of every entry, by a function that refuses one with
BadInput as `field` and `texts` do.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from common import BadInput, brief, parse_json, read_json, refuse

KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def read_text(path: Path) -> str:
    """A UTF-8 text, with or without a byte order mark. Raises BadInput naming the file when it is none."""
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path) -> list[tuple[str, str]]:
    """(FILE:LINE, line) of a text file, without blank lines and line ends."""
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [(f"{path}:{number}", line.rstrip("\r")) for number, line in lines if line.strip()]


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """(FILE:LINE, object) of each line that is not blank, or of each item if the file is one JSON list."""
    data = _read(path)
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        entries = read_list(path)
        return list(zip((where for where, _ in entries), each(entries, as_object)))
    lines = [(f"{path}:{number}", line) for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    refuse([] if lines else [f"{path}: has no lines"])
    rows = each(lines, lambda line: as_object(parse_json(line, surrogates=False)))
    return list(zip((where for where, _ in lines), rows))


def read_list(path: Path, key: str | None = None) -> list[tuple[str, object]]:
    """(FILE:NUMBER, item) of a JSON list, or of the list `key` of a JSON object."""
    found = read_json(path, object)
    items = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(items, list) or not items:
        raise BadInput(f"{path}: want a filled JSON list{f' {key!r}' if key else ''}")
    return [(f"{path}:{number}", item) for number, item in enumerate(items, start=1)]


def read_table(path: Path) -> list[tuple[str, tuple[str, object]]]:
    """(FILE:KEY, (key, value)) of a JSON object."""
    found = read_json(path)
    refuse([] if found else [f"{path}: want a filled JSON object"])
    return [(f"{path}:{brief(key)}", (key, value)) for key, value in found.items()]


def each(entries: Iterable[tuple[str, object]], make: Callable) -> list:
    """make(entry) of every (FILE:LINE, entry). One BadInput lists all that `make` refuses."""
    made, problems = [], []
    for where, entry in entries:
        try:
            made.append(make(entry))
        except BadInput as error:
            problems.append(f"{where}: {error}")
    refuse(problems)
    return made


def as_object(entry: object) -> dict:
    """The entry, if it is a JSON object."""
    if not isinstance(entry, dict):
        raise BadInput(f"want a JSON object, found {type(entry).__name__}")
    return entry


def field(entry: object, key: str, kind: type = str):
    """entry[key], a `kind`; BadInput says what it is instead."""
    if key not in as_object(entry):
        raise BadInput(f"has no {key!r}")
    if type(entry[key]) is not kind:
        raise BadInput(f"{key!r} must be {KINDS[kind]}, found {brief(entry[key])}")
    return entry[key]


def texts(entry: object, key: str) -> list[str]:
    """entry[key], a list of strings."""
    if wrong := [item for item in field(entry, key, list) if not isinstance(item, str)]:
        raise BadInput(f"{key!r} must hold strings, found {brief(wrong[0])}")
    return entry[key]


def examples(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(brief, names[:3])) + more


def refuse_repeats(names: Iterable[str], where: str) -> None:
    """BadInput naming each name that occurs more than once."""
    refuse(f"{where} {brief(name)} is given {times} times" for name, times in Counter(names).items() if times > 1)


def unique(path: Path, rows: list[dict]) -> list[dict]:
    """The rows, whose ids must differ."""
    refuse_repeats((row["id"] for row in rows), f"{path}: id")
    return rows


def below(folder: Path) -> Iterator[Path]:
    """All files in and below a folder. Links to folders are followed, each folder once. BadInput: no such folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
        else:
            seen.add(real)
            folders.sort()  # of two links to one folder, the same one on every machine
            yield from (Path(place, name) for name in sorted(names))


def pick(paths: Iterable[Path], folder: Path, benchmark: str) -> list[Path]:
    """Of the files of one name below a folder that holds the downloads of several benchmarks, those whose path names
    the benchmark ("mmvet" is in MM-Vet/images); else the one directly in the folder; else all."""
    paths = list(paths)
    own = [path for path in paths if benchmark in re.sub("[^a-z0-9]", "", str(path.relative_to(folder)).lower())]
    return own or [path for path in paths if path.parent == folder] or paths
