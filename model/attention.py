"""Who may look at whom: the attention rules that the decoder can run under.

The decoder works on packed tokens, (T, D) without a batch dimension, and asks a rule `attend(layer, q, k, v)`
for the mixing. That one seam covers plain causal text, scoring with shared prefixes, and generation with a
cache (model/generate.py).

`SharedPrefix` is the rule of the scoring core. A group is one prefix (system text, image, prompt) and all the
responses to it. The prefix is computed once; each response sees the prefix and itself, never another one:

                     keys:  b0 b1 b2  p   c0 c1   r0 r1        b0..p  prefix (p is its last token)
    body queries     b1     x  x                               c      chosen
    tail queries     p      x  x  x   x                        r      rejected
                     c1     x  x  x   x   x  x
                     r1     x  x  x   x          x  x

A prefix may have *hidden* tokens, which no other token attends to: BDHS (pairs/bdhs.py) hides image tokens. Every
position keeps its number. A hidden token attends to itself, so that every query has a key, also in a prompt that begins
with an image; what it computes reaches no other token.

The prefix minus its last token is the *body*: ordinary causal attention among equals. The last prefix token
and the responses are the *tail*: they are the positions that predict response tokens, so in the last layer
only the tail is computed. Packed order: all bodies, then all tails.

Shapes: G groups, T packed tokens, H heads, K key-value heads, d head width; b and t the longest body and tail.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ops


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


class SharedPrefix:
    """The rule drawn above.

    Args:
        prefixes: prefix length of each group, at least 2 tokens.
        responses: for each group the input length of each response (its last token predicts nothing and is no
            input).
        hidden: for each group (prefix,) bool, True at tokens that are hidden from all others; None hides nothing. The
            last token of the prefix, where every response begins, must be visible.
    """

    def __init__(self, prefixes: list[int], responses: list[list[int]], device: torch.device | str = "cpu",
                 hidden: list[Tensor] | None = None):
        bodies = [p - 1 for p in prefixes]
        tails = [1 + sum(r) for r in responses]
        self.skip = sum(bodies)
        self.body, self.tail = Ragged(bodies, device), Ragged(tails, device)
        (_, b), (_, t) = self.body.shape, self.tail.shape
        mask = _tail_mask(bodies, responses, b, t)  # (G, 1, t, b + t)
        self.body_mask = None  # causal
        if hidden is not None and any(h.any() for h in hidden):
            visible = _visible(prefixes, hidden, b)[:, None, None]  # (G, 1, 1, b)
            mask[..., :b] &= visible
            causal, itself = torch.ones(b, b, dtype=torch.bool).tril(), torch.eye(b, dtype=torch.bool)
            self.body_mask = (causal & visible | itself).to(device)  # (G, 1, b, b)
        self.mask = mask.to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, H, d), or (T - skip, H, d) where only the tail is asked for; k, v (T, K, d) -> like q."""
        tail_only = len(q) < len(k)
        k, v = (torch.cat(self._split(x), 1) for x in (k, v))  # (G, b + t, K, d)
        if tail_only:
            return self.tail.unpad(mix(self.tail.pad(q), k, v, mask=self.mask))
        body, tail = self._split(q)  # (G, b, H, d), (G, t, H, d)
        tail = mix(tail, k, v, mask=self.mask)
        if self.body_mask is None:
            body = mix(body, k, v, causal=True)
        else:
            body = mix(body, k[:, : body.shape[1]], v[:, : body.shape[1]], mask=self.body_mask)
        return torch.cat([self.body.unpad(body), self.tail.unpad(tail)])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(T, heads, d) -> padded bodies and padded tails."""
        body, tail = x.split([self.skip, len(x) - self.skip])
        return self.body.pad(body), self.tail.pad(tail)


def _tail_mask(bodies: list[int], responses: list[list[int]], b: int, t: int) -> Tensor:
    """(G, 1, t, b + t) bool, True where a tail query may look. Padding sees itself, so no row is empty."""
    segment = torch.zeros(len(bodies), t, dtype=torch.long)  # 0 the last prefix token, 1.. responses, -1 padding
    for g, lengths in enumerate(responses):
        ids = [0] + [1 + i for i, n in enumerate(lengths) for _ in range(n)]
        segment[g] = torch.tensor(ids + [-1] * (t - len(ids)))
    query, key = segment[:, :, None], segment[:, None, :]  # (G, t, 1), (G, 1, t)
    own = (query == key) & torch.ones(t, t, dtype=torch.bool).tril()
    tail = own | ((key == 0) & (query >= 0))  # (G, t, t)
    body = (torch.arange(b) < torch.tensor(bodies)[:, None])[:, None, :].expand(-1, t, -1)  # (G, t, b)
    return torch.cat([body, tail], dim=2)[:, None]


def _visible(prefixes: list[int], hidden: list[Tensor], b: int) -> Tensor:
    """(G, b) bool, False at the hidden tokens of the bodies. ValueError when they do not fit."""
    visible = torch.ones(len(prefixes), b, dtype=torch.bool)
    for g, (length, row) in enumerate(zip(prefixes, hidden, strict=True)):
        if row.shape != (length,) or row[-1]:
            raise ValueError(f"hidden tokens of prefix {g}: need {length} flags, the last of them False")
        visible[g, : length - 1] = ~row[:-1]
    return visible


def mix(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q (G, n, H, d), k and v (G, m, K, d) -> (G, n, H, d); K divides H (grouped queries).

    Query i sees the keys 0..i if `causal`, those that the mask (G, 1, n, m) allows if there is one, else all.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (G, heads, tokens, d)
    share = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
        return ops.Attention.apply(q, k, v, causal, mask).transpose(1, 2)
    if causal and q.shape[2] < k.shape[2]:
        k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=share > 1)
    return y.transpose(1, 2)
