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

A prefix may have *hidden* tokens, which no other token attends to: BDHS (pairs/bdhs.py) hides image tokens. Every
position keeps its number. They are no keys of block 2; block 1 is then attention with a mask. A hidden token attends to
itself, so that every query has a key, also in a prompt that begins with an image; what it computes reaches no other.

Shapes: G groups, T packed tokens, H heads, K key-value heads, d head width.
"""

import copy
from collections.abc import Callable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks import Blocks, Rows
from model.packing import Movable, tail_rows


class Causal:
    """Every token sees itself and what came before: one sequence."""

    skip = 0  # leading tokens whose last-layer state is never needed

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), k and v (T, K, d) -> (T, H, d)."""
        return mix(q[None], k[None], v[None], causal=True)[0]


class SharedPrefix(Movable):
    """The rule drawn above. Built on the CPU.

    Args:
        prefixes: prefix length of each group, at least 2 tokens.
        responses: for each group the input length of each response (its last token predicts nothing and is no
            input).
        hidden: for each group (prefix,) bool, True at tokens that are hidden from all others; None hides nothing. The
            last token of the prefix, where every response begins, must be visible.
    """

    def __init__(self, prefixes: list[int], responses: list[list[int]], device: torch.device | str = "cpu",
                 hidden: list[Tensor] | None = None):
        self.bodies = [p - 1 for p in prefixes]
        self.skip = sum(self.bodies)
        bodies, self.masks = _spans(0, self.bodies), None
        if hidden is not None and any(h.any() for h in hidden):
            visible = _visible(prefixes, hidden)
            self.masks = [torch.ones(len(row), len(row), dtype=torch.bool).tril() & (row | torch.eye(len(row)).bool())
                          for row in visible]
            seen = [row.nonzero()[:, 0] + body.start for row, body in zip(visible, bodies)]
        else:
            seen = bodies
        self.whole = Blocks([(list(zip(bodies, bodies)), True), *_tail_kinds(seen, responses, self.skip, self.skip)])
        self.tail = Blocks(_tail_kinds(seen, responses, self.skip, 0))  # for a q without bodies
        self._map(lambda x: x.to(device))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), or (T - skip, H, d) where only the tail is asked for; k, v (T, K, d) -> like q."""
        if len(q) < len(k):
            return self.tail(q, k, v)
        if self.masks is None:
            return self.whole(q, k, v)
        bodies = zip(self.masks, *(x[: self.skip].split(self.bodies) for x in (q, k, v)))
        seen = [mix(*(x[None] for x in qkv), mask=mask)[0] for mask, *qkv in bodies]
        return torch.cat([*seen, self.tail(q[self.skip :], k, v)])

    def moved(self, move: Callable) -> "SharedPrefix":
        """With `move` applied to all tensors (model/packing.py)."""
        return copy.copy(self)._map(move)

    def _map(self, move: Callable) -> "SharedPrefix":
        self.whole, self.tail = self.whole.map(move), self.tail.map(move)
        self.masks = self.masks and [move(mask) for mask in self.masks]
        return self


def _spans(start: int, lengths: list[int]) -> list[slice]:
    """Slices of these lengths one after another."""
    return [slice(first, first + n) for n, first in zip(lengths, accumulate(lengths, initial=start))]


def _tail_kinds(seen: list[Rows], responses: list[list[int]], skip: int, start: int) -> list:
    """Kinds 2 to 4 of the drawing, as for `Blocks`.

    Args:
        seen: key rows of each body.
        skip: row of the first tail token among the keys.
        start: its row among the queries.
    """
    anchors, begins = tail_rows(responses)
    tails = _spans(start, [1 + sum(group) for group in responses])
    own = [slice(row, row + n) for rows, group in zip(begins, responses) for row, n in zip(rows, group) if n]
    shifted = lambda x, by: slice(x.start + by, x.stop + by)  # noqa: E731
    bodies = [(tail, keys) for tail, keys in zip(tails, seen) if isinstance(keys, slice) or len(keys)]  # or all hidden
    return [(bodies, False),
            ([(tail, slice(skip + row, skip + row + 1)) for tail, row in zip(tails, anchors)], False),
            ([(shifted(x, start), shifted(x, skip)) for x in own], True)]


def _visible(prefixes: list[int], hidden: list[Tensor]) -> list[Tensor]:
    """Of each body (tokens,) bool, False at its hidden tokens. ValueError when they do not fit."""
    for g, (length, row) in enumerate(zip(prefixes, hidden, strict=True)):
        if row.shape != (length,) or row[-1]:
            raise ValueError(f"hidden tokens of prefix {g}: need {length} flags, the last of them False")
    return [~row[:-1] for row in hidden]


def mix(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (G, n, H, d), k and v (G, m, K, d) -> (G, n, H, d); K divides H (grouped queries).

    Query i sees the keys 0..i if `causal`, those that the mask, (n, m) or (G, 1, n, m), allows if there is one, else
    all.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (G, heads, tokens, d)
    gqa = q.shape[1] > k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa).transpose(1, 2)
