"""What the benchmarks with a judge share: prompts, files of replies, several runs of the judge.

A scorer never asks: it reads a verdict from each reply by the released rule. A reply without one scores as the rule
says and is counted as `unparsed`. Several runs of the judge give the mean of each figure and its deviation, that of
the runs themselves (divided by their number, as numpy does by default).

Judge prompts are written here, after the released rules; another wording is another judge, so `rules` names their
version. `requests` takes the released template as `prompt`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev

from common import BadInput, brief, refuse
from data.names import as_id
from metrics.answers import TEXT_KEYS
from metrics.files import examples, read_json


def fill(prompt: str, **values: str) -> str:
    """A judge prompt with each {name} replaced by its value; {} takes the next value, in the order given.

    Braces inside a value, and other braces of the prompt, stay. Raises BadInput naming values without a place.
    """
    order, used = iter(values), set()

    def value(found: re.Match) -> str:
        name = found[1] or next(order, "")
        used.add(name)
        return values.get(name, found[0])

    text = re.sub(r"\{(\w*)\}", value, prompt)  # one pass: an answer may contain {question}
    if missing := [f"{{{name}}}" for name in values if name not in used]:
        raise BadInput(f"the judge prompt has no {', '.join(missing)}")
    return text


def field(row: object, key: str, kind: type = str):
    """row[key], a `kind`; BadInput says what it is instead."""
    if not isinstance(row, dict):
        raise BadInput(f"an object is wanted, found {brief(row)}")
    if key not in row:
        raise BadInput(f"has no {key!r}")
    if not isinstance(row[key], kind):
        raise BadInput(f"{key!r} must be a {kind.__name__}, found {brief(row[key])}")
    return row[key]


def table(path: Path) -> dict:
    """A filled JSON object."""
    if not isinstance(found := read_json(path), dict) or not found:
        raise BadInput(f"{path}: want a filled JSON object")
    return found


def numbered(path: Path, key: str | None = None) -> list[tuple]:
    """(number, item) of a JSON list, or of the list `key` of a JSON object."""
    found = read_json(path)
    items = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(items, list) or not items:
        raise BadInput(f"{path}: want a filled JSON list{f' {key!r}' if key else ''}")
    return list(enumerate(items, start=1))


def texts(row: object, key: str) -> list[str]:
    """row[key], a list of texts."""
    if wrong := [item for item in field(row, key, list) if not isinstance(item, str)]:
        raise BadInput(f"{key!r} must hold texts, found {brief(wrong[0])}")
    return row[key]


def key_of(row: object, keys: Sequence[str] = ("id", "question_id")) -> str:
    """The id under the first of these keys that the row has."""
    given = next((row[key] for key in keys if isinstance(row, dict) and row.get(key) is not None), None)
    if (name := as_id(given)) is None:
        raise BadInput(f"no id ({', '.join(keys)})" if given is None else f"{brief(given)} is no id")
    return name


def text_of(row: dict, keys: Sequence[str] = TEXT_KEYS) -> str:
    """The one text under these keys."""
    found = {row[key] for key in keys if isinstance(row.get(key), str)}
    if len(found) != 1:
        raise BadInput(f"want one text ({', '.join(keys)}), found {len(found)}")
    return found.pop()


def each(path: Path, items: Iterable[tuple], make: Callable) -> list:
    """make(item) of every (line, item). One BadInput lists all that `make` refuses as FILE:LINE."""
    made, problems = [], []
    for line, item in items:
        try:
            made.append(make(item))
        except BadInput as error:
            problems.append(f"{path}:{line}: {error}")
    refuse(problems)
    return made


def join(path: Path, items: Iterable[tuple], ids: Sequence[str], read: Callable, *, subset: bool = False) -> dict:
    """id -> value, in the order of `ids`, of (line, item) pairs; read(item) -> (id, value).

    subset: some ids may be missing, not all. Raises one BadInput with a line for each item that `read` refuses and
    each unknown or repeated id, and one for those that are missing.
    """
    known, first = set(ids), {}

    def value(numbered: tuple) -> tuple:
        line, item = numbered
        key, value = read(item)
        if key not in known:
            raise BadInput(f"unknown id {brief(key)} (known: {examples(ids)})")
        if key in first:
            raise BadInput(f"id {brief(key)} was already given at {first[key]}")
        first[key] = line
        return key, value

    found = dict(each(path, ((line, (line, item)) for line, item in items), value))
    missing = [key for key in ids if key not in found]
    if missing and not (subset and found):
        raise BadInput(f"{path}: {len(missing):,} of {len(ids):,} ids are missing: {examples(missing)}")
    return {key: found[key] for key in ids if key in found}


def unique(path: Path, rows: Sequence[dict]) -> list[dict]:
    """The rows, whose ids must differ."""
    join(path, enumerate(rows, start=1), list(dict.fromkeys(row["id"] for row in rows)), lambda row: (row["id"], row))
    return list(rows)


def check_images(rows: Iterable[dict], images: Path | None) -> None:
    """BadInput lists the rows' images that the folder lacks; None: no model is asked."""
    if images is not None:
        names = dict.fromkeys(row["image"] for row in rows)
        refuse(f"{images / name}: no such image" for name in names if not os.path.isfile(images / name))


def check_runs(replies: Sequence[Mapping[str, str]], wanted: Collection[str]) -> None:
    """BadInput unless there is a run, and each run replies to all that was asked."""
    if not replies:
        raise BadInput("no replies of a judge")
    for number, run in enumerate(replies, start=1):
        if missing := [key for key in wanted if key not in run]:
            raise BadInput(f"run {number} of the judge has no reply for {len(missing):,} ids: {examples(missing)}")


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict:
    """{mean, deviation}: of each figure, over the runs."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {"mean": {name: fmean(values) for name, values in columns.items()},
            "deviation": {name: pstdev(values) for name, values in columns.items()}}


def rounded(figures: Mapping[str, Mapping[str, float]], digits: int) -> dict:
    """`over_runs` for print."""
    return {part: {name: round(value, digits) for name, value in figures[part].items()} for part in figures}


def cells(scores: Mapping, names: Iterable[str], digits: int) -> tuple[str, ...]:
    """Figures for the screen: "36.3 ± 0.2", without the deviation where the judge ran once."""
    found = scores["rounded"]
    return tuple(f"{found['mean'][name]:.{digits}f}" + f" ± {found['deviation'][name]:.{digits}f}"
                 * (scores["runs"] > 1) for name in names)  # fmt: skip
