"""Preference data in the shapes that people have it in, to and from Plumbline's records.

    python -m data.formats rlaif-v.parquet pairs.jsonl         any of these -> Plumbline's
    python -m data.formats pairs.jsonl out.parquet --format trl

    format          a row holds                                                          becomes
    plumbline       data/records.py                                                      itself
    llava           id, image, conversations [{from: human | gpt, value}]                image record with `chosen`
    povid           the same and rejected_conversations (POVID, arXiv 2402.11411)        pair
    llama-factory   images, conversations up to the question, chosen and rejected as     pair
                    {from, value} or {role, content}; or: images, instruction, input,
                    chosen, rejected; or SENTINEL's: images, instruction, context,
                    chosen, rejected and nothing else
    ms-swift        images, messages [{role, content}], rejected_response or             pair
                    rejected_messages, perhaps rejected_images
    realign         image, retrieved_image, chosen and rejected as [{role, content}]     pair with rejected image
    rlhf-v          image or image_path, text = JSON of question, chosen, rejected       pair
    rlaif-v         image or image_path, question, chosen, rejected                      pair
    trl             images or image, prompt, chosen, rejected: texts or conversations    pair
    sentinel        image_path or image, question, context, y_win, y_lose; or {image_id: pair with context
                    [{question, context, y_win, y_lose}, ...], ...}, of Visual Genome

Without the rejected answer, or without any, a row of these is an image record. Files are JSONL, JSON (one list)
or Parquet, the last through pyarrow where it is installed; a folder means the Parquet files in it, in the
order of their names. An image is a path, which starts at the file's folder, or its bytes: raw, as {bytes, path}
or as a data URL. Bytes are written to a folder next to the file (the command: next to its output), each image
once, named by its content. Row groups are streamed, so a file may be larger than memory. The format is known from
the keys of the first row, or named.

A record is one image or several, one question and one answer. Of a conversation of several turns the first one is
taken, as later ones refer to what was said before; where the answers belong to a later one, or a system message comes
before the question, the row is a bad one, as is a row without an image. Several images are where the question has
`<image>` marks or image parts, as many as images; those that are all before the text need none. All bad rows are
counted, the first are listed as `file:row: reason`, rows counted from 1 (in JSONL: lines). Ids that a foreign file
repeats get a number appended.

TRL's columns are those of its vision DPO (`images`, conversational `prompt`, `chosen`, `rejected`). What it
has no column for (`id`, `context`, `rejected_images`, `rejected_image_response`) is written as an extra one, and read
back; `source` is not written. An empty text comes before images that are marked at the beginning of the prompt, to
tell them from those without marks. Answers after a context are written whole, with the context before them: under DPO
its log-probs cancel, but TRL also scores an end token after them.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from common import BadInput, parse_json, written_whole
from data.images import IMAGE, cut_at_images, open_image, references
from data.records import (
    REFERENCES,
    Row,
    brief,
    collect,
    continued,
    have_context,
    json_rows,
    relocate,
    without_mark,
    write_jsonl,
)

QUESTION, ANSWER = ("human", "user"), ("gpt", "assistant")
ANSWERS = ("context", "chosen", "rejected", "rejected_image", "rejected_image_response", "source")
SENTINEL = {"instruction", "context", "chosen", "rejected", "images"}  # in its files for LLaMA-Factory
ORIGIN = ("ds_name", "origin_dataset", "origin_split")  # what RLHF-V and RLAIF-V say about a row's making


class Data(NamedTuple):
    """What a file holds."""

    records: list[dict]
    format: str  # a key of FORMATS
    root: Path  # folder that relative paths of images start from


def load(path: Path | str, format: str | None = None, root: Path | str | None = None,
         needs: Collection[str] = (), *, hints: Mapping[str, str] = {}, answers: bool = True,
         images: Path | None = None) -> Data:
    """Read and validate preference data of any known format.

    Args:
        path: JSONL, JSON or Parquet file, or a folder of Parquet files.
        format: a key of FORMATS; None goes by the keys of the first row.
        root: folder that relative paths of images start from, before and after; None is that of the file.
        needs: keys that must be there, e.g. {"rejected", "rejected_image"}.
        hints: key -> what to do where it is missing.
        answers: keep the answers; without them, all records are image records of `id`, `image` and `prompt`.
        images: folder for images that the file carries; None: next to it.

    Returns pair records or image records (of rows without a rejected answer) in file order. Raises one BadInput
    that counts all bad rows and lists the first as `file:row: reason`.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise BadInput(f"unknown format {format!r}, there are {', '.join(FORMATS)}")
    root = Path(root) if root is not None else path if path.is_dir() else path.parent
    rows, first = _rows(path, root), []
    while format is None and (row := next(rows, None)):
        first.append(row)
        format = detect(row[1], row[0]) if row[1] is not None else None
    records = _convert(chain(first, rows), format, root, answers, images)
    return Data(collect(path, records, root, needs, hints), format, root)


