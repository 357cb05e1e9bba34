"""Long runs that can be stopped anywhere and shared by processes, with the same result as one run in one go.

Records are worked on in chunks. What a chunk gave is appended to a part file next to the output, one JSON
line a chunk, and flushed to the disk before the next chunk begins:

    pairs.jsonl.part-0    {"settings": ...}                                        first line
                          {"ids": [...], "made": [...], "dropped": {reason: count}}

A run that starts again reads the part files of all processes and leaves out the records they have; a line
that the interruption cut off is taken away first. So no record is lost, and none is worked on twice.
Process r of `world` takes the records r, r + world, ...; when all are done, process 0 puts the results in
the order of the records. The number of processes may change between start and continuation.

That the result is the same holds if `work` treats each record on its own: its random numbers must come from
the record (its id or its row in the whole list), never from its place in the chunk.
"""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from common import BadInput, held
from data.batch import BadRecord
from data.images import open_image, references

Work = Callable[[list[int]], tuple[list[dict], Counter]]


def in_chunks(ids: list[str], work: Work, out: Path | None, settings: dict, *, chunk: int = 64, rank: int = 0,
              world: int = 1, barrier: Callable[[], object] = lambda: None,
              progress: str = "") -> tuple[list[dict], Counter] | None:
    """Work on all records that are not done yet.

    Args:
        ids: unique ids of all records, in order; the same in all processes.
        work: rows of `ids` -> (records made; how many were dropped for which reason). The id of what is made is that
            of its record, or ID/1, ID/2, ... where one record gives several.
        out: the file that will hold the result; the part files lie next to it. None: nothing is kept.
        settings: everything the result depends on, as JSON; part files with other settings are refused.
        chunk: rows for one call of `work`; an interruption loses one chunk of each process.
        barrier: waits until all processes have called it.

    Returns (records made, in the order of `ids`; dropped) in process 0, None in the others. Raises BadInput
    naming a part file of other settings.
    """
    if len(set(ids)) != len(ids):
        raise ValueError("ids are not unique")

    def results(rows: Sequence[int]) -> Iterator[dict]:
        with tqdm(total=len(rows), desc=progress, disable=None if progress and not rank else True) as bar:
            for start in range(0, len(rows), chunk):
                some = list(rows[start : start + chunk])
                made, dropped = work(some)
                yield {"ids": [ids[row] for row in some], "made": made, "dropped": dict(dropped)}
                bar.update(len(some))

    if out is None:
        return _merge(ids, list(results(range(len(ids)))))
    out.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"settings": settings, "records": len(ids)}, sort_keys=True)
    done = {name for part in parts(out) for line in _lines(part, header) for name in line["ids"]}
    barrier()  # all have read before any writes
    rows = [row for row in range(rank, len(ids), world) if ids[row] not in done]
    own = out.with_name(f"{out.name}.part-{rank}")
    with held(own), _open(own, header) as file:
        for line in results(rows):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    barrier()
    return None if rank else _merge(ids, [line for part in parts(out) for line in _lines(part, header)])


def readable(records: list[dict], work: Callable[[list[dict]], object], root: Path | None,
             bad_records: str) -> tuple[object, int]:
    """(`work` of records, 0). Where it fails because images cannot be decoded: with bad_records "skip", (`work` of the
    other records, how many there were); else BadInput that names the records."""
    try:
        return work(records), 0
    except BadInput:
        bad = _damaged(records, root)
        if not bad:
            raise
    if bad_records == "stop":
        raise BadInput("\n".join(map(str, bad)) + "; mend it, or leave it out with --bad-records skip: the same"
                       " command goes on where this one stopped")
    names = {record.name for record in bad}
    return work([record for record in records if record["id"] not in names]), len(bad)


def _damaged(records: list[dict], root: Path | None) -> list[BadRecord]:
    """The records whose image cannot be decoded; each distinct image is decoded once."""
    reasons: dict[str, str] = {}
    for image in {image for record in records for image in references(record["image"])}:
        try:
            open_image(image, root)
        except BadInput as error:
            reasons[image] = str(error)
    bad = [(record, [image for image in references(record["image"]) if image in reasons]) for record in records]
    return [BadRecord(record["id"], reasons[images[0]]) for record, images in bad if images]


def forget(out: Path) -> None:
    """Delete the part files, once the result is written."""
    for part in parts(out):
        part.unlink()


def parts(out: Path) -> list[Path]:
    """The part files of an interrupted run."""
    found = out.parent.glob(f"{glob.escape(out.name)}.part-*")
    return sorted(path for path in found if path.name.rpartition("-")[2].isdigit())


def _lines(part: Path, header: str) -> list[dict]:
    """The complete lines of a part file after its first."""
    first, *rest = part.read_bytes().split(b"\n")
    if not any(rest):  # interrupted before anything was done, whatever run it was of
        return []
    if first.decode("utf-8", "replace") != header:
        raise BadInput(f"{part}: is of a run with other settings or records; delete it, or write elsewhere")
    return [json.loads(line) for line in rest[:-1]]


def _open(part: Path, header: str):
    """The part file, open at the end of its last complete line."""
    file = part.open("ab+")
    file.seek(0)
    data = file.read()
    end = data.rfind(b"\n") + 1 if data.startswith(header.encode() + b"\n") else 0
    file.truncate(end)
    if not end:
        file.write(header.encode() + b"\n")
    return file


def _merge(ids: list[str], lines: list[dict]) -> tuple[list[dict], Counter]:
    place = {name: row for row, name in enumerate(ids)}

    def origin(name: str) -> str:
        return name if name in place else name.rpartition("/")[0]

    finished = [name for line in lines for name in line["ids"]]
    if sorted(finished) != sorted(ids):
        raise BadInput(f"the part files hold {len(finished)} records, {len(ids)} were to be done")
    made = [record for line in lines for record in line["made"]]
    made.sort(key=lambda record: place[origin(record["id"])])
    return made, sum((Counter(line["dropped"]) for line in lines), Counter())
