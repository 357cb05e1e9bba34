"""Preference pairs on disk: one JSON object a line (JSONL, UTF-8).

    key              type     meaning
    id               string   unique in its file
    image            string   image reference the answers are about; or a list of several, in order
    prompt           string   question; see below for `<image>` in it
    chosen           string   preferred answer, y_w
    rejected         string   dispreferred answer, y_l (differs from `chosen`)
    rejected_image   string   optional (or null): image reference v_l on which `chosen` is no longer right; of several
                              images a list, too
    rejected_image_response  string   optional: the answer that is right for `rejected_image`, y_w' of SymMPO
    context          string   optional: beginning of the response, which all responses of the record continue
    source           object   optional, free-form: where each part came from (method, seed, model, scores)

Any other key is refused, so a misspelt `rejected_image` cannot turn a vision loss into a text loss unnoticed.
An image reference is a file path (absolute, or relative to the folder of the JSONL file) or `scene:SEED` /
`scene:SEED?without=dog,cat` (see data/scenes.py). An image record, where no answers are compared, has `id`,
`image`, `prompt` and, optionally, `chosen`, `context` and `source`.

With a `context` (pairs/sentinel.py) the answers are what comes after it, up to wherever they stop: the context is
given like the prompt and never scored, and no end token is scored after the answers, since the response goes on. An
empty context is one, too: the answers then begin the response.

One image is placed by the template (model/families); one `<image>` at either end of the prompt is taken away. Several
are where the prompt has an `<image>` for each, in order; without marks all are before it.

Readers look at the whole file before anything else happens, count all bad records and name the first SHOWN: a
run must not die in its third hour of a typo in line 20,000. So nothing passes that could not be written again,
shown or tokenised: half a character, NUL, texts of which nothing is visible, and in `source` what JSON lacks.
"""

import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

from common import SHOWN, BadInput, brief, written_whole
from data.images import IMAGE, image_size, references
from data.rows import Row, json_rows

IMAGE_TEXTS = ("id", "image", "prompt")
IMAGE_OPTIONAL = ("chosen", "context", "source")
PAIR_TEXTS = ("id", "image", "prompt", "chosen", "rejected")
PAIR_OPTIONAL = ("rejected_image", "rejected_image_response", "context", "source")
REFERENCES = ("image", "rejected_image")
MARK = re.compile(r"<\|?(?:img|image)\w*\|?>", re.IGNORECASE)  # <image>, <ImageHere>, <|image_pad|>, ...
TAGS = ("ASSISTANT:", "[/INST]")  # a question that ends so has a template (model/families) around it
INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # Unicode categories: spaces, controls, zero-width characters
MOST_IMAGES = 64  # of a record
DEEPEST = 50  # levels of `source`
LONGEST = 1024  # characters of a path; an image in base64 has more


def read_pairs(path: str | Path, needs: Collection[str] = ()) -> list[dict]:
    """Read and validate a pairs file in this format; data/formats.py reads others, too.

    Args:
        path: JSONL, or JSON (one list).
        needs: optional keys that this run cannot do without, e.g. {"rejected_image"}.

    Returns the records in file order. Raises BadInput as `collect`.
    """
    path = Path(path)
    return collect(path, json_rows(path), path.parent, {"rejected", *needs})


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def relocate(records: list[dict], root: Path, folder: Path) -> list[dict]:
    """Rewrite relative image paths, which start at `root`, so that they start at `folder`."""
    if root.resolve() == folder.resolve():
        return records

    def moved(path: object) -> object:
        if isinstance(path, list):
            return [moved(one) for one in path]
        stays = not isinstance(path, str) or not path or path.startswith("scene:") or os.path.isabs(path)
        return path if stays else os.path.relpath(root / path, folder)

    def move(row: dict) -> dict:
        return row | {key: moved(row[key]) for key in REFERENCES if key in row}

    records = [move(record) for record in records]
    for record in records:
        listed = (record.get("source") or {}).get("candidates")  # of pairs/adavip.py; others may mean anything
        if isinstance(listed, list) and all(isinstance(candidate, dict) for candidate in listed):
            record["source"] = {**record["source"], "candidates": [move(candidate) for candidate in listed]}
    return records


def pair_of(record: dict, source: dict, *, rejected_image: str | None = None, **texts: str) -> dict:
    """A pair record about the image and question of a record; `source` says how its texts were made."""
    asked = {key: record[key] for key in IMAGE_TEXTS}
    return {**asked, **texts, "rejected_image": rejected_image, "source": source}


def have_context(records: Iterable[dict]) -> bool:
    """Whether any record has a context, be it empty."""
    return any(record.get("context") is not None for record in records)


