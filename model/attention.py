"""Who may look at whom: the attention rules that the decoder can run under.

The decoder works on packed tokens, (T, D) without a batch dimension, and asks a rule `attend(layer, q, k, v)`
for the mixing. That one seam covers plain causal text, scoring with shared prefixes, and generation with a
cache (model/generate.py).

`SharedPrefix` is the rule of the scoring core. A group is one prefix (system text, image, prompt) and all the
responses to it. The prefix is computed once; each response sees the prefix and itself, never another one:

                     keys:  b0 b1 b2  p   c0 c1   r0 r1        b0..p  prefix (p is its last token)
    body queries     b1     1  1                               c      chosen
    tail queries     p      2  2  2   3                        r      rejected
                     c1     2  2  2   3   4  4
                     r1     2  2  2   3          4  4          1..4   the block (model/blocks.py)

The prefix minus its last token is the *body*: ordinary causal attention among equals. The last prefix token
and the responses are the *tail*: they are the positions that predict response tokens, so in the last layer
only the tail is computed. Packed order: all bodies, then all tails. Four blocks cover what is to be seen, each
one for all groups: bodies (1) and responses (4) are causal, tails see all of their body (2) and p (3).

A prefix may have *hidden* tokens, which no token attends to, not even they themselves: BDHS (pairs/bdhs.py)
hides image tokens. As queries they go on, and every position keeps its number. They are no keys of block 2;
block 1 is then attention with a mask.

Shapes: G groups, T packed tokens, H heads, K key-value heads, d head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks import Block, BlockAttention, block
from model.packing import tail_rows


class Causal:
    """Every token sees itself and what came before: one sequence."""

    skip = 0  # leading tokens whose last-layer state is never needed

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, K, d) -> (T, H, d)."""
        return mix(q[None], k[None], v[None], causal=True)[0]


