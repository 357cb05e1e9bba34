"""Records -> batch: the sequences that a loss asks for, tokenised and packed, each distinct image once.

A loss file declares its sequences as {name: keyword arguments of `Scored`}. A name may be anything; the loss gets the
log-probs as `policy_NAME_logps` and so on (`model.training.named`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from common import BadInput
from data.corrupt import add_noise, crop, hide
from data.images import open_image, references
from data.processor import Processor
from losses.dpo_weighted import changed_tokens
from model.logprobs import Packed, Sequence, pack
from model.packing import Movable
from model.views import View, stack


class BadRecord(BadInput):
    """A record that cannot be used, and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # whole, so that a loader's process can send it
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"record {self.name!r}: {self.reason}"


@contextmanager
def naming(record: dict) -> Iterator[None]:
    """Inside, what is wrong with the input is wrong with this record: BadInput becomes BadRecord."""
    try:
        yield
    except BadInput as error:
        raise BadRecord(record["id"], str(error)) from None


Shown = Literal["clean", "crop", "noise"]
Tokens = Literal["given", "best_other", "picked_in_noise", "own_picked_in_noise"]


@dataclass(frozen=True)
class Scored:
    """One response under one image, as a loss asks for it. Raises ValueError on an unknown view or kind of tokens, and
    where a part of the image is hidden and what is left is to be cropped or noisy."""

    image: str  # field of the record that names the image
    response: str  # field of the record that holds the response
    view: Shown = "clean"  # a crop or noise drawn for each record and step
    hidden: float = 0.0  # share of what the record's `rejected_image` lacks that is hidden as there (data.corrupt.hide)
    # Which tokens are scored along the response, under that image: its own; in the place of each the model's best other
    # one; those that the policy finds likeliest under the noisy image, or policy and reference each their own of these.
    tokens: Tokens = "given"

    def __post_init__(self):
        for value, kinds in ((self.view, get_args(Shown)), (self.tokens, get_args(Tokens))):
            if value not in kinds:
                raise ValueError(f"{value!r} is none of {', '.join(kinds)}, which a sequence of a loss may ask for")
        if self.hidden and (self.view != "clean" or self.in_noise):
            raise ValueError("a partly hidden image has neither a crop nor noise")

    @property
    def in_noise(self) -> bool:
        """Whether tokens are picked under the noisy image."""
        return self.tokens.endswith("picked_in_noise")

    @property
    def drawn(self) -> bool:
        """Whether it is another one at every step."""
        return self.view != "clean" or self.in_noise


def scored(sequences: Mapping[str, Mapping]) -> dict[str, Scored]:
    """What a loss file declares -> name -> what is scored under it."""
    return {name: Scored(**kwargs) for name, kwargs in sequences.items()}


@dataclass
class Batch(Movable):
    """`packed` holds len(names) * B sequences: all records of the first name, then all of the second, ..."""

    pixels: Tensor  # (tiles, 3, S, S), each distinct image once
    packed: Packed
    names: list[str]
    ids: list[str]  # of the records, (B,)
    responses: dict[str, list[tuple[int, ...]]]  # token ids of each name's responses, [name][B]
    weights: Tensor | None = None  # (B,) 0 for an example that teaches nothing (pairs/online.py)
    noisy: Packed | None = None  # the sequences whose tokens are picked in noise, under their noisy images
    picked: Tensor | None = None  # (n,) bool: labels of `packed` whose places the picked tokens take
    own: Tensor | None = None  # (n,) bool: those of them that the reference picks for itself

    def changed(self) -> dict[str, Tensor]:
        """Which tokens of either response the other one lacks, (B, L) each (losses/dpo_weighted.py)."""
        pairs = zip(self.responses["chosen"], self.responses["rejected"], strict=True)
        changed = list(zip(*(changed_tokens(list(a), list(b)) for a, b in pairs)))
        width = max(self.packed.lengths)  # L of the log-probs
        padded = ([row + [False] * (width - len(row)) for row in rows] for rows in changed)
        return {f"{name}_changed": torch.tensor(rows, device=self.pixels.device)
                for name, rows in zip(("chosen", "rejected"), padded)}


