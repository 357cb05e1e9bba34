"""Records -> batch: the sequences that a loss asks for, tokenised and packed, with each distinct picture
once.

A loss file declares its sequences as {name: (image field, response field)}; a third entry "competitor" asks
for the log-probs of the model's best other tokens (losses/rdpo.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.processor import Processor
from model.logprobs import Packed, Sequence, pack


@dataclass
class Batch:
    """`packed` holds len(names) * B sequences: all records of the first name, then all of the second, ..."""

    pixels: Tensor  # (M, 3, S, S), each distinct picture once
    packed: Packed
    names: list[str]

    def pin_memory(self) -> "Batch":
        """Called by the data loader when it pins batches for CUDA."""
        return Batch(self.pixels.pin_memory(), self.packed.pin_memory(), self.names)


def fields_of(sequences: Mapping[str, tuple]) -> set[str]:
    """The fields of a pair record that these sequences read."""
    return {field for sequence in sequences.values() for field in sequence[:2]} | {"prompt"}


def collate(
    records: list[dict], sequences: Mapping[str, tuple], processor: Processor, root: Path | str | None = None
) -> Batch:
    """Tokenise, load pictures and pack. Raises ValueError naming the record that cannot be used."""
    rows: dict[str, int] = {}  # picture reference -> row of pixels
    scored = []
    for image_field, response_field, *how in sequences.values():
        for record in records:
            scored.append(
                Sequence(
                    image=rows.setdefault(record[image_field], len(rows)),
                    prompt=tuple(processor.prompt(record["prompt"])),
                    response=tuple(processor.response(record[response_field])),
                    competitor="competitor" in how,
                )
            )
    pixels = torch.stack([processor.image(reference, root) for reference in rows])
    return Batch(pixels, pack(scored), list(sequences))


class MicroBatches(Dataset):
    """Micro-batch i of this process, for any i: a pure function of (records, seed, i).

    Each epoch is a fresh permutation of the records. A step takes `batch_size` consecutive records of that
    order, cut into equal parts for the processes and then for gradient accumulation. Since nothing is
    remembered, a resumed run continues exactly where it stopped, and one process sees the same global batches
    as many.

    Args:
        parts: micro-batches per step and process.
    """

    def __init__(self, records, sequences, processor, root, *, batch_size, parts, rank, world, seed, steps):
        self.records, self.sequences, self.processor, self.root = records, sequences, processor, root
        self.batch_size, self.parts, self.rank, self.world, self.seed = batch_size, parts, rank, world, seed
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * self.parts

    def __getitem__(self, i: int) -> Batch:
        step, part = divmod(i, self.parts)
        size = self.batch_size // (self.world * self.parts)
        start = step * self.batch_size + (self.rank * self.parts + part) * size
        picked = [self.records[self._index(start + j)] for j in range(size)]
        return collate(picked, self.sequences, self.processor, self.root)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.records))
        return _order(self.seed, epoch, len(self.records))[place]


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed is stable across Python versions
    return order
