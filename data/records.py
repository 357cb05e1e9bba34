"""Preference pairs on disk: one JSON object a line (JSONL, UTF-8).

    key              type     meaning
    id               string   unique in its file
    image            string   picture reference the answers are about
    prompt           string   question, without any image token
    chosen           string   preferred answer, y_w
    rejected         string   dispreferred answer, y_l (differs from `chosen`)
    rejected_image   string   optional (or null): picture reference v_l on which `chosen` is no longer right
    source           object   optional, free-form: where each part came from (method, seed, model, scores)

Any other key is refused, so a misspelt `rejected_image` cannot turn a vision loss into a text loss unnoticed.
A picture reference is a file path (absolute, or relative to the folder of the JSONL file) or `scene:SEED` /
`scene:SEED?without=dog,cat` (see data/scenes.py).

Readers look at the whole file before anything else happens and name all bad lines at once: a run must not die
in its third hour of a typo in line 20,000.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from data.images import image_size

PAIR_TEXTS = ("id", "image", "prompt", "chosen", "rejected")
PAIR_OPTIONAL = ("rejected_image", "source")
REFERENCES = ("image", "rejected_image")


def read_pairs(path: str | Path, needs: Collection[str] = ()) -> list[dict]:
    """Read and validate a pairs file.

    Args:
        path: the JSONL file.
        needs: optional keys that this run cannot do without, e.g. {"rejected_image"}.

    Returns the records in file order. Raises one ValueError that lists every bad line as `file:line: reason`.
    """
    unknown = set(needs) - set(PAIR_TEXTS + PAIR_OPTIONAL)
    if unknown:
        raise ValueError(f"pair records have no field {sorted(unknown)}")
    required = PAIR_TEXTS + tuple(key for key in PAIR_OPTIONAL if key in needs)
    return _read(Path(path), required, PAIR_OPTIONAL)


def read_images(path: str | Path) -> list[dict]:
    """Read and validate pictures to make pairs of: `id`, `image`, `prompt` and, optionally, `chosen`.

    Raises one ValueError that lists every bad line as `file:line: reason`.
    """
    return _read(Path(path), ("id", "image", "prompt"), ("chosen",))


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line; the file appears whole or not at all (temporary file, fsync, rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private to the user
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path, required: tuple[str, ...], optional: tuple[str, ...]) -> list[dict]:
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    rows, errors, first_line, checked = [], [], {}, {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        row, reasons = parse_line(line)
        if row is not None:
            reasons += problems(row, required, optional, path.parent, checked)
            name = row.get("id")
            if isinstance(name, str) and first_line.setdefault(name, number) != number:
                reasons.append(f"id {name!r} already used in line {first_line[name]}")
            rows.append(row)
        errors += [f"{path}:{number}: {reason}" for reason in reasons]
    if not rows and not errors:
        errors.append(f"{path}: no records")
    if errors:
        raise ValueError("\n".join(errors))
    return rows


def parse_line(line: bytes) -> tuple[dict | None, list[str]]:
    """One line -> (object, problems); (None, problems) when there is no object to look into."""
    twice: list[str] = []

    def no_repeats(items: list[tuple]) -> dict:
        keys = [key for key, _ in items]
        twice.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(items)

    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_repeats)
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 ({error.reason} at byte {error.start})"]
    except json.JSONDecodeError as error:
        return None, [f"not valid JSON ({error.msg} at column {error.colno})"]
    if not isinstance(row, dict):
        return None, [f"a JSON object is wanted, found {type(row).__name__}"]
    return row, [f"key {key!r} is given twice" for key in twice]


def problems(row: dict, required: tuple[str, ...], optional: tuple[str, ...], root: Path,
             checked: dict[str, str]) -> list[str]:
    """What is wrong with a record; relative pictures start at `root`, `checked` is kept from row to row."""
    return _check_fields(row, required, optional) + _check_images(row, root, checked)


def _check_fields(row: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> list[str]:
    reasons = []
    for key in dict.fromkeys(required + optional):
        value = row.get(key)
        if value is None:
            reasons += [f"{key!r} is missing"] if key in required else []
        elif key == "source":
            reasons += [] if isinstance(value, dict) else ["'source' must be a JSON object"]
        elif not isinstance(value, str):
            reasons.append(f"{key!r} must be a string, found {type(value).__name__}")
        elif not value.strip():
            reasons.append(f"{key!r} is empty")
    reasons += [f"unknown key {key!r}" for key in row if key not in required + optional]
    texts = row.get("chosen"), row.get("rejected")
    if all(isinstance(text, str) for text in texts) and texts[0].strip() == texts[1].strip() != "":
        reasons.append("'chosen' and 'rejected' are the same text")
    return reasons


def _check_images(row: dict, root: Path, checked: dict[str, str]) -> list[str]:
    """`checked` remembers the verdict ("" = good) of each reference, as pictures repeat."""
    reasons = []
    for key in REFERENCES:
        reference = row.get(key)
        if isinstance(reference, str) and reference.strip():
            if reference not in checked:
                checked[reference] = reference_problem(reference, root)
            reasons += [f"{key!r}: {checked[reference]}"] if checked[reference] else []
    return reasons


def reference_problem(reference: str, root: Path) -> str:
    """Why a picture reference cannot be opened, or "". Of a file only the header is read."""
    try:
        image_size(reference, root)
    except ValueError as error:
        return str(error)
    return ""
