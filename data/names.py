"""Which image is meant: files about the same image name it in different ways.

    139    "139"    000000000139    COCO_val2014_000000000139    val2014/COCO_val2014_000000000139.jpg

A name means a known image if both are the same apart from folders, or if one of them is the other's stem
or number. The number of an image is its id where an instances file of COCO gives one, else the digits at the end
of its stem, without leading zeros. What only shares a stem or a number (a.jpg and a.png) is not the same.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from common import BadInput, brief


def as_id(value: object) -> str | None:
    """An id of a JSON file as text, for 7, 7.0 and "7" are the same; None if it is neither number nor text."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value) if type(value) in (int, str) else None


class Names:
    """Known images, found by any of their names.

    Args:
        where: file or folder that knows them, for errors.
        names: their names, each once.
        ids: name -> id, of those that have one.
    """

    def __init__(self, where: Path | str, names: Iterable[str], ids: Mapping[str, str] | None = None):
        self.where = where
        self.full: dict[str, list[str]] = {}  # name, with and without folders -> names
        self.short: dict[str, list[str]] = {}  # stem and number -> names
        for name in names:
            base, stem, number = _parts(name)
            for key in {name, base}:
                self.full.setdefault(key, []).append(name)
            for key in {stem, (ids or {}).get(name, number)}:
                self.short.setdefault(key, []).append(name)

    def find(self, wanted: str) -> str | None:
        """The known name of an image, None if there is none; BadInput if it may be several.

        Where only the folder tells images apart, the one whose name ends `wanted` is meant.
        """
        base, stem, number = _parts(wanted)
        places = ((self.full, wanted), (self.full, base), (self.short, base), (self.full, stem), (self.full, number))
        found = next((table[key] for table, key in places if key in table), [])
        ends = [name for name in found if f"/{wanted}".endswith(f"/{name}")]
        if len(found) > 1 and not ends:
            more = ", ..." if len(found) > 3 else ""
            raise BadInput(f"{self.where}: {brief(wanted)} may be {' or '.join(map(brief, found[:3]))}{more}")
        return max(ends or found, key=len, default=None)


def _parts(name: str) -> tuple[str, str, str]:
    """File name without folders (of digits alone: the number), its stem, and the number at the stem's end (if there
    is none: the stem)."""
    base = name.rpartition("/")[2]
    stem = re.sub(r"\.[A-Za-z][A-Za-z0-9]{2,3}$", "", base)
    digits = stem[len(stem.rstrip("0123456789")) :]
    number = (digits.lstrip("0") or "0") if digits else stem
    return number if base == digits else base, stem, number
