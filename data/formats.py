"""Preference data in the shapes that people have it in, to and from Plumbline's records.

    format      a row holds                                                        becomes
    plumbline   data/records.py                                                    itself
    llava       id, image, conversations [{from: human | gpt, value}]              image record with `chosen`
    povid       the same and rejected_conversations (POVID, arXiv 2402.11411)      pair
    realign     image, retrieved_image, chosen and rejected as [{role, content}]   pair with rejected image
    rlhf-v      image or image_path, text = JSON of question, chosen, rejected     pair
    rlaif-v     image or image_path, question, chosen, rejected                    pair
    trl         images or image, prompt, chosen, rejected: texts or conversations  pair

Files are JSONL, JSON (one list) or Parquet, the last through pyarrow where it is installed; a folder stands
for the Parquet files in it, in the order of their names. Pictures that a Parquet file carries as bytes are
written to a folder beside it, each once, named by its content; row groups are streamed, so a file may be
larger than memory. The format is known from the keys of the first row, or named.

A record is one question and one answer. `<image>` is taken out of the question; of a conversation of
several turns the first one is taken, as later ones refer to what was said before. Rows without a picture
are bad rows. All bad rows are listed at once, as `file:row: reason`, rows counted from 1 (in JSONL: lines).
Ids that a foreign file repeats get a number behind them.

TRL's columns are those of its vision DPO (`images`, conversational `prompt`, `chosen`, `rejected`). What it
has no column for (`id`, `rejected_images`) is written as an extra one, and read back; `source` is not
written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.images import open_image
from data.records import PAIR_OPTIONAL, PAIR_TEXTS, parse_line, problems, write_jsonl

IMAGE = "<image>"
QUESTION, ANSWER = ("human", "user"), ("gpt", "assistant")
ORIGIN = ("ds_name", "origin_dataset", "origin_split")  # what RLHF-V and RLAIF-V say about a row's making

Row = tuple[str, dict | None, list[str]]  # where it stands, what it holds, what is wrong with it


def read(path: Path | str, format: str | None = None, root: Path | str | None = None,
         needs: Collection[str] = ()) -> list[dict]:
    """Read and validate preference data of any known format.

    Args:
        path: JSONL, JSON or Parquet file, or a folder of Parquet files.
        format: a key of FORMATS; None goes by the keys of the first row.
        root: folder that relative paths of pictures start from, before and after; None is that of the file.
        needs: optional keys of a pair record that must be there, e.g. {"rejected_image"}.

    Returns pair records or image records (of "llava", and of "plumbline" rows without `rejected`) in file
    order. Raises one ValueError that lists every bad row as `file:row: reason`.
    """
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise ValueError(f"unknown format {format!r}, there are {', '.join(FORMATS)}")
    root = Path(root) if root is not None else path if path.is_dir() else path.parent
    records, errors, names, checked, keys = [], [], {}, {}, None
    for where, row, reasons in _rows(path):
        if row is not None:
            format = format or detect(row, where)
            try:
                record = FORMATS[format].convert(row, Pictures(where, root))
            except ValueError as error:
                reasons.append(str(error))
            else:
                record = record if format == "plumbline" else _named(record, where, names)
                keys = keys or _keys(record, needs)
                reasons += problems(record, *keys, root, checked) + _markers(record)
                if format == "plumbline" and names.setdefault(str(record.get("id")), where) != where:
                    reasons.append(f"id {record.get('id')!r} already used in {names[str(record.get('id'))]}")
                records.append(record)
        errors += [f"{where}: {reason}" for reason in reasons]
    if errors or not records:
        raise ValueError("\n".join(errors) or f"{path}: no records")
    return records


def write(path: Path | str, records: list[dict], format: str = "plumbline",
          root: Path | str | None = None) -> None:
    """Write records as Plumbline's JSONL or with TRL's columns; the file appears whole or not at all.

    Args:
        path: for "trl" a name ending in .parquet, with the pictures inside, or .jsonl, with absolute paths.
        records: for "trl" pair records.
        root: folder that relative paths of pictures start from; None is that of the file. Unused by
        "plumbline".
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if format == "plumbline":
        write_jsonl(path, records)
    elif format != "trl":
        raise ValueError(f"cannot write format {format!r}, only plumbline and trl")
    elif path.suffix == ".parquet":
        _write_parquet(path, records, root)
    else:
        write_jsonl(path, [_trl_row(record, lambda reference: _absolute(reference, root))
                           for record in records])