def write(path: Path | str, records: list[dict], format: str = "plumbline",
          root: Path | str | None = None) -> None:
    """Write records as Plumbline's JSONL or with TRL's columns; the file appears whole or not at all.

    Args:
        path: for "trl" a name ending in .parquet, with the images inside, or .jsonl, with absolute paths.
        records: for "trl" pair records.
        root: folder that relative paths of images start from; None is that of the file. In Plumbline's file they
            start from its own folder.
    Raises BadInput naming what cannot be written.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if format not in WRITTEN:
        raise BadInput(f"cannot write format {format!r}, only {' and '.join(WRITTEN)}")
    if format == "plumbline" and path.suffix == ".parquet":
        raise BadInput(f"{path}: a Parquet file is written with --format trl")
    if format == "trl" and any(record.get("rejected") is None for record in records):
        raise BadInput(f"{path}: TRL's columns are for pairs, not all records have a rejected answer")
    if format == "plumbline":
        write_jsonl(path, relocate(records, root, path.parent))
    elif path.suffix == ".parquet":
        _write_parquet(path, records, root)
    else:
        write_jsonl(path, [_trl_row(record, lambda reference: _absolute(reference, root)) for record in records])


def detect(row: dict, where: str = "row") -> str:
    """Name of the format that a row's keys show. BadInput when none fits."""
    filled = {key: value for key, value in row.items() if value is not None}
    for name, format in FORMATS.items():
        if format.fits(filled):
            return name
    keys = ", ".join(brief(key) for key in list(row)[:12]) + ", ..." * (len(row) > 12)
    raise BadInput(f"{where}: the keys {keys} are those of no known format ({', '.join(FORMATS)})")


# Rows of a file


def _rows(path: Path, root: Path) -> Iterator[Row]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: a folder without .parquet files")
    for file in files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _by_image(json_rows(file), root)


def _by_image(rows: Iterable[Row], root: Path) -> Iterator[Row]:
    """Rows as they are; of an object {image_id: rows of that image}, as SENTINEL has it, these rows."""
    for where, row, reasons in rows:
        lists = list((row or {}).values())
        pairs = [pair for pairs in lists if isinstance(pairs, list) for pair in pairs]
        if not pairs or not all(isinstance(value, list) for value in lists) \
                or not all(isinstance(pair, dict) and "y_win" in pair for pair in pairs):
            yield where, row, reasons
            continue
        file, number = where.rpartition(":")[0], count(1)
        for image, pairs in row.items():
            about = {"image_id": image, "image_path": _visual_genome(image, root)}
            yield from ((f"{file}:{next(number)}", {**about, **pair}, []) for pair in pairs)


def _visual_genome(image: str, root: Path) -> str:
    """Path of an image of Visual Genome, which comes in two folders."""
    paths = [f"{folder}/{image}.jpg" for folder in ("VG_100K", "VG_100K_2")]
    return next((path for path in paths if os.path.exists(root / path)), paths[0])  # False for what is no path


def _parquet_rows(path: Path, batch: int = 64) -> Iterator[Row]:
    if not path.is_file():
        raise BadInput(f"{path}: {'not a regular file' if path.exists() else 'not found'}")
    parquet, number = _parquet(path), 0
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch)
        for number, row in enumerate((row for rows in batches for row in rows.to_pylist()), 1):
            yield f"{path}:{number}", row, []
    except Exception as error:  # pyarrow's own, Python's on texts that are no UTF-8, and others on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not a readable Parquet file, after row {number} ({reason})") from None


