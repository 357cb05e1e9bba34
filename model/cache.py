"""Keys and values of generation: prompts are computed once, and the responses to each grow after it.

`Recorder` keeps what `SharedPrefix` computes of prompts; `Prompts` holds it, for one generation or several. `Cache` is
the attention rule of all that is written after them. What it keeps of a layer, (M, K, P + W n, d), for two prompts,
the first with responses a and b, the second with c:

        prompt, P         column 0   column 1   column 2   (W in all)
    0:  p p p p p         .  b       a  b       a  b       .  padding, never looked at
    1:  p p p . .         .  .       c  .       c  .

A column has a cell for each response, so the cache grows at its end. Beginnings of different length end in the same
column. All responses to a prompt are queries of the same keys, and a mask keeps them from seeing each other: one call
of torch's attention, whatever is computed. (It scores the new tokens of all n responses for each of them. On a CPU that
costs no more than separate products up to 8 responses, and two thirds more with 16.)

Shapes: M prompts, P tokens of the longest, n responses to each (or at most), N in all, W columns, T tokens computed
now, H heads, K key-value heads, d head width, D decoder width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import SharedPrefix

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each


@dataclass
class Prompts:
    """Prompts that have been computed.

    lengths: tokens of each.
    blocked: (M, P) bool, True at padding and at hidden tokens.
    states: (M, D), which predict the first new tokens.
    layers: keys and values, each (M, K, P + room, d).
    """

    lengths: list[int]
    blocked: Tensor
    states: Tensor
    layers: Layers

    def take(self, rows: list[int], room: int) -> "Prompts":
        """These prompts with room for so many tokens after each: a copy, unless all of it is here."""
        P = self.blocked.shape[1]
        if rows == list(range(len(self.lengths))) and P + room <= self.layers[0][0].shape[2]:
            return self
        chosen = torch.tensor(rows, device=self.blocked.device)
        layers = [tuple(_with_room(x[chosen, :, :P], room) for x in pair) for pair in self.layers]
        return Prompts([self.lengths[row] for row in rows], self.blocked[chosen], self.states[chosen], layers)


class Recorder:
    """The attention rule while prompts are computed: `SharedPrefix` without responses, and keys and values are kept.

    Args:
        lengths: tokens of each prompt.
        room: tokens that will be written after each.
        hidden: as for `SharedPrefix`.
    """

    def __init__(self, lengths: list[int], room: int, device: torch.device, hidden: list[Tensor] | None = None):
        self.attend, self.room = SharedPrefix(lengths, [[] for _ in lengths], device, hidden), room
        self.skip, self.layers = self.attend.skip, []
        # Packed are all bodies, then the last token of each prompt (model/packing.py).
        last = torch.tensor(lengths)[:, None] - 1  # (M, 1)
        place = torch.arange(max(lengths))  # (P,)
        rows = (last.cumsum(0) - last + place).masked_fill(place > last, 0)  # (M, P) of the bodies
        rows = rows.scatter(1, last, self.skip + torch.arange(len(lengths))[:, None])
        blocked = place > last  # (M, P)
        for row, flags in zip(blocked, hidden or ()):
            row[: len(flags)] |= flags
        self.rows, self.blocked = rows.to(device), blocked.to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), or without the first `skip` rows; k and v (T, K, d) -> like q."""
        self.layers.append(tuple(_with_room(x[self.rows].transpose(1, 2), self.room) for x in (k, v)))
        return self.attend(layer, q, k, v)


def _with_room(x: Tensor, room: int) -> Tensor:
    """(M, K, P, d) -> (M, K, P + room, d), contiguous. Room is written before it is read."""
    M, K, P, d = x.shape
    y = x.new_empty(M, K, P + room, d)
    y[:, :, :P] = x
    return y