def detect(row: dict, where: str = "row") -> str:
    """Name of the format that a row's keys show. ValueError when none fits."""
    filled = {key: value for key, value in row.items() if value is not None}
    for name, format in FORMATS.items():
        if format.fits(filled):
            return name
    raise ValueError(f"{where}: the keys {', '.join(row)} are those of no known format "
                     f"({', '.join(FORMATS)})")


# Rows of a file


def _rows(path: Path) -> Iterator[Row]:
    if not path.exists():
        raise ValueError(f"{path}: not found")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    for file in files:
        read_rows = _parquet_rows if file.suffix == ".parquet" else _json_rows
        yield from read_rows(file)


def _json_rows(path: Path) -> Iterator[Row]:
    """A file that starts with `[` is one list, any other has one object a line."""
    data = path.read_bytes()
    if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        for number, line in enumerate(data.splitlines(), 1):
            if line.strip():
                yield f"{path}:{number}", *parse_line(line)
        return
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    for number, row in enumerate(rows, 1):
        fine = isinstance(row, dict)
        found = [] if fine else [f"a JSON object is wanted, found {type(row).__name__}"]
        yield f"{path}:{number}", row if fine else None, found


def _parquet_rows(path: Path, batch: int = 64) -> Iterator[Row]:
    parquet = _parquet(path)
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error})") from None
    number = 0
    for rows in file.iter_batches(batch):
        for row in rows.to_pylist():
            number += 1
            yield f"{path}:{number}", row, []


def _parquet(path: Path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow, which is not installed "
                         "(pip install pyarrow)") from None
    return parquet


# Rows to records


class Pictures:
    """Turns what a row says about its picture into a reference; writes out a picture it carries itself."""

    def __init__(self, where: str, root: Path):
        self.file, self.root = Path(where.rpartition(":")[0]), root

    def __call__(self, value: object) -> str:
        if isinstance(value, list):
            if len(value) != 1:
                raise ValueError(f"{len(value)} pictures; a record has one")
            value = value[0]
        if isinstance(value, dict):
            value = self._save(value["bytes"]) if value.get("bytes") else value.get("path")
        if not isinstance(value, str) or not value.strip():
            raise ValueError("no picture: 'image' is missing or empty")
        return value

    def _save(self, data: bytes) -> str:
        """Bytes -> file named by their content: each picture is kept once, reading again writes nothing."""
        try:
            with Image.open(io.BytesIO(data)) as image:
                kind = (image.format or "").lower()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"its picture is not readable ({error})") from None
        folder = self.file.with_name(f"{self.file.stem}-images")
        path = folder / f"{hashlib.sha256(data).hexdigest()[:24]}.{'jpg' if kind == 'jpeg' else kind}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.write_bytes(data)
            os.replace(temporary, path)
        return os.path.relpath(path, self.root)


def _llava(row: dict, picture: Pictures) -> dict:
    question, answer = _turn(row.get("conversations"), "conversations")
    return {"id": row.get("id"), "image": picture(row.get("image")), "prompt": question, "chosen": answer}


def _povid(row: dict, picture: Pictures) -> dict:
    rejected = _same_question(row, "conversations", "rejected_conversations")
    return {**_llava(row, picture), "rejected": rejected, "source": {"format": "povid"}}


