"""The reference's log-probs on disk: computed once, they are good for every run on the same data.

The reference does not change, so its log-probs of fixed pairs are the same at every step and in every run.
They are kept in a safetensors file, one tensor of token log-probs for each sequence of each record, with a
fingerprint of all that they depend on: the model's files, the records, the sequences that the loss asks for,
template, tokenizer and image handling. A file with another fingerprint is refused, never used.

    reference.safetensors    "chosen/ID" -> (tokens,) fp32, ...; metadata: fingerprint
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.hub import resolve
from model.layouts import llava_tensors

BLOCK = 2**24  # bytes of a file that are read at a time


def fingerprint(folder: Path | str, records: list[dict], sequences: dict, processor, precision: str) -> str:
    """SHA-256 of what the reference's log-probs depend on.

    Args:
        folder: of the model; one of adapters brings its base along, and either the vision tower beside it.
    Files are read whole: two fine-tunings of one model may differ in the middle of a weight file only.
    Pictures enter by their references.
    """
    digest, folder = hashlib.sha256(), resolve(folder)
    for place in dict.fromkeys([folder, *(t.file.parent for t in llava_tensors(folder).values())]):
        for path in sorted(p for p in place.iterdir() if p.is_file()):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
    probe = (processor.prompt("?"), processor.response("."), repr(processor.preprocessing), processor.aspect,
             processor.pinpoints)
    digest.update(json.dumps([records, sequences, probe, precision], sort_keys=True).encode())
    return digest.hexdigest()


def write(path: Path, rows: dict[str, Tensor], key: str, rank: int = 0, world: int = 1) -> None:
    """Gather the rows of all processes into one file, which appears whole or not at all."""
    if world > 1:
        parts: list[dict] = [{}] * world
        dist.all_gather_object(parts, rows)
        rows = {name: row for part in parts for name, row in part.items()}
    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        save_file(rows, temporary, metadata={"fingerprint": key})
        os.replace(temporary, path)
    if world > 1:
        dist.barrier()


def read(path: Path, key: str) -> dict[str, Tensor]:
    """All rows. Raises ValueError when the file belongs to another model, data, template or image handling."""
    try:
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or {}).get("fingerprint")
            rows = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if kept != key:
        raise ValueError(f"{path}: the log-probs in it are of another model, data, template, precision or image"
                         " handling; name another file or delete it")
    return rows