class Grid:
    """Between packed rows (T, ...) and the cells (M, s, ...) of a grid that hold them; other cells repeat row 0."""

    def __init__(self, cells: Tensor, shape: tuple[int, int], device: torch.device):
        size = shape[0] * shape[1]
        self.shape, self.full = shape, torch.equal(cells, torch.arange(size))
        if not self.full:  # else both directions are views
            rows = torch.zeros(size, dtype=torch.long).scatter(0, cells, torch.arange(len(cells)))
            self.rows, self.cells = rows.to(device), cells.to(device)

    def pad(self, x: Tensor) -> Tensor:
        x = x if self.full else x[self.rows]
        return x.reshape(*self.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.full else x[self.cells]


class Cache:
    """The attention rule drawn above. The beginnings are computed first, all together, if there are any; then `step`
    is called before each further token of every response.

    Args:
        prompts: with room for W columns of n tokens.
        starts: for each prompt the number of tokens that each of its responses begins with.
        share: query heads to each key-value head.
    """

    skip = 0  # tokens whose last-layer state is not needed

    def __init__(self, prompts: Prompts, starts: list[list[int]], share: int):
        self.layers, self.blocked, self.share = prompts.layers, prompts.blocked, share
        counts = torch.tensor([count for group in starts for count in group])  # (N,)
        self.columns = int(counts.max())  # that are filled, or about to be
        self.first = self.columns - counts  # (N,) column in which each response begins
        self.width = (self.layers[0][0].shape[2] - self.blocked.shape[1]) // max(map(len, starts))  # W
        self._arrange([len(group) for group in starts])
        if self.columns:
            columns = torch.cat([torch.arange(first, self.columns) for first in self.first.tolist()])
            prompts, places = (x.repeat_interleave(counts) for x in (self.cells // self.n, self.cells % self.n))
            cells = (prompts * self.columns + columns) * self.n + places
            self.grid = Grid(cells, (len(starts), self.columns * self.n), self.blocked.device)
            self.mask = self._causal()

    def _arrange(self, counts: list[int]) -> None:
        """Give the responses, so many to each prompt, their cells, and say what each of them may look at."""
        M, n, P = len(counts), max(counts), self.blocked.shape[1]
        device, self.n = self.blocked.device, n
        self.cells = torch.cat([torch.arange(count) + i * n for i, count in enumerate(counts)])  # (N,) in (M n)
        self.responses = Grid(self.cells, (M, n), device)
        first = torch.full((M * n,), self.width).scatter(0, self.cells, self.first).view(M, n, 1, 1)
        own = (torch.arange(self.width)[:, None] >= first) & torch.eye(n, dtype=torch.bool)[:, None]  # (M, n, W, n)
        seen = torch.cat([~self.blocked[:, None].expand(M, n, P), own.flatten(2).to(device)], 2)
        self.seen = seen.repeat_interleave(self.share, 1)[:, None]  # (M, 1, n H/K, P + W n)
        self.all_seen = bool(seen.all())

    def _causal(self) -> Tensor:
        """(M, 1, columns n H/K, P + columns n): what beginnings may look at, token by token."""
        P, now = self.blocked.shape[1], torch.arange(self.columns, device=self.blocked.device)
        column = torch.cat([now.new_full((P,), -1), now.repeat_interleave(self.n)])  # of each key
        return (self.seen[..., : len(column)] & (column <= now[:, None, None])).flatten(1, 2)[:, None]

    def step(self) -> None:
        """Go on to the next column."""
        self.columns += 1
        self.grid, self.mask = self.responses, None if self.all_seen else self.seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, K, d) -> (T, H, d), of all beginnings or of one token of each response."""
        (H, d), K, M = q.shape[1:], k.shape[1], len(self.blocked)
        end = self.blocked.shape[1] + self.columns * self.n
        keys, values = (x[:, :, :end] for x in self.layers[layer])  # (M, K, P + columns n, d)
        new = slice(end - self.grid.shape[1], end)
        keys[:, :, new], values[:, :, new] = (self.grid.pad(x).transpose(1, 2) for x in (k, v))
        q = self.grid.pad(q).view(M, -1, K, H // K, d).transpose(1, 2).flatten(2, 3)  # (M, K, s H/K, d)
        mask = self.mask if self.mask is None else self.mask[..., :end]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.view(M, K, -1, H // K, d).transpose(1, 2).reshape(M, -1, H, d)
        return self.grid.unpad(y)

    def keep(self, going: Tensor) -> None:
        """Go on with these responses only, (N',) in order; forget the others, and prompts that have none left."""
        going = going.cpu()
        P, old, self.first = self.blocked.shape[1], self.n, self.first[going]
        prompts, places = self.cells[going] // old, self.cells[going] % old
        left, counts = prompts.unique_consecutive(return_counts=True)
        left, places = left.to(self.blocked.device), places.to(self.blocked.device)
        self.blocked = self.blocked[left]
        self._arrange(counts.tolist())
        places = self.responses.pad(places)[:, None, None, :, None]  # (M', 1, 1, n', 1), where each was

        def kept(x: Tensor) -> Tensor:
            own = x[left, :, P : P + self.columns * old].unflatten(2, (self.columns, old))
            own = own.take_along_dim(places, 3).flatten(2, 3)
            y = _with_room(x[left, :, :P], self.width * self.n)
            y[:, :, P : P + own.shape[2]] = own
            return y

        self.layers = [(kept(k), kept(v)) for k, v in self.layers]
