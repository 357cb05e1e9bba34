"""What files hold: rows of JSONL, JSON and Parquet, and the images that rows carry themselves.

A row is where it is (`file:number`), what it holds, and what is wrong with it. Parquet is read through pyarrow where
that is installed, in small batches, so that a file may be larger than memory.
"""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common import BadInput, parse_json, written_whole

Row = tuple[str, dict | None, list[str]]  # where it is, what it holds, what is wrong with it


def rows_of(path: Path, root: Path) -> Iterator[Row]:
    """Rows of a file, or of the Parquet files in a folder, in the order of their names. BadInput naming what is no such
    file; what is wrong with a single row comes with it."""
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
        if not (pairs and all(isinstance(pairs, list) for pairs in lists)
                and all(isinstance(pair, dict) and "y_win" in pair for pair in pairs)):
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


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON file: one list, one object over several lines, or one object a line (JSONL).

    Raises BadInput naming the file when it is missing, no regular file, unreadable, neither of the three.
    """
    try:
        if not path.is_file():
            raise BadInput("not a regular file" if path.exists() else "not found")
        with path.open("rb") as file:
            starts = iter(lambda: file.readline(64), b"")  # a JSON list may be one line of gigabytes
            first = next((line for line in starts if line.strip()), b"").removeprefix(b"\xef\xbb\xbf").strip()
            file.seek(0)
            if first[:1] == b"[" or first == b"{":
                rows = parse_json(file.read())
                for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
                    yield f"{path}:{number}", *_object(row)
            elif first and first[:1] != b"{":
                raise BadInput(f"neither JSON nor JSONL, it starts with {first[:20]!r};"
                               " Parquet files are named .parquet")
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", *_line(line)
    except (OSError, BadInput) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path}: {reason}") from None


def _line(line: bytes) -> tuple[dict | None, list[str]]:
    try:
        return _object(parse_json(line.rstrip()))
    except BadInput as error:
        return None, [str(error)]


def _object(value: object) -> tuple[dict | None, list[str]]:
    """(object, no problems), or (None, problems) when there is no object to look into."""
    if isinstance(value, dict):
        return value, []
    return None, [f"a JSON object is wanted, found {type(value).__name__}"]


def _parquet_rows(path: Path, batch: int = 64) -> Iterator[Row]:
    if not path.is_file():
        raise BadInput(f"{path}: {'not a regular file' if path.exists() else 'not found'}")
    parquet, number = pyarrow_parquet(path), 0
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch)
        for number, row in enumerate((row for rows in batches for row in rows.to_pylist()), 1):
            yield f"{path}:{number}", row, []
    except Exception as error:  # pyarrow's own, Python's on texts that are no UTF-8, and others on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: not a readable Parquet file, after row {number} ({reason})") from None


def pyarrow_parquet(path: Path):
    """pyarrow.parquet. BadInput naming the file where it is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise BadInput(f"{path}: Parquet needs pyarrow, which is not installed (pip install pyarrow)") from None
    return parquet


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
