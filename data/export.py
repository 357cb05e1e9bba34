"""Records written: as Plumbline's JSONL, or with the columns of TRL's vision DPO, as JSONL or Parquet.

TRL's columns are `images` and the conversations `prompt`, `chosen`, `rejected`. What it has no column for (`id`,
`context`, `rejected_images`, `rejected_image_response`) is an extra one, which data/formats.py reads back; `source` is
not written. An empty text comes before images that are marked at the beginning of the prompt, to tell them from those
without marks. Answers after a context are written whole, with the context before them: under DPO its log-probs cancel,
but TRL also scores an end token after them.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

from common import BadInput, written_whole
from data.images import IMAGE, cut_at_images, open_image, references
from data.records import continued, relocate, write_jsonl
from data.rows import pyarrow_parquet

WRITTEN = ("plumbline", "trl")


def write(path: Path | str, records: list[dict], format: str = "plumbline", root: Path | str | None = None) -> None:
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
    parquet = pyarrow_parquet(path)
    import pyarrow as pa

    text = pa.string(), {"dtype": "string", "_type": "Value"}  # pyarrow's type, and the feature of `datasets`
    images = (pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
              {"feature": {"_type": "Image"}, "_type": "Sequence"})
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    talk = (pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))])),
            [{"role": text[1], "content": [{"type": text[1], "text": text[1]}]}])
    columns = {"id": text, "images": images, "prompt": talk, "chosen": talk, "rejected": talk}
    more = {"rejected_image": ("rejected_images", images),
            "rejected_image_response": ("rejected_image_response", text), "context": ("context", text)}
    columns |= dict(more[key] for key in more if any(record.get(key) is not None for record in records))
    note = json.dumps({"info": {"features": {name: feature for name, (_, feature) in columns.items()}}})
    schema = pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata={"huggingface": note})

    with written_whole(path) as temporary, parquet.ParquetWriter(temporary, schema) as file:
        for start in range(0, len(records), group):
            rows = [_trl_row(record, lambda reference: _embedded(reference, root))
                    for record in records[start : start + group]]
            file.write_table(pa.Table.from_pylist(rows, schema=schema))