class Ragged:
    """Between packed rows and a padded batch: `pad` (sum of lengths, ...) -> (G, longest, ...), `unpad` back."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.shape = (len(lengths), max(lengths))
        self.even = min(lengths) == max(lengths)  # then both directions are views
        if not self.even:
            n = torch.tensor(lengths)
            inside = torch.arange(self.shape[1]) < n[:, None]  # (G, longest)
            # Padding repeats row 0; it is masked, so it receives no gradient.
            rows = torch.zeros(self.shape, dtype=torch.long).masked_scatter(inside, torch.arange(int(n.sum())))
            self.rows, self.slots = rows.flatten().to(device), inside.flatten().nonzero()[:, 0].to(device)

    def pad(self, x: Tensor) -> Tensor:
        x = x if self.even else x.index_select(0, self.rows)
        return x.reshape(*self.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.even else x.index_select(0, self.slots)


class Ragged:
    """Between packed rows and a padded batch: `pad` (sum of lengths, ...) -> (G, longest, ...), `unpad` back."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu"):
        self.shape = (len(lengths), max(lengths))
        self.even = min(lengths) == max(lengths)  # then both directions are views
        if not self.even:
            n = torch.tensor(lengths)
            inside = torch.arange(self.shape[1]) < n[:, None]  # (G, longest)
            # Padding repeats row 0; it is masked, so it receives no gradient.
            rows = torch.zeros(self.shape, dtype=torch.long).masked_scatter(inside, torch.arange(int(n.sum())))
            self.rows, self.slots = rows.flatten().to(device), inside.flatten().nonzero()[:, 0].to(device)

    def pad(self, x: Tensor) -> Tensor:
        x = x if self.even else x.index_select(0, self.rows)
        return x.reshape(*self.shape, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.even else x.index_select(0, self.slots)


class SharedPrefix:
    """The rule drawn above. Built on the CPU; `to` moves it.

    Args:
        prefixes: prefix length of each group, at least 2 tokens.
        responses: for each group the input length of each response (its last token predicts nothing and is no
            input).
        hidden: for each group (prefix,) bool, True at tokens that are hidden from all; None hides nothing. The
            first token of all and the last of the prefix must be visible, so that every query has a key.
    """

    def __init__(self, prefixes: list[int], responses: list[list[int]], device: torch.device | str = "cpu",
                 hidden: list[Tensor] | None = None):
        self.bodies = [p - 1 for p in prefixes]
        self.skip = sum(self.bodies)
        visible = _visible(prefixes, hidden) if hidden is not None and any(h.any() for h in hidden) else None
        self.masks = None if visible is None else [_causal(len(row)) & row for row in visible]
        body = block(slice(0, self.skip), slice(0, self.skip), (self.bodies, self.bodies), causal=True)
        self.blocks = [body, *_tail_blocks(self.bodies, responses, visible, self.skip)]
        self.tail_blocks = _tail_blocks(self.bodies, responses, visible, 0)  # where q is the tail alone
        self._map(lambda x: x.to(device))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), or (T - skip, H, d) where only the tail is asked for; k, v (T, K, d) -> like q."""
        if len(q) < len(k):
            return BlockAttention.apply(q, k, v, self.tail_blocks)
        if self.masks is None:
            return BlockAttention.apply(q, k, v, self.blocks)
        bodies = zip(*(x[: self.skip].split(self.bodies) for x in (q, k, v)), self.masks)
        seen = [mix(*(x[None] for x in qkv), mask=mask)[0] for *qkv, mask in bodies]
        return torch.cat([*seen, BlockAttention.apply(q[self.skip :], k, v, self.tail_blocks)])

    def to(self, device: torch.device | str) -> SharedPrefix:
        """The rule on a device; from pinned memory the copy does not block."""
        return copy.copy(self)._map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> SharedPrefix:
        """The rule in pinned memory."""
        return copy.copy(self)._map(lambda x: x.pin_memory())

    def _map(self, move: Callable) -> SharedPrefix:
        self.blocks, self.tail_blocks = ([b.map(move) for b in blocks] for blocks in (self.blocks, self.tail_blocks))
        self.masks = self.masks and [move(mask) for mask in self.masks]
        return self


def _tail_blocks(bodies: list[int], responses: list[list[int]], visible: list[Tensor] | None, start: int,
                 ) -> list[Block]:
    """Blocks 2 to 4 of the drawing, for a q whose row `start` is the first of the tails."""
    skip, tails = sum(bodies), [1 + sum(group) for group in responses]
    anchors, begins = tail_rows(responses)
    spans = [(row, n) for rows, group in zip(begins, responses) for row, n in zip(rows, group) if n]
    own = torch.tensor([i for row, n in spans for i in range(row, row + n)])  # tail rows of the responses
    lengths = [n for _, n in spans]
    seen, keys = bodies, slice(0, skip)
    if visible is not None:
        seen, keys = [int(row.sum()) for row in visible], torch.cat(visible).nonzero()[:, 0]
    tail = slice(start, start + sum(tails))
    blocks = [block(tail, keys, (tails, seen), causal=False),
              block(tail, torch.tensor(anchors) + skip, (tails, [1] * len(tails)), causal=False)]
    return blocks + [block(own + start, own + skip, (lengths, lengths), causal=True)] if spans else blocks


def _visible(prefixes: list[int], hidden: list[Tensor]) -> list[Tensor]:
    """Of each body (tokens,) bool, False at its hidden tokens. ValueError when they do not fit."""
    for g, (length, row) in enumerate(zip(prefixes, hidden, strict=True)):
        if row.shape != (length,) or row[0] or row[-1]:
            raise ValueError(f"hidden tokens of prefix {g}: need {length} flags,"
                             " the first and the last of them False")
    return [~row[:-1] for row in hidden]


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def mix(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (G, n, H, d), k and v (G, m, K, d) -> (G, n, H, d); K divides H (grouped queries).

    Query i sees the keys 0..i if `causal`, those that the mask, (n, m) or (G, 1, n, m), allows if there is one, else
    all.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (G, heads, tokens, d)
    gqa = q.shape[1] > k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa).transpose(1, 2)