def _realign(row: dict, picture: Pictures) -> dict:
    question, chosen = _turn(row.get("chosen"), "chosen")
    return {"id": row.get("id"), "image": picture(row.get("image")), "prompt": question, "chosen": chosen,
            "rejected": _same_question(row, "chosen", "rejected"),
            "rejected_image": picture(row.get("retrieved_image")), "source": {"format": "realign"}}


def _rlhf_v(row: dict, picture: Pictures) -> dict:
    try:
        texts = json.loads(row["text"])
    except (KeyError, TypeError, ValueError):
        texts = None
    if not isinstance(texts, dict):
        raise ValueError("'text' is not a JSON object of question, chosen and rejected")
    return {**_rlaif_v({**row, **texts}, picture), "source": {"format": "rlhf-v", **_origin(row)}}


def _rlaif_v(row: dict, picture: Pictures) -> dict:
    return {"id": row.get("idx", row.get("id")), "image": picture(row.get("image") or row.get("image_path")),
            "prompt": _question(row.get("question")), "chosen": row.get("chosen"),
            "rejected": row.get("rejected"), "source": {"format": "rlaif-v", **_origin(row)}}


def _trl(row: dict, picture: Pictures) -> dict:
    if row.get("prompt") is None:  # the prompt stands at the start of both conversations
        question, chosen = _turn(row.get("chosen"), "chosen")
        rejected = _same_question(row, "chosen", "rejected")
    else:
        question = _question(_said(row["prompt"], QUESTION, "prompt"))
        chosen, rejected = (_said(row.get(key), ANSWER, key) for key in ("chosen", "rejected"))
    record = {"id": row.get("id", row.get("idx")), "image": picture(row.get("images") or row.get("image")),
              "prompt": question, "chosen": chosen, "rejected": rejected, "source": {"format": "trl"}}
    other = row.get("rejected_images")
    return {**record, "rejected_image": picture(other)} if other else record


class Format(NamedTuple):
    fits: Callable[[dict], bool]  # do the (filled) keys of a row belong to this format?
    convert: Callable[[dict, Pictures], dict]


FORMATS = {  # the first that fits is taken
    "povid": Format(lambda row: "rejected_conversations" in row, _povid),
    "llava": Format(lambda row: "conversations" in row, _llava),
    "realign": Format(lambda row: "retrieved_image" in row, _realign),
    "trl": Format(lambda row: "images" in row or isinstance(row.get("chosen"), list), _trl),
    "rlaif-v": Format(lambda row: {"question", "chosen", "rejected"} <= row.keys(), _rlaif_v),
    "rlhf-v": Format(lambda row: "text" in row and bool({"image", "image_path"} & row.keys()), _rlhf_v),
    "plumbline": Format(lambda row: {"image", "prompt"} <= row.keys(), lambda row, picture: row),
}


def _question(text: object) -> str:
    """A prompt without its mark for the picture."""
    if not isinstance(text, str):
        raise ValueError(f"the question must be a string, found {type(text).__name__}")
    if text.count(IMAGE) > 1:
        raise ValueError(f"the question has {text.count(IMAGE)} pictures; a record has one")
    return text.replace(IMAGE, "").strip()


def _turn(messages: object, key: str) -> tuple[str, str]:
    """First question and answer of a conversation."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise ValueError(f"{key!r} is not a conversation of a question and an answer")
    return _question(_said(messages[:1], QUESTION, key)), _said(messages[1:2], ANSWER, key)


def _same_question(row: dict, chosen: str, rejected: str) -> str:
    """The rejected answer, to the same question as the chosen one."""
    question, answer = _turn(row.get(rejected), rejected)
    if question != _turn(row.get(chosen), chosen)[0]:
        raise ValueError(f"{chosen!r} and {rejected!r} ask different questions")
    return answer


def _said(value: object, roles: tuple[str, str], key: str) -> str:
    """A text, or the text of the one message of a conversation; parts of it that are pictures say nothing."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict):
            raise ValueError(f"{key!r} has {len(value)} messages, one is wanted")
        role = value[0].get("role", value[0].get("from"))
        if role not in roles:
            raise ValueError(f"{key!r}: a message of the {roles[1]} is wanted, found one of {role!r}")
        value = value[0].get("content", value[0].get("value"))
        if isinstance(value, list):
            value = "".join(part.get("text") or "" for part in value if isinstance(part, dict))
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, found {type(value).__name__}")
    return value


