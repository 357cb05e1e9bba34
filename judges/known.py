"""What images show, where that is known."""

from pathlib import Path

from data import scenes
from data.names import Names
from metrics.objects import read_objects


class KnownObjects:
    """Of scenes always, of photographs if an annotation file lists them (`path`, as for `read_objects`)."""

    def __init__(self, path: Path | None = None):
        rows = read_objects(path) if path else []
        self.table = {row["id"]: set(row["objects"]) for row in rows}
        self.names = Names(path, self.table, {row["id"]: row["image_id"] for row in rows if "image_id" in row})
        self.classes = set().union(*self.table.values())  # what was looked for

    def __call__(self, reference: str) -> tuple[set[str], set[str]] | None:
        """(classes shown, classes that were looked for) of an image reference, None where its contents are unknown.

        Raises BadInput if the reference may be several images of the file.
        """
        if reference.startswith("scene:"):
            return scenes.objects_present(*scenes.parse_reference(reference)), set(scenes.CATEGORIES)
        key = self.names.find(reference)
        return None if key is None else (self.table[key], self.classes)