def fields_of(sequences: Mapping[str, Mapping]) -> set[str]:
    """The fields of a pair record that these sequences read."""
    asked = scored(sequences).values()
    return {"prompt", *(field for how in asked for field in (how.image, how.response)),
            *("rejected_image" for how in asked if how.hidden)}


def collate(
    records: list[dict], sequences: Mapping[str, Mapping], processor: Processor, root: Path | str | None = None,
    seeds: list[int] | None = None, end: bool = False, blank: bool = False,
) -> Batch:
    """Tokenise, load images and pack.

    Args:
        records: their response fields hold text, or token ids with the end token.
        sequences: {name: keyword arguments of `Scored`}.
        seeds: one for each record, for crops and noise.
        end: repeat the last token of each response, for a reward that is read at it (model/reward.py).
        blank: of images read the headers only; the pixels are on the meta device and have no values (estimate.py).
    Raises BadRecord of the first record that cannot be used.
    """
    seeds = seeds or [0] * len(records)
    images, asked = (_Headers if blank else _Images)(processor, root), scored(sequences)
    responses: dict[str, list[tuple[int, ...]]] = {name: [] for name in asked}
    # Name after name, not record after record: the log-probs of a name are then one block of rows.
    plain = []
    for name, how in asked.items():
        for record, seed in zip(records, seeds):
            with naming(record):
                shown = images.numbers(record, how, how.view, seed)
                responses[name].append(_response(record, how.response, processor))
                plain.append(_sequence(record, responses[name][-1], shown, images, how, end))
    # Tokens that are picked in noise are scored where the loop above put their sequence, but the model picks them under
    # the noisy image. So these come once more, in the same order: picks fill the labels above one by one.
    noisy = []
    for name, how in asked.items():
        if how.in_noise:
            for record, seed, response in zip(records, seeds, responses[name]):
                with naming(record):
                    shown = images.numbers(record, how, "noise", seed)
                    noisy.append(_sequence(record, response, shown, images, how, end))
    pixels, rows = stack(images.views, processor.patches)
    batch = Batch(pixels, pack(plain, rows, processor.image_id), list(asked), [r["id"] for r in records], responses)
    if any("weight" in record for record in records):
        batch.weights = torch.tensor([record["weight"] for record in records])
    if noisy:
        batch.noisy = pack(noisy, rows, processor.image_id)
        batch.picked = _labels([how.in_noise for how in asked.values()], batch)
        own = [how.tokens == "own_picked_in_noise" for how in asked.values()]
        batch.own = _labels(own, batch) if any(own) else None
    return batch


class _Images:
    """The distinct images of a batch, each opened when it is met for the first time."""

    def __init__(self, processor: Processor, root: Path | str | None):
        self.processor, self.root = processor, root
        self.views: list[View] = []
        self.known: dict[tuple, int] = {}

    def numbers(self, record: dict, how: Scored, view: Shown, seed: int) -> tuple[int, ...]:
        """Which of `views` show the images of the field that `how` names. BadInput when one cannot be opened."""
        shown = references(record[how.image])
        others = references(record["rejected_image"]) if how.hidden else [None] * len(shown)
        seed = 0 if view == "clean" else seed
        return tuple(self._number(image, view, seed, how.hidden, other) for image, other in zip(shown, others))

    def _number(self, *key) -> int:
        if key not in self.known:
            self.views.append(self._open(*key))
            self.known[key] = len(self.views) - 1
        return self.known[key]

    def _open(self, reference: str, view: str, seed: int, hidden: float, other: str | None) -> View:
        if view == "noise":
            return self.processor.view(add_noise(open_image(reference, self.root), seed=seed))
        if hidden:
            return self.processor.view(hide(open_image(reference, self.root), open_image(other, self.root), hidden))
        clean = self.processor.image(reference, self.root)
        return clean._replace(pixels=crop(clean.pixels, seed)) if view == "crop" else clean