def _origin(row: dict) -> dict:
    """What the row says about its making; `origin_split` is JSON inside a string in some files."""
    found = {key: row[key] for key in ORIGIN if row.get(key) is not None}
    if isinstance(found.get("origin_split"), str):
        try:
            found["origin_split"] = json.loads(found["origin_split"])
        except ValueError:
            pass  # a plain string is fine, too
    return found


def _named(record: dict, where: str, names: dict[str, int]) -> dict:
    """Give a record an id, unique in its file: its own or the row's number; repeated ones get -2, -3, ..."""
    name = record["id"] if record["id"] is not None else f"row-{where.rpartition(':')[2]}"
    name = base = str(name)
    while name in names:
        names[base] += 1
        name = f"{base}-{names[base]}"
    names[name] = 1
    return {**record, "id": name}


def _keys(record: dict, needs: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Required and optional keys of the file's records, by the kind of the first."""
    if "rejected" not in record and not needs:
        return ("id", "image", "prompt"), ("chosen",)
    return PAIR_TEXTS + tuple(key for key in PAIR_OPTIONAL if key in needs), PAIR_OPTIONAL


def _markers(record: dict) -> list[str]:
    return [f"{key!r} contains {IMAGE}" for key in ("prompt", "chosen", "rejected")
            if isinstance(record.get(key), str) and IMAGE in record[key]]


# Records to TRL's rows


def _trl_row(record: dict, picture: Callable[[str], object]) -> dict:
    def said(role: str, *parts: dict) -> list[dict]:
        return [{"role": role, "content": list(parts)}]

    def text(key: str) -> dict:
        return {"type": "text", "text": record[key]}

    row = {"id": record["id"], "images": [picture(record["image"])],
           "prompt": said("user", {"type": "image"}, text("prompt")),
           "chosen": said("assistant", text("chosen")), "rejected": said("assistant", text("rejected"))}
    other = record.get("rejected_image")
    return {**row, "rejected_images": [picture(other)]} if other else row


def _absolute(reference: str, root: Path) -> str:
    if reference.startswith("scene:"):
        raise ValueError(f"{reference}: a drawn picture has no file to point to; write a .parquet file")
    return str((root / reference).resolve())


def _embedded(reference: str, root: Path) -> dict:
    """The picture itself: a file's own bytes, a drawn scene as PNG."""
    if not reference.startswith("scene:"):
        return {"bytes": (root / reference).read_bytes(), "path": Path(reference).name}
    buffer = io.BytesIO()
    open_image(reference).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _write_parquet(path: Path, records: list[dict], root: Path, group: int = 64) -> None:
    """`group` records at a time, so that not all pictures are in memory; `datasets` decodes the pictures."""
    parquet = _parquet(path)
    import pyarrow as pa

    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    said = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    types = {"id": pa.string(), "images": image, "prompt": said, "chosen": said, "rejected": said}
    if any(record.get("rejected_image") for record in records):
        types["rejected_images"] = image
    text = {"dtype": "string", "_type": "Value"}
    talk = [{"role": text, "content": [{"type": text, "text": text}]}]
    pictures = {"feature": {"_type": "Image"}, "_type": "Sequence"}
    features = {key: pictures if kind is image else text if key == "id" else talk
                for key, kind in types.items()}
    note = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema(list(types.items()), metadata=note)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with parquet.ParquetWriter(temporary, schema) as file:
            for start in range(0, len(records), group):
                rows = [_trl_row(record, lambda reference: _embedded(reference, root))
                        for record in records[start : start + group]]
                file.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