def _parquet(path: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise BadInput(f"{path}: Parquet needs pyarrow, which is not installed (pip install pyarrow)") from None
    return parquet


# Rows to records


def _convert(rows: Iterable[Row], format: str | None, root: Path, answers: bool,
             images: Path | None) -> Iterator[Row]:
    """Rows -> records; a row that cannot become one says why."""
    names: dict[str, int] = {}
    for where, row, reasons in rows:
        if row is not None:
            try:
                row = FORMATS[format].convert(row, Images(where, root, images))
                if format != "plumbline":
                    row = _named({key: value for key, value in row.items() if value is not None}, where, names)
                if not answers:
                    row = {key: value for key, value in row.items() if key not in ANSWERS}
            except BadInput as error:
                row, reasons = None, [str(error)]
        yield where, row, reasons


class Images:
    """Turns what a row says about its images into references; writes out an image it carries itself."""

    def __init__(self, where: str, root: Path, images: Path | None = None):
        file = Path(where.rpartition(":")[0])
        self.folder, self.root = images or file.with_name(f"{file.stem}-images"), root

    def __call__(self, value: object) -> str | list[str]:
        """The reference of one image, or a list of those of several."""
        if isinstance(value, list) and len(value) > 1:
            return [self._reference(image) for image in value]
        return self._reference(next(iter(value), None) if isinstance(value, list) else value)

    def _reference(self, value: object) -> str:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value.startswith("data:"):
            try:
                value = base64.b64decode(value.partition(";base64,")[2], validate=True)
            except ValueError:
                value = b""
        if isinstance(value, bytes):
            return self._save(value)
        if value is not None and not isinstance(value, str):
            raise BadInput(f"the image must be a path or bytes, found {type(value).__name__}")
        if not value or not value.strip():
            raise BadInput("no image: 'image' is missing or empty")
        return value

    def _save(self, data: bytes) -> str:
        """Bytes -> file named by their content: each image is kept once, reading again writes nothing."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                kind = (image.format or "").lower()
        except UnidentifiedImageError:
            raise BadInput("its image is not readable (no format that Pillow knows)") from None
        except Exception as error:  # Pillow's readers raise almost anything on broken files
            raise BadInput(f"its image is not readable ({str(error) or type(error).__name__})") from None
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{'jpg' if kind == 'jpeg' else kind}"
        try:
            if not path.exists():
                with written_whole(path) as temporary:
                    temporary.write_bytes(data)
        except OSError as error:
            raise BadInput(f"its image cannot be stored in {self.folder} ({error.strerror}); python -m"
                           " data.formats writes records and images elsewhere") from None
        return os.path.relpath(path, self.root)


def _plumbline(row: dict, image_of: Images) -> dict:
    return row | {key: image_of(row[key]) for key in REFERENCES if row.get(key)
                  and all(isinstance(image, bytes | dict | str) for image in references(row[key]))}


def _llava(row: dict, image_of: Images) -> dict:
    question, answer = _turn(row.get("conversations"), "conversations")
    return {"id": row.get("id"), "image": image_of(row.get("images") or row.get("image")), "prompt": question,
            "chosen": answer}


def _povid(row: dict, image_of: Images) -> dict:
    rejected = _same_question(row, "conversations", "rejected_conversations")
    return {**_llava(row, image_of), "rejected": rejected, "source": {"format": "povid"}}


def _llama_factory(row: dict, image_of: Images) -> dict:
    for key in ("system", "history", "tools"):
        if row.get(key):
            raise BadInput(f"{key!r} is filled: a record is one question and its answers")
    if row.get("context") and {key for key, value in row.items() if value is not None} != SENTINEL:
        raise BadInput("'context' is filled: it is the beginning of the responses only in SENTINEL's files, whose rows"
                       f" have {', '.join(sorted(SENTINEL))} alone")
    if "instruction" in row:
        question = "\n".join(_question(row[key]) for key in ("instruction", "input") if row.get(key))
    else:
        key = "conversations" if row.get("conversations") is not None else "messages"
        question = _question(_said(row.get(key), QUESTION, key))
    return {"id": row.get("id"), "image": image_of(row.get("images") or row.get("image")), "prompt": question,
            "context": row.get("context") or None, "chosen": _answer(row, "chosen", "output"),
            "rejected": _answer(row, "rejected"), "source": {"format": "llama-factory"}}


def _ms_swift(row: dict, image_of: Images) -> dict:
    question, chosen = _turn(row.get("messages"), "messages")
    rejected = _answer(row, "rejected_response")
    if row.get("rejected_messages") is not None:
        rejected = _same_question(row, "messages", "rejected_messages")
    elif rejected is not None and len(row["messages"]) > 2:
        raise BadInput("'rejected_response' answers the last of several questions; a record has one")
    image, other = image_of(row.get("images") or row.get("image")), row.get("rejected_images")
    other = image_of(other) if other else None
    return {"id": row.get("id"), "image": image, "prompt": question, "chosen": chosen, "rejected": rejected,
            "rejected_image": other if other != image else None, "source": {"format": "ms-swift"}}


def _realign(row: dict, image_of: Images) -> dict:
    question, chosen = _turn(row.get("chosen"), "chosen")
    return {"id": row.get("id"), "image": image_of(row.get("image")), "prompt": question, "chosen": chosen,
            "rejected": _same_question(row, "chosen", "rejected"),
            "rejected_image": image_of(row.get("retrieved_image")), "source": {"format": "realign"}}


def _rlhf_v(row: dict, image_of: Images) -> dict:
    try:
        texts = parse_json(row.get("text").encode("utf-8", "surrogatepass"))
    except (AttributeError, ValueError):
        texts = None
    if not isinstance(texts, dict):
        raise BadInput("'text' is not a JSON object of question, chosen and rejected")
    return {**_rlaif_v({**row, **texts}, image_of), "source": {"format": "rlhf-v", **_origin(row)}}


def _rlaif_v(row: dict, image_of: Images) -> dict:
    return {"id": row.get("idx", row.get("id")), "image": image_of(row.get("image") or row.get("image_path")),
            "prompt": _question(row.get("question")), "chosen": row.get("chosen"),
            "rejected": row.get("rejected"), "source": {"format": "rlaif-v", **_origin(row)}}


def _sentinel(row: dict, image_of: Images) -> dict:
    return {"id": row.get("image_id"), "image": image_of(row.get("image_path") or row.get("image")),
            "prompt": _question(row.get("question")), "context": row.get("context") or None,
            "chosen": row.get("y_win"), "rejected": row.get("y_lose"), "source": {"format": "sentinel"}}


def _trl(row: dict, image_of: Images) -> dict:
    if row.get("prompt") is None:  # the prompt is at the start of both conversations
        question, chosen = _turn(row.get("chosen"), "chosen")
        rejected = _same_question(row, "chosen", "rejected")
    else:
        question = _question(_said(row["prompt"], QUESTION, "prompt"))
        chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    context, other = row.get("context"), row.get("rejected_images")
    if context is not None:
        context, chosen, rejected = _parted(context, chosen, rejected)
    return {"id": row.get("id", row.get("idx")), "image": image_of(row.get("images") or row.get("image")),
            "prompt": question, "context": context, "chosen": chosen, "rejected": rejected,
            "rejected_image": image_of(other) if other else None,
            "rejected_image_response": row.get("rejected_image_response"), "source": {"format": "trl"}}


def _parted(context: object, *answers: str | None) -> tuple[str | None, ...]:
    """The context and what each answer says after it, as `_trl_row` joined them; None and the answers where they do not
    begin with it: a column of that name may hold anything."""
    start = context.rstrip(" ") if isinstance(context, str) else None
    if start is None or not all(answer and answer.startswith(start) for answer in answers):
        return None, *answers
    return context, *(answer.removeprefix(start).removeprefix(" ") for answer in answers)


class Format(NamedTuple):
    """How a row is recognised, and how it becomes a record."""

    fits: Callable[[dict], bool]  # do the (filled) keys of a row belong to this format?
    convert: Callable[[dict, Images], dict]


FORMATS = {  # the first that fits is taken
    "povid": Format(lambda row: "rejected_conversations" in row, _povid),
    "llama-factory": Format(lambda row: "instruction" in row or (
        "chosen" in row and not {"conversations", "messages"}.isdisjoint(row)), _llama_factory),
    "llava": Format(lambda row: "conversations" in row, _llava),
    "ms-swift": Format(lambda row: "messages" in row, _ms_swift),
    "realign": Format(lambda row: "retrieved_image" in row, _realign),
    "trl": Format(lambda row: {"images", "prompt"} <= row.keys() or isinstance(row.get("prompt"), list)
                  or isinstance(row.get("chosen"), list), _trl),
    "sentinel": Format(lambda row: {"y_win", "y_lose"} <= row.keys(), _sentinel),
    "rlaif-v": Format(lambda row: "question" in row, _rlaif_v),
    "rlhf-v": Format(lambda row: "text" in row and bool({"image", "image_path"} & row.keys()), _rlhf_v),
    "plumbline": Format(lambda row: {"image", "prompt"} <= row.keys(), _plumbline),
}
WRITTEN = ("plumbline", "trl")


def _question(text: object) -> str:
    if not isinstance(text, str):
        raise BadInput(f"the question must be a string, found {type(text).__name__}")
    return text.strip()


def _turn(messages: object, key: str) -> tuple[str, str | None]:
    """First question of a conversation, and the answer if there is one."""
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{key!r} is not a conversation of a question and an answer")
    return (_question(_said(messages[:1], QUESTION, key)),
            _said(messages[1:2], ANSWER, key) if len(messages) > 1 else None)


def _same_question(row: dict, chosen: str, rejected: str) -> str:
    """The rejected answer, to the same question as the chosen one."""
    question, answer = _turn(row.get(rejected), rejected)
    if without_mark(question) != without_mark(_turn(row.get(chosen), chosen)[0]):
        raise BadInput(f"{chosen!r} and {rejected!r} ask different questions")
    return answer


def _answer(row: dict, *keys: str) -> str | None:
    """The answer under the first key that is filled."""
    return next((_said(row[key], ANSWER, key) for key in keys if row.get(key) is not None), None)


def _said(value: object, roles: tuple[str, str], key: str) -> str:
    """A text, or that of a message or a conversation of one."""
    if isinstance(value, list):
        if len(value) != 1:
            raise BadInput(f"{key!r} has {len(value)} messages, one is wanted")
        value = value[0]
        if not isinstance(value, dict):
            raise BadInput(f"{key!r}: a message must be an object, found {type(value).__name__}")
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        if role not in roles:
            raise BadInput(f"{key!r}: a message of the {roles[1]} is wanted, found one of {brief(role)}")
        value = value.get("content", value.get("value"))
        value = _joined(value) if isinstance(value, list) else value
    if not isinstance(value, str):
        raise BadInput(f"{key!r} must be a text, found {type(value).__name__}")
    return value


def _joined(parts: list) -> object:
    """The text of a message's parts, or the parts where they are none. Images between texts, of several, are marked."""
    texts = [part.get("text") or "" if isinstance(part, dict) else part for part in parts]
    images = [isinstance(part, dict) and part.get("type") == "image" for part in parts]
    if images[: sum(images)].count(False):  # not all at the beginning
        texts = [IMAGE if image and sum(images) > 1 else text for image, text in zip(images, texts)]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else parts


def _origin(row: dict) -> dict:
    """What the row says about its making; `origin_split` is JSON inside a string in some files."""
    found = {key: row[key] for key in ORIGIN if row.get(key) is not None}
    if isinstance(found.get("origin_split"), str):
        with suppress(BadInput):  # a plain string is fine, too
            found["origin_split"] = parse_json(found["origin_split"].encode())
    return found


def _named(record: dict, where: str, names: dict[str, int]) -> dict:
    """Give a record an id, unique in its file: its own or the row's number; repeated ones get -2, -3, ..."""
    name = record.get("id", f"row-{where.rpartition(':')[2]}")
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise BadInput(f"the id must be a string or a whole number, found {type(name).__name__}")
    name = base = str(name)
    while name in names:
        names[base] += 1
        name = f"{base}-{names[base]}"
    names[name] = 1
    return {"id": name, **{key: value for key, value in record.items() if key != "id"}}


# Records to TRL's rows


def _trl_row(record: dict, image_of: Callable[[str], object]) -> dict:
    def said(role: str, *parts: dict) -> list[dict]:
        return [{"role": role, "content": list(parts)}]

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    def answer(key: str) -> dict:
        return text(continued(record.get("context") or "", record[key]))

    images = [image_of(reference) for reference in references(record["image"])]
    prompt = cut_at_images(record["prompt"], len(images))
    if len(images) > 1 and record["prompt"].startswith(IMAGE):
        prompt = ["", *prompt]  # an empty text tells marks at the beginning from none
    row = {"id": record["id"], "images": images,
           "prompt": said("user", *({"type": "image"} if part == IMAGE else text(part) for part in prompt)),
           "chosen": said("assistant", answer("chosen")), "rejected": said("assistant", answer("rejected"))}
    if other := record.get("rejected_image"):
        row["rejected_images"] = list(map(image_of, references(other)))
    return row | {key: record[key] for key in ("context", "rejected_image_response") if record.get(key) is not None}


def _absolute(reference: str, root: Path) -> str:
    if reference.startswith("scene:"):
        raise BadInput(f"{reference}: a drawn image has no file to point to; write a .parquet file")
    return str((root / reference).resolve())


def _embedded(reference: str, root: Path) -> dict:
    """The image itself: a file's own bytes, a drawn scene as PNG."""
    if not reference.startswith("scene:"):
        return {"bytes": (root / reference).read_bytes(), "path": Path(reference).name}
    buffer = io.BytesIO()
    open_image(reference).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write_parquet(path: Path, records: list[dict], root: Path, group: int = 64) -> None:
    """`group` records at a time, so that not all images are in memory; `datasets` decodes the images."""
    parquet = _parquet(path)
    import pyarrow as pa

    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    said = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    types = {"id": pa.string(), "images": image, "prompt": said, "chosen": said, "rejected": said}
    if any(record.get("rejected_image") for record in records):
        types["rejected_images"] = image
    if any(record.get("rejected_image_response") for record in records):
        types["rejected_image_response"] = pa.string()
    if have_context(records):
        types["context"] = pa.string()
    text = {"dtype": "string", "_type": "Value"}
    talk = [{"role": text, "content": [{"type": text, "text": text}]}]
    images = {"feature": {"_type": "Image"}, "_type": "Sequence"}
    features = {key: images if kind is image else text if kind == pa.string() else talk
                for key, kind in types.items()}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(types.items()), metadata=note)

    with written_whole(path) as temporary, parquet.ParquetWriter(temporary, schema) as file:
        for start in range(0, len(records), group):
            rows = [_trl_row(record, lambda reference: _embedded(reference, root))
                    for record in records[start : start + group]]
            file.write_table(pa.Table.from_pylist(rows, schema=schema))


def main() -> None:
    """The command line; exit status 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m data.formats", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="IN", help="JSONL, JSON, Parquet or a folder of Parquet files")
    parser.add_argument("out", type=Path, metavar="OUT", help="for trl .parquet or .jsonl")
    parser.add_argument("--format", choices=WRITTEN, default=WRITTEN[0], help="of OUT (default: %(default)s)")
    parser.add_argument("--read-as", choices=FORMATS, help="format of IN (default: by the keys of its first row)")
    arguments = parser.parse_args()
    out = arguments.out
    try:
        data = load(arguments.data, arguments.read_as, images=out.with_name(f"{out.stem}-images"))
        write(out, data.records, arguments.format, data.root)
    except BadInput as error:
        print(f"data.formats: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{out}: {len(data.records):,} records, read as {data.format}")


if __name__ == "__main__":
    main()