class _Headers(_Images):
    """Images as their headers announce them: as many image tokens, and at least as many tiles as these need."""

    def _open(self, reference: str, view: str, seed: int, hidden: float, other: str | None) -> View:
        rows, side = self.processor.image_tokens(reference, self.root), self.processor.preprocessing.size
        pixels = torch.empty(-(-rows // self.processor.patches), 3, side, side, device="meta")
        return View(pixels, torch.arange(rows) % (len(pixels) * self.processor.patches))


def _sequence(record: dict, response: tuple[int, ...], shown: tuple[int, ...], images: _Images, how: Scored,
              end: bool) -> Sequence:
    """A response after the prompt of its record, which has one image token for each row of its images, and the
    context if there is one: shared by all its responses, and not scored."""
    processor, features = images.processor, [len(images.views[number].rows) for number in shown]
    prompt = processor.prompt(record["prompt"], features) + context_ids(record, processor)
    if (found := prompt.count(processor.image_id)) != sum(features):
        raise BadInput(f"{found} image tokens in the prompt, {record['image']} has {sum(features)} features")
    question = processor.question(record["prompt"])
    response += response[-1:] if end else ()
    return Sequence(shown, tuple(prompt), response, how.tokens == "best_other", question)


def _labels(chosen: list[bool], batch: Batch) -> Tensor:
    """(n,) bool: the labels of the sequences whose names are chosen."""
    of_sequences = torch.tensor(chosen).repeat_interleave(len(batch.ids))
    return of_sequences.repeat_interleave(torch.tensor(batch.packed.lengths))


def response_ids(record: dict, field: str, processor: Processor) -> list[int]:
    """Ids of a record's response, end token included; of what continues a context, which the end does not follow.
    BadInput as from `data.processor`."""
    if record.get("context") is not None:
        return processor.continuation(record["context"], record[field])
    return processor.response(record[field])


def context_ids(record: dict, processor: Processor) -> list[int]:
    """Ids of the beginning of the response that a record gives, after those of its prompt. BadInput as above."""
    return processor.opening(record["context"]) if record.get("context") else []


def _response(record: dict, field: str, processor: Processor) -> tuple[int, ...]:
    return tuple(response_ids(record, field, processor) if isinstance(record[field], str) else record[field])


def tokens_of(record: dict, sequences: Mapping[str, Mapping], processor: Processor, root: Path | str | None = None,
              end: bool = False) -> int:
    """Tokens of a record that go through the decoder, `len(packed.ids)` of its own batch: of its texts and the headers
    of its images. Arguments and BadRecord as for `collate`; BadInput as from `data.images.image_size`."""
    inputs: dict[tuple, set] = {}  # distinct responses under each image, or each several
    for how in scored(sequences).values():
        with naming(record):
            response = _response(record, how.response, processor)
        shown = tuple(references(record[how.image]))
        inputs.setdefault((shown, how.view, how.hidden), set()).add(response if end else response[:-1])
    images = len(shown)  # as many in each field
    prompt = processor.prompt(record["prompt"], [1] * images) + context_ids(record, processor)
    text = len(prompt) - images  # without image tokens
    counts = {shown: sum(processor.image_tokens(image, root) for image in shown) for shown, *_ in inputs}
    return sum(counts[shown] + text + sum(map(len, group)) for (shown, *_), group in inputs.items())


def check_image(record: dict, root: Path | str | None = None) -> None:
    """Decode the images that the record is about. Raises BadRecord when that fails."""
    with naming(record):
        for reference in references(record["image"]):
            open_image(reference, root)


def with_seeds(records: list[dict], seeds: list[int], root: Path | str | None = None) -> list[tuple[dict, int]]:
    """What a loss that samples starts a step from, once all its images have been decoded. Raises BadRecord."""
    for record in records:
        check_image(record, root)
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