def continued(context: str, text: str) -> str:
    """A context and what continues it, with a space between them unless there is other white space."""
    context = context.rstrip(" ")
    apart = not context or context[-1].isspace() or text[:1].isspace()
    return context + text if apart else f"{context} {text}"


def collect(path: Path, rows: Iterable[Row], root: Path, needs: Collection[str] = (),
            hints: Mapping[str, str] = {}) -> list[dict]:
    """Check the rows of a file, which are records or cannot be.

    Args:
        root: folder that relative paths of images start from.
        needs: keys that must be there in addition to those of every record, e.g. {"rejected"}.
        hints: key -> what to do where it is missing.

    Returns the records in file order: pairs if the first one has a `rejected`, or `needs` says so, otherwise
    image records. Raises one BadInput that counts the bad ones and lists the first as `file:line: reason`.
    """
    if unknown := set(needs) - set(PAIR_TEXTS + PAIR_OPTIONAL):
        raise BadInput(f"pair records have no field {sorted(unknown)}")
    records, bad, first, keys, total = [], [], {}, None, 0
    flaw_of = cache(lambda reference: _reference_flaw(reference, root))  # images repeat
    for where, record, reasons in rows:
        total += 1
        if record is not None:
            keys = keys or _keys(record, needs)
            record = _plain(record)
            reasons = reasons + _check_fields(record, *keys, hints) + _check_several(record)
            reasons += _check_images(record, flaw_of)
            name = record.get("id")
            if isinstance(name, str) and first.setdefault(name, where) != where:
                reasons.append(f"id {brief(name)} already used in {first[name]}")
            records.append(record)
        if reasons:
            bad.append((where, reasons))
    if bad or not records:
        raise BadInput(_report(path, bad, total) or f"{path}: no records")
    return records


def _report(path: Path, bad: list[tuple[str, list[str]]], rows: int) -> str:
    """One line for each reason of the first bad rows; one for a reason that several rows have without exception."""
    common = set.intersection(*(set(reasons) for _, reasons in bad)) if 1 < rows == len(bad) else set()
    named = [(where, reason) for where, reasons in bad[:SHOWN] for reason in reasons]
    shared = dict.fromkeys(reason for _, reason in named if reason in common)
    lines = [f"{path}: all {rows:,} records: {_short(reason)}" for reason in shared]
    single = [f"{where}: {_short(reason)}" for where, reason in named if reason not in common]
    if single and len(bad) > SHOWN:
        single.append(f"{path}: and {len(bad) - SHOWN:,} more bad records ({len(bad):,} of {rows:,} are bad)")
    return "\n".join(lines + single)


def _plain(record: dict) -> dict:
    """The record with the only image of a list by itself, and without the mark of an only image."""
    only = {key: record[key][0] for key in REFERENCES if isinstance(record.get(key), list) and len(record[key]) == 1}
    record = record | only
    if isinstance(record.get("prompt"), str) and not isinstance(record.get("image"), list):
        record["prompt"] = without_mark(record["prompt"])
    return record


def without_mark(prompt: str) -> str:
    """A prompt without the `<image>` at its beginning or end: the template places the image."""
    bare = prompt.strip()
    if bare.startswith(IMAGE):
        return bare.removeprefix(IMAGE).lstrip()
    return bare.removesuffix(IMAGE).rstrip() if bare.endswith(IMAGE) else prompt


def _short(reason: str) -> str:
    """One line that can be printed, whatever the file put into it."""
    line = reason if len(reason) <= 500 else f"{reason[:250]} ... {reason[-250:]}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)


