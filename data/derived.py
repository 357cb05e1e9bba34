"""Changed images on disk: PNG files (lossless, so that only the change differs) and their references."""

import hashlib
import os
import re
from pathlib import Path

from PIL import Image

from common import written_whole


def file_name(name: str) -> str:
    """A file name for any text, distinct for distinct texts: what is not a word character becomes `_`, and a
    digest then keeps the names apart."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-120:]
    digest = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain}{digest}.png"


def store(image: Image.Image, folder: Path, name: str, root: Path | None = None) -> str:
    """Write an image into `folder`; the file appears whole or not at all.

    Args:
        name: what tells the image from the others in the folder; need not be a file name.
        root: folder that relative references start from (None: the working folder).

    Returns the reference of the file, relative to `root`.
    """
    path = Path(folder) / file_name(name)
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG")
    return os.path.relpath(path, root or ".")
