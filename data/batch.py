"""Records -> batch: the sequences that a loss asks for, tokenised and packed, each distinct picture once.

A loss file declares its sequences as {name: (image field, response field)}.

    ("image:crop", ...)             a random crop of that picture (losses/mdpo.py); one for each record and step,
                                    so policy and reference see the same
    (..., ..., "competitor")        scores the model's best other tokens (losses/rdpo.py)
    ("image:noise", ..., "noisy")   scores, under the clean picture, the tokens that the policy prefers under a
                                    noisy one (losses/povid.py); "noisy_own": the reference prefers its own
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common import BadInput
from data.corrupt import add_noise, crop
from data.images import open_image
from data.processor import Processor
from losses.dpo_weighted import changed_tokens
from model.logprobs import Packed, Sequence, pack
from model.views import View, stack


class BadRecord(BadInput):
    """A record that cannot be used, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # whole, so that a loader's process can send it
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"record {self.name!r}: {self.reason}"


@dataclass
class Batch:
    """`packed` holds len(names) * B sequences: all records of the first name, then all of the second, ..."""

    pixels: Tensor  # (tiles, 3, S, S), each distinct picture once
    packed: Packed
    names: list[str]
    ids: list[str]  # of the records, (B,)
    weights: Tensor | None = None  # (B,) 0 for an example that teaches nothing (pairs/online.py)
    answers: dict[str, list[tuple]] = field(default_factory=dict)  # token ids of each name's responses
    noisy: Packed | None = None  # the noisy sequences as they are read under their noisy pictures
    noisy_labels: slice | None = None  # where their labels are in `packed`
    noisy_own: bool = False

    def pin_memory(self) -> Batch:
        """Called by the data loader when it pins batches for CUDA."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        pinned = {k: v.pin_memory() if isinstance(v, (Tensor, Packed)) else v for k, v in values.items()}
        return Batch(**pinned)

    def changed(self) -> dict[str, Tensor]:
        """Which tokens of either answer the other one lacks, (B, L) each (losses/dpo_weighted.py)."""
        pairs = zip(self.answers["chosen"], self.answers["rejected"], strict=True)
        marks = list(zip(*(changed_tokens(list(a), list(b)) for a, b in pairs)))
        width = max(self.packed.lengths)  # L of the log-probs
        return {f"{name}_changed": torch.tensor([row + [False] * (width - len(row)) for row in rows])
                for name, rows in zip(("chosen", "rejected"), marks)}


def fields_of(sequences: Mapping[str, tuple]) -> set[str]:
    """The fields of a pair record that these sequences read."""
    named = {name.partition(":")[0] for sequence in sequences.values() for name in sequence[:2]}
    return named | {"prompt"}


def collate(
    records: list[dict], sequences: Mapping[str, tuple], processor: Processor, root: Path | str | None = None,
    seeds: list[int] | None = None, end: bool = False,
) -> Batch:
    """Tokenise, load pictures and pack.

    Args:
        records: their response fields hold text, or token ids with the end token.
        seeds: one for each record, for crops and noise.
        end: repeat the last token of each response, for a reward that is read at it (model/reward.py).
    Raises BadRecord of the first record that cannot be used.
    """
    views: dict[tuple, View] = {}
    scored, noisy, answers = [], [], {}
    for name, (picture, response_field, *how) in sequences.items():
        reads_noise = bool({"noisy", "noisy_own"} & set(how))
        for i, record in enumerate(records):
            key = _look(views, record, picture, processor, root, seeds[i] if seeds else 0)
            shown = _look(views, record, "image", processor, root, 0) if reads_noise else key
            response = _response(record, response_field, processor)
            answers.setdefault(name, []).append(response)
            response += response[-1:] * end
            for sequence, where in ((scored, shown), (noisy, key)):
                if sequence is scored or reads_noise:
                    prompt = _prompt(record, views[where], processor)
                    sequence.append(Sequence(list(views).index(where), prompt, response, "competitor" in how,
                                             processor.question(record["prompt"])))
    pixels, rows = stack(list(views.values()), processor.patches)
    batch = Batch(pixels, pack(scored, rows, processor.image_id), list(sequences), [r["id"] for r in records],
                  answers=answers)
    if any("weight" in record for record in records):
        batch.weights = torch.tensor([record["weight"] for record in records])
    if noisy:
        batch.noisy = pack(noisy, rows, processor.image_id)
        place = next(i for i, (_, _, *how) in enumerate(sequences.values()) if {"noisy", "noisy_own"} & set(how))
        first = sum(batch.packed.lengths[: place * len(records)])
        batch.noisy_labels = slice(first, first + len(batch.noisy.labels))
        batch.noisy_own = any("noisy_own" in sequence for sequence in sequences.values())
    return batch


def _look(views: dict, record: dict, picture: str, processor: Processor, root, seed: int) -> tuple:
    """Open a picture when it is met for the first time; returns its key in `views`."""
    name, _, change = picture.partition(":")
    reference = record[name]
    key = (reference, change, seed if change else 0)
    if key not in views:
        try:
            views[key] = _open(reference, change, processor, root, seed)
        except BadInput as error:
            raise BadRecord(record["id"], str(error)) from None
    return key


def _open(reference: str, change: str, processor: Processor, root, seed: int) -> View:
    if change == "noise":
        return processor.view(add_noise(open_image(reference, root), seed=seed))
    view = processor.image(reference, root)
    return view._replace(pixels=crop(view.pixels, seed)) if change == "crop" else view


def _response(record: dict, response_field: str, processor: Processor) -> tuple[int, ...]:
    answer = record[response_field]
    try:
        return tuple(processor.response(answer) if isinstance(answer, str) else answer)
    except BadInput as error:
        raise BadRecord(record["id"], str(error)) from None


def _prompt(record: dict, view: View, processor: Processor) -> tuple[int, ...]:
    """The prompt's ids, with one image token for each row of the picture."""
    try:
        ids = processor.prompt(record["prompt"], len(view.rows))
    except BadInput as error:
        raise BadRecord(record["id"], str(error)) from None
    if ids.count(processor.image_id) != len(view.rows):
        raise BadRecord(record["id"], f"{ids.count(processor.image_id)} image tokens in the prompt, "
                                      f"{record['image']} has {len(view.rows)} features")
    return tuple(ids)