def _keys(record: dict, needs: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Required and optional keys of the file's records, by the kind of the first."""
    pair = "rejected" in record or not {"rejected", "rejected_image"}.isdisjoint(needs)
    required, optional = (PAIR_TEXTS, PAIR_OPTIONAL) if pair else (IMAGE_TEXTS, IMAGE_OPTIONAL)
    return required + tuple(key for key in optional if key in needs), optional


def pair_flaws(pair: dict) -> list[str]:
    """Why `read_pairs` would refuse a pair, wherever its images are; [] if it would not."""
    return _check_fields(pair, PAIR_TEXTS, PAIR_OPTIONAL, {})


def _check_fields(row: dict, required: tuple[str, ...], optional: tuple[str, ...],
                  hints: Mapping[str, str]) -> list[str]:
    reasons = []
    for key in dict.fromkeys(required + optional):
        value = row.get(key)
        if value is None:
            hint = f" ({hints[key]})" if key in hints else ""
            reasons += [f"{key!r} is missing{hint}"] if key in required else []
        elif key in REFERENCES and isinstance(value, list):
            reasons += [f"{key!r} {flaw}"] if (flaw := _list_flaw(value, key)) else []
        elif key != "source" and not isinstance(value, str):
            reasons.append(f"{key!r} must be a string, found {type(value).__name__}")
        elif flaw := _source_flaw(value) if key == "source" else _text_flaw(_said(row, key), key):
            reasons.append(f"{key!r} {flaw}")
    if unknown := [brief(key) for key in row if key not in required + optional]:
        reasons.append(f"unknown key {', '.join(unknown[:8])}" + ", ..." * (len(unknown) > 8))
    texts = row.get("chosen"), row.get("rejected")
    if all(isinstance(text, str) for text in texts) and texts[0].strip() == texts[1].strip() != "":
        reasons.append("'chosen' and 'rejected' are the same text")
    return reasons


def _said(row: dict, key: str) -> str:
    """A text of a record; the prompt without the marks of several images."""
    return row[key].replace(IMAGE, "") if key == "prompt" and isinstance(row.get("image"), list) else row[key]


def _list_flaw(images: list, key: str) -> str:
    """What is wrong with a list of images, or ""."""
    if not 0 < len(images) <= MOST_IMAGES:
        return f"lists {len(images):,} images, 1 to {MOST_IMAGES} are wanted"
    if odd := [image for image in images if not isinstance(image, str)]:
        return f"must list strings, found {type(odd[0]).__name__}"
    return next(filter(None, (_text_flaw(image, key) for image in images)), "")


def _check_several(row: dict) -> list[str]:
    """As many marks and rejected images as images, where there are several."""
    images, other, prompt = (row.get(key) for key in ("image", "rejected_image", "prompt"))
    reasons = []
    if images and isinstance(images, list) and isinstance(prompt, str) and prompt.count(IMAGE) not in (0, len(images)):
        reasons.append(f"'prompt' marks {prompt.count(IMAGE)} places with {IMAGE}, 'image' lists {len(images)} images")
    if images and other and len(references(images)) != len(references(other)):
        reasons.append(f"'rejected_image' names {len(references(other))} of {len(references(images))} images")
    return reasons


def _text_flaw(text: str, key: str = "") -> str:
    """What is wrong with a text, or ""."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, the lone surrogate {text[error.start]!r}"
    if "\0" in text:
        return "holds a NUL character"
    if key not in ("", "context") and all(unicodedata.category(character) in INVISIBLE for character in text):
        return "is empty"
    if key == "prompt" and (mark := MARK.search(text)):
        return f"contains {mark.group()}: only one {IMAGE} at either end is accepted; the template places the image"
    if key == "prompt" and text.rstrip().endswith(TAGS):
        return f"ends as a template does ({' or '.join(TAGS)}): the question alone is wanted"
    if key in ("chosen", "rejected", "rejected_image_response", "context") and IMAGE in text:
        return f"contains {IMAGE}"
    return ""


def _source_flaw(value: object, depth: int = 0) -> str:
    """Why `source`, or a part of it, cannot be written as JSON and read back, or ""."""
    if depth == 0 and not isinstance(value, dict):
        return "must be a JSON object"
    if depth > DEEPEST:
        return "is nested too deeply"
    if isinstance(value, dict):
        value = [part for item in value.items() for part in item]
    if isinstance(value, list):
        return next(filter(None, (_source_flaw(part, depth + 1) for part in value)), "")
    if isinstance(value, str):
        return _text_flaw(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value}, which JSON has not"
    if value is not None and not isinstance(value, int | float):
        return f"holds {type(value).__name__}, which JSON has not"
    return ""


def _check_images(row: dict, flaw_of: Callable[[str], str]) -> list[str]:
    named = [(key, reference) for key in REFERENCES for reference in references(row.get(key))[:MOST_IMAGES]
             if isinstance(reference, str) and not _text_flaw(reference, key)]
    return [f"{key!r}: {flaw}" for key, reference in dict.fromkeys(named) if (flaw := flaw_of(reference))]


def _reference_flaw(reference: str, root: Path) -> str:
    """Why an image reference cannot be opened, or "". Of a file only the header is read."""
    if re.match(r"[a-z][\w+.-]*://", reference, re.IGNORECASE):
        return f"{brief(reference)} is a URL: a path to a file is wanted"
    if len(reference) > LONGEST:
        return f"{len(reference):,} characters are no path: they start with {reference[:20]!r}"
    try:
        image_size(reference, root)
    except BadInput as error:
        return str(error)
    return ""
