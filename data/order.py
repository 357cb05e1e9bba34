"""The order of a run's records: which of them are in which step, process and micro-batch.

All of it follows from the records, the seed and the number of the step; nothing is remembered.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

from torch.utils.data import Dataset

from data.batch import BadRecord

WINDOW = 50  # batches whose records are sorted by length together


class Drawn(NamedTuple):
    """A micro-batch, None when it could not be made, and the records that could not be used."""

    batch: object
    bad: list[BadRecord]


@dataclass(eq=False)
class MicroBatches(Dataset):
    """Micro-batch (step, part) of this process, for any of them: a pure function of records, seed and number.

    Each epoch is a fresh permutation of the records, and a step takes the next `batch_size` of it. Since nothing is
    remembered, a resumed run continues exactly where it stopped, and one process sees the same global batches
    as many.

    Without `lengths` a step's records are cut in their order, for the processes and then for gradient accumulation.
    With them the records of a step are sorted, the longest first, and dealt out, so that each process gets equally many
    and about the same number of tokens. With `max_tokens` a micro-batch takes records until it is full; all processes
    cut into as many micro-batches as the one that needs most, since those that shard the model work in lockstep.

    With `skip` a record that cannot be used is replaced by one drawn at random for its place, no longer than itself if
    there is one, again and again until one can be used: batches keep their size, micro-batches their limit.
    """

    records: list[dict]
    _: KW_ONLY
    batch_size: int
    rank: int
    world: int
    seed: int
    steps: int
    make: Callable  # (records, seeds) -> micro-batch; it may raise BadRecord
    skip: bool = False  # replace bad records; otherwise the first one leaves no micro-batch
    micro_batch_size: int | None = None  # records of a micro-batch; it divides those of a process
    max_tokens: int | None = None  # tokens of a micro-batch instead; no record has more
    lengths: list[int] | None = None  # tokens of each record, for `max_tokens` and `group_by_length`
    group_by_length: bool = False  # batches are of similar lengths (`grouped`)
    orders: dict[int, list[int]] = field(default_factory=dict, init=False)  # epoch -> rows of the records

    def keys(self, first: int = 0) -> Iterator[tuple[int, int]]:
        """(step, part) of all micro-batches from a step on."""
        return ((step, part) for step in range(first, self.steps) for part in range(len(self.parts(step))))

    def parts(self, step: int) -> list[list[int]]:
        """The micro-batches of this process in a step, as places in the order of all epochs."""
        places, size = range(step * self.batch_size, (step + 1) * self.batch_size), self.batch_size // self.world
        if self.lengths is None:
            shares = [list(places[i : i + size]) for i in range(0, len(places), size)]
        else:
            shares = dealt(sorted(places, key=self._length, reverse=True), self.world)
        share = shares[self.rank]
        if self.max_tokens is None:
            return [share[i : i + self.micro_batch_size] for i in range(0, size, self.micro_batch_size)]
        most = max(len(filled(share, self._length, self.max_tokens)) for share in shares)
        return filled(share, self._length, self.max_tokens, at_least=most)

    def __getitem__(self, key: tuple[int, int]) -> Drawn:
        step, part = key
        places = self.parts(step)[part]
        seeds = [random.Random(f"{self.seed}/{place}").getrandbits(48) for place in places]
        bad: list[BadRecord] = []
        while len(bad) < len(self.records):
            try:
                return Drawn(self.make([self._pick(place, bad) for place in places], seeds=seeds), bad)
            except BadRecord as error:
                bad.append(error)
                if not self.skip:
                    break
        return Drawn(None, bad)

    def _pick(self, place: int, bad: list[BadRecord]) -> dict:
        """The record of a place, or the first that is drawn for it and not among the bad ones."""
        own, names = self.row(place), {b.name for b in bad}
        if self.records[own]["id"] not in names:
            return self.records[own]
        rows = list(range(len(self.records)))
        random.Random(f"{self.seed}/{place}/other").shuffle(rows)
        if self.lengths:
            rows.sort(key=lambda row: max(0, self.lengths[row] - self.lengths[own]))  # the longer ones last
        return next(self.records[row] for row in rows if self.records[row]["id"] not in names)

    def _length(self, place: int) -> int:
        return self.lengths[self.row(place)]

    def row(self, place: int) -> int:
        """Which record is at a place."""
        epoch, i = divmod(place, len(self.records))
        if epoch not in self.orders:  # a batch may reach from one epoch into the next
            self.orders = {e: rows for e, rows in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = self._order(epoch)
        return self.orders[epoch][i]

    def _order(self, epoch: int) -> list[int]:
        rows, rng = list(range(len(self.records))), random.Random(f"{self.seed}/{epoch}")
        rng.shuffle(rows)  # a string seed is stable across Python versions
        if self.group_by_length:
            begun = -epoch * len(rows) % self.batch_size  # records that complete the last batch of the epoch before
            rows = grouped(rows, self.lengths, self.batch_size, begun, rng)
        return rows


def grouped(rows: list[int], lengths: list[int], batch_size: int, begun: int, rng: random.Random) -> list[int]:
    """A shuffled order of records in which batches are of similar lengths.

    Within windows of WINDOW batches the records are sorted by length and cut into batches, and these are shuffled. What
    a batch of another epoch needs stays as it is: the first `begun` records, and those after the last whole batch.
    """
    result = rows[:begun]
    for start in range(begun, len(rows), WINDOW * batch_size):
        window = rows[start : start + WINDOW * batch_size]
        whole = len(window) // batch_size * batch_size
        ordered = sorted(window[:whole], key=lengths.__getitem__)
        batches = [ordered[i : i + batch_size] for i in range(0, whole, batch_size)]
        rng.shuffle(batches)
        result += [row for batch in batches for row in batch] + window[whole:]
    return result


def dealt(places: list[int], world: int) -> list[list[int]]:
    """Sorted places, dealt out to processes forwards and backwards in turn, so that their lengths sum up alike."""
    shares: list[list[int]] = [[] for _ in range(world)]
    for i, place in enumerate(places):
        turn, at = divmod(i, world)
        shares[world - 1 - at if turn % 2 else at].append(place)
    return shares


def filled(places: list[int], length: Callable[[int], int], limit: int, at_least: int = 1) -> list[list[int]]:
    """Places cut in their order into micro-batches of at most `limit` tokens, and of these the largest halved until
    there are enough."""
    parts: list[list[int]] = []
    tokens = limit
    for place in places:
        if tokens + length(place) > limit:
            parts.append([])
            tokens = 0
        parts[-1].append(place)
        tokens += length(place)
    while len(parts) < at_least:
        i = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[i]) // 2
        parts[i : i + 1] = [parts[i][:half], parts[i][half:]]
    return parts
