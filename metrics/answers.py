"""Answers, replies and images joined with the questions of a benchmark: by id, never by order.

An id that is missing, unknown or given twice is refused, and so is an image without a file: a shifted or shortened
file would otherwise give a plausible, wrong score.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from PIL import Image

from common import BadInput, brief, refuse
from data.names import Names, as_id
from metrics.files import as_object, below, examples, pick, read_jsonl

ID_KEYS = ("id", "question_id", "questionId", "image_id")
TEXT_KEYS = ("text", "answer", "response", "caption", "model_prediction", "prediction", "model_answer")
Value = TypeVar("Value")


def id_of(entry: object, keys: Sequence[str] = ID_KEYS) -> str:
    """The first of these keys that the entry has, as an id. BadInput if there is none."""
    value = next((entry[key] for key in keys if as_object(entry).get(key) is not None), None)
    if (name := as_id(value)) is None:
        raise BadInput(f"no id ({', '.join(keys)})" if value is None else f"{brief(value)} is no id")
    return name


def text_of(entry: dict) -> str:
    """The one text of an answer. BadInput where it has none, or several that differ."""
    texts = {entry[key] for key in TEXT_KEYS if isinstance(entry.get(key), str)}
    if len(texts) != 1:
        raise BadInput(f"want one text ({', '.join(TEXT_KEYS)}), found {len(texts)}")
    return texts.pop()


def image_of(rows: Sequence[dict], keys: Sequence[str]) -> Callable[[dict], str]:
    """Entry -> id of its row, whose image these keys of the entry name in any way of data/names.py."""
    ids = {row["id"]: row["image_id"] for row in rows if "image_id" in row}
    names = Names("questions", [row["id"] for row in rows], ids)
    return lambda entry: names.find(name := id_of(entry, keys)) or name


def join(path: Path, rows: Sequence[dict], key: Callable[[object], str | None] = id_of,
         value: Callable[[object], Value] = text_of, *, entries: Iterable[tuple[str, object]] | None = None,
         subset: bool | None = None) -> dict[str, Value]:
    """id -> value of exactly the given rows, in their order.

    Args:
        key: an entry -> id of its row, None for an entry that does not count; raises BadInput.
        value: an entry -> what is joined; raises BadInput.
        entries: (FILE:LINE, entry) of each; None reads `path`, JSONL or one JSON list.
        subset: some ids may be missing, not all; None: no, and there is no --subset for this kind of file.

    Raises BadInput with one line for each bad entry and each unknown or repeated id, and one for what is missing.
    """
    ids = [row["id"] for row in rows]
    known, first, found, problems = set(ids), {}, {}, []
    for where, entry in read_jsonl(path) if entries is None else entries:
        try:
            if (name := key(entry)) is None:
                continue
            if name not in known:
                raise BadInput(f"unknown id {brief(name)} (known: {examples(ids)})")
            if name in first:
                raise BadInput(f"id {brief(name)} was already given at {first[name]}")
            first[name] = where
            found[name] = value(entry)
        except BadInput as error:
            problems.append(f"{where}: {error}")
    missing = [name for name in ids if name not in found]
    if missing and not problems and not (subset and found):  # else what is missing may be in a bad line
        hint = "; --subset scores the answered ones alone" if subset is False else ""
        problems.append(f"{path}: {len(missing):,} of {len(ids):,} ids are missing: {examples(missing)}{hint}")
    refuse(problems)
    return {name: found[name] for name in ids if name in found}


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> text, of JSONL or a JSON list with one of ID_KEYS and of TEXT_KEYS. Raises BadInput as `join`."""
    return join(path, rows, subset=subset)


def with_files(rows: Sequence[dict], images: Path | None, benchmark: str, *, other: str = "image") -> list[dict]:
    """The rows, each `image` a file in or below the folder `images`, relative to it. As they are without a folder: no
    model is asked then. Raises BadInput that lists the images without a file, or with several.

    Args:
        benchmark: in the path of its images, where there are several of one name.
        other: key of a row that names its image, too.
    """
    if images is None:
        return list(rows)
    folder, found, problems = _Folder(images, benchmark), {None: None}, []
    for row in rows:
        if (name := row["image"]) not in found:
            try:
                found[name] = folder.find(name) or folder.find(row[other])
                problems += [] if found[name] else [f"{images / name}: no such image"]
            except BadInput as error:
                found[name] = problems.append(str(error))
    refuse(problems)
    return [{**row, "image": found[row["image"]]} for row in rows]


class _Folder:
    """Image files, found by name: the relative path itself, else a path below that ends in it, else a file directly in
    the folder that is called so in another way (data/names.py)."""

    def __init__(self, root: Path, benchmark: str):
        if not root.is_dir():
            raise BadInput(f"{root}: no such folder")
        self.root, self.benchmark = root, benchmark

    def find(self, name: str) -> str | None:
        """Path relative to the folder, None if there is no such image; BadInput if there are several."""
        if os.path.isfile(self.root / name):
            return name
        same = self._below.get(PurePosixPath(name).name, ())
        paths = pick((path for path in same if path.as_posix().endswith(f"/{name}")), self.root, self.benchmark)
        if len(paths) > 1:
            raise BadInput(f"{self.root}: {brief(name)} may be {examples([str(path) for path in paths])}")
        return paths[0].relative_to(self.root).as_posix() if paths else self._names.find(name)

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in below(self.root):
            found.setdefault(path.name, []).append(path)
        return found

    @cached_property
    def _names(self) -> Names:
        suffixes = {"", *Image.registered_extensions()}  # there may be texts of the same names
        return Names(self.root, sorted(path.name for path in self.root.iterdir() if path.suffix.lower() in suffixes))
