"""The reference's log-probs on disk: computed once, they are good for every run on the same data.

The reference does not change, so its log-probs of fixed pairs are the same at every step and in every run.
They are kept in a safetensors file, one tensor of token log-probs for each sequence of each record, with a
fingerprint of all that they depend on: the model's files, the records, the sequences that the loss asks for,
template, tokenizer and image handling. A file with another fingerprint is refused, never used.

A resumed run must start from the same as well: `identity` has a hash of each part (model/resume.py).

    reference.safetensors    "chosen/ID" -> (tokens,) fp32, ...; metadata: fingerprint
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import BadInput, written_whole
from model.families import family_of
from model.hub import resolve
from model.tensors import opened, save_file
from model.training import gather_all

BLOCK = 2**16  # bytes of a file that are read at a time
SAMPLES = 256  # blocks of a file that stand for it: one in 20 MB of a shard of 5 GB


def cached(path: Path, key: str, records: list[dict], names: Iterable[str],
           score: Callable[[list[dict]], dict[str, Tensor]], size: int, rank: int = 0, world: int = 1,
           ) -> dict[str, Tensor]:
    """The log-probs of all records: those of the file, if there is one, and what it lacks, which is added to it.

    Args:
        key: `fingerprint` of this run.
        names: of the sequences that the loss asks for.
        score: records, `size` at a time -> "NAME/ID" -> (tokens,), of those records that can be used.
    Raises BadInput as `read` does. A collective call.
    """
    found = read(path, key) if path.exists() else {}
    missing = [record for record in records if any(f"{name}/{record['id']}" not in found for name in names)]
    if not missing:
        return found
    share, rows = missing[rank::world], {} if rank else found
    for start in tqdm(range(0, len(share), size), desc="reference", disable=True if rank else None):
        rows |= score(share[start : start + size])
    write(path, rows, key, rank, world)
    return read(path, key)


def identity(folder: Path | str, records: list[dict], processor, whole: bool = False) -> dict[str, str]:
    """What a run starts from: part -> SHA-256.

    Args:
        folder: of the model; one of adapters brings its base along, and either its vision tower.
        whole: read the model's files from end to end, as two fine-tunings of one model may differ in a few bytes in
            the middle of a weight file. Else of each only SAMPLES blocks, so that it costs little at any size.
    Images enter by their references.
    """
    handling = (processor.prompt("?"), processor.response("."), repr(processor.preprocessing), processor.aspect,
                repr(processor.config))
    return {"records": _key(records), "model files": _files_key(resolve(folder), whole),
            "template or image handling": _key(handling)}


def fingerprint(folder: Path | str, records: list[dict], sequences: dict, processor, precision: str) -> str:
    """SHA-256 of what the reference's log-probs depend on (`identity`, files read whole)."""
    return _key([identity(folder, records, processor, whole=True), sequences, precision])


def _key(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _files_key(folder: Path, whole: bool) -> str:
    """SHA-256 of names, sizes and blocks of a model's files."""
    digest = hashlib.sha256()
    for place in dict.fromkeys([folder, *(t.file.parent for t in family_of(folder).tensors(folder).values())]):
        for path in sorted(p for p in place.iterdir() if p.is_file()):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            stride = BLOCK if whole else max(BLOCK, size // SAMPLES)
            with path.open("rb") as file:
                for start in range(0, size, stride):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    return digest.hexdigest()


def write(path: Path, rows: dict[str, Tensor], key: str, rank: int = 0, world: int = 1) -> None:
    """Gather the rows of all processes into one file, which appears whole or not at all."""
    rows = dict(gather_all(list(rows.items()), world))
    if rank == 0:
        with written_whole(path) as temporary:
            save_file(rows, temporary, metadata={"fingerprint": key})
    if world > 1:
        dist.barrier()


def read(path: Path, key: str) -> dict[str, Tensor]:
    """All rows. Raises BadInput when the file belongs to another model, data, template or image handling."""
    with opened(path) as file:
        kept = (file.metadata() or {}).get("fingerprint")
        rows = {name: file.get_tensor(name) for name in file.keys()}
    if kept != key:
        raise BadInput(f"{path}: the log-probs in it are of another model, data, template, precision or image"
                       " handling; name another file or delete it")
    return rows