def look(record: dict, root: Path | str | None = None) -> None:
    """Decode the picture that the record is about. Raises BadRecord when that fails."""
    try:
        open_image(record["image"], root)
    except BadInput as error:
        raise BadRecord(record["id"], str(error)) from None


def with_seeds(records: list[dict], seeds: list[int], root: Path | str | None = None) -> list[tuple[dict, int]]:
    """What a loss that samples starts a step from, once all its pictures have been decoded. Raises BadRecord."""
    for record in records:
        look(record, root)
    return list(zip(records, seeds))


def without_bad(records: list[dict], make: Callable[[list[dict]], object]) -> tuple[object, list[BadRecord]]:
    """(`make` of those records that it does not refuse, None if there are none; the refusals)"""
    bad: list[BadRecord] = []
    while records:
        try:
            return make(records), bad
        except BadRecord as error:
            bad.append(error)
            records = [record for record in records if record["id"] != error.name]
    return None, bad


class Drawn(NamedTuple):
    """A micro-batch, None when it could not be made, and the records that could not be used."""

    batch: object
    bad: list[BadRecord]


class MicroBatches(Dataset):
    """Micro-batch i of this process, for any i: a pure function of (records, seed, i).

    Each epoch is a fresh permutation of the records. A step takes `batch_size` consecutive records of that
    order, cut into equal parts for the processes and then for gradient accumulation. Since nothing is
    remembered, a resumed run continues exactly where it stopped, and one process sees the same global batches
    as many. With `skip` a record that cannot be used is replaced by one drawn at random for its place, again
    and again until one can be used, which depends on seed, place and records only: batches keep their size.

    Args:
        parts: micro-batches per step and process.
        make: (records, seeds) -> micro-batch; it may raise BadRecord.
        skip: replace bad records; otherwise the first one leaves no micro-batch.
    """

    def __init__(self, records, *, batch_size, parts, rank, world, seed, steps, make, skip=False):
        self.records, self.make, self.skip = records, make, skip
        self.batch_size, self.parts, self.rank, self.world, self.seed = batch_size, parts, rank, world, seed
        self.steps = steps

    def __len__(self) -> int:
        return self.steps * self.parts

    def __getitem__(self, i: int) -> Drawn:
        step, part = divmod(i, self.parts)
        size = self.batch_size // (self.world * self.parts)
        start = step * self.batch_size + (self.rank * self.parts + part) * size
        places = range(start, start + size)
        seeds = [random.Random(f"{self.seed}/{place}").getrandbits(48) for place in places]
        bad: list[BadRecord] = []
        while len(bad) < len(self.records):
            try:
                return Drawn(self.make([self._pick(place, bad) for place in places], seeds), bad)
            except BadRecord as error:
                bad.append(error)
                if not self.skip:
                    break
        return Drawn(None, bad)

    def _pick(self, place: int, bad: list[BadRecord]) -> dict:
        """The record of a place, or the first that is drawn for it and not among the bad ones."""
        epoch, row = divmod(place, len(self.records))
        record, names = self.records[_order(self.seed, epoch, len(self.records))[row]], {b.name for b in bad}
        others = random.Random(f"{self.seed}/{place}/other")
        while record["id"] in names:
            record = self.records[others.randrange(len(self.records))]
        return record


@lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a string seed is stable across Python versions
    return order
