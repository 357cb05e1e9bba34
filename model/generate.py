"""Generation with a key-value cache: greedy, temperature, top-p; batched; n continuations share one prefix.

A prompt with its image is computed once however many responses are drawn from it, and its keys and values are
kept once: at each step the n responses to a prompt are n queries against the same prefix, followed by each
response's own short cache. Responses may begin with given tokens, different ones for each: they are computed
together with the prompt, side by side after it (model/packing.py).

Random numbers are drawn per response, not per batch: response j to a prompt with seed s gets its own stream, so
what is sampled does not depend on what else is in the batch or on how many processes share the work.

Shapes: M prompts, n responses to each (or at most), N responses in all, b longest prefix body, S longest
continuation so far, H heads, K key-value heads, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import BadInput
from model.attention import SharedPrefix
from model.packing import lay_out, tail_rows
from model.views import View, stack
from model.vlm import VLM

Stop = Callable[[int, int, list[int]], bool]


class NotFinite(BadInput):
    """Logits that are NaN or infinite; `prompt` is the number of the prompt they are for."""

    what = "the model's logits are NaN or infinite"

    def __init__(self, prompt: int):
        super().__init__(f"prompt {prompt}: {self.what}")
        self.prompt = prompt


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


class Cache:
    """Keys and values of every layer: one prefix per prompt, one continuation per response.

    It is both attention rules of generation. While prompts and beginnings are computed (`filling`) it attends as
    `SharedPrefix` and records keys and values; then each call mixes one new token per response over its prompt's prefix
    and its own continuation. What it holds of a layer, for two prompts with two responses and one:

        prefix (M, K, b + 1, d)         own (N, K, width, d)
                                                    column
                                                      v
        0: p p p p p     <-- read by --  0.0:  .  x  x  n  _  _        x  beginnings and tokens so far
                         <-- read by --  0.1:  x  x  x  n  _  _        n  the new token of each response
        1: p p p . .     <-- read by --  1.0:  .  .  x  n  _  _        _  room for those to come
                                                                       .  padding, never read

    Continuations of different length end in the same column, so that all grow by the same one: `unused` marks the
    columns before a response's beginning, `blocked` the padding and the hidden tokens of the prefixes.

    Args:
        lengths: tokens of each prompt.
        starts: for each prompt the tokens that each of its responses begins with.
        steps: tokens to come.
        hidden: as for `SharedPrefix`; holds for the new tokens, too.
    """

    def __init__(self, lengths: list[int], starts: list[list[int]], steps: int, layers: int, device: torch.device,
                 hidden: list[Tensor] | None = None):
        self.prefill = SharedPrefix(lengths, starts, device, hidden)
        self.bodies = Ragged([length - 1 for length in lengths], device)
        self.lengths, self.answers = lengths, Ragged([len(s) for s in starts], device)
        blocked = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]  # (M, b + 1)
        for row, flags in zip(blocked, hidden or ()):
            row[: len(flags)] |= flags
        self.blocked = blocked.to(device)

        counts = torch.tensor([n for s in starts for n in s])  # (N,) lengths of the beginnings
        self.column, self.width = int(counts.max()) - 1, int(counts.max()) + steps  # last filled, all
        self.unused = None  # (N, width)
        if counts.min() < counts.max():
            self.unused = (torch.arange(self.width) < self.column + 1 - counts[:, None]).to(device)

        # From tail rows to `own`: token t of a beginning of n tokens goes to column - n + 1 + t.
        anchors, begins = tail_rows(starts)
        rows = [range(row, row + n) for group, s in zip(begins, starts) for row, n in zip(group, s)]
        self.anchors = torch.tensor(anchors)  # (M,)
        self.begun = torch.tensor([row for span in rows for row in span], dtype=torch.long)  # (beginning tokens,)
        self.owners = torch.arange(len(counts)).repeat_interleave(counts)  # response of each of them
        self.slots = torch.cat([torch.arange(self.column + 1 - n, self.column + 1) for n in counts])  # its column
        # The tail row that predicts each response's first new token: its beginning's last, or the prompt's.
        owner = [anchor for anchor, s in zip(anchors, starts) for _ in s]
        self.ends = torch.tensor([span[-1] if span else anchor for span, anchor in zip(rows, owner)])  # (N,)

        self.prefix: list[tuple[Tensor, Tensor]] = [()] * layers
        self.own: list[tuple[Tensor, Tensor]] = [()] * layers
        self.filling = True

    @property
    def skip(self) -> int:
        """Tokens whose last-layer state is not needed: while prompts are computed all but the tails."""
        return self.prefill.skip if self.filling else 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Prefill: q, k, v packed as in SharedPrefix. Decoding: q (N, H, d), k and v (N, K, d). -> like q."""
        if self.filling:
            self.prefix[layer] = (self._prefix_rows(k), self._prefix_rows(v))
            self.own[layer] = (self._own_rows(k), self._own_rows(v))
            return self.prefill(layer, q, k, v)
        return self._decode(layer, q, k, v)

    def _prefix_rows(self, x: Tensor) -> Tensor:
        """Packed bodies and tails (T, K, d) -> (M, K, b + 1, d), each prefix contiguous, then padding."""
        body, last = self.bodies.pad(x[: self.prefill.skip]), x[self.prefill.skip :][self.anchors]
        rows = torch.cat([body, torch.zeros_like(body[:, :1])], 1)  # (M, b + 1, K, d)
        rows[torch.arange(len(last)), torch.tensor(self.lengths) - 1] = last  # over the padding of its own body
        return rows.transpose(1, 2)

    def _own_rows(self, x: Tensor) -> Tensor:
        """Packed bodies and tails (T, K, d) -> (N, K, width, d): the beginnings, space before and after."""
        rows = x.new_zeros(len(self.ends), x.shape[1], self.width, x.shape[2])
        rows[self.owners, :, self.slots] = x[self.prefill.skip :][self.begun]
        return rows

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over two sets of keys: those of the prefix, which all responses to a prompt share, and a
        response's own. Their scores are put side by side; the weights are split again to read the values."""
        (N, H, d), K, now = q.shape, k.shape[1], self.column
        keys, values = self.own[layer]
        keys[:, :, now], values[:, :, now] = k, v
        keys, values = keys[:, :, : now + 1], values[:, :, : now + 1]  # (N, K, S, d)
        prefix_keys, prefix_values = self.prefix[layer]  # (M, K, b + 1, d)

        # Scores on the prefix: the n responses to a prompt times the H / K query heads that share a key head become
        # one batch of n H/K queries, so that each prefix is read once. `answers` pads to n responses a prompt.
        q = q.view(N, K, H // K, d) * d**-0.5
        shared = self.answers.pad(q)  # (M, n, K, H/K, d)
        M, n = shared.shape[:2]
        shared = shared.transpose(1, 2).reshape(M, K, -1, d)  # (M, K, n H/K, d)
        to_prefix = (shared @ prefix_keys.transpose(2, 3)).float()  # (M, K, n H/K, b + 1)
        to_prefix = to_prefix.masked_fill(self.blocked[:, None, None], float("-inf"))
        to_prefix = self.answers.unpad(to_prefix.view(M, K, n, H // K, -1).transpose(1, 2))  # (N, K, H/K, b + 1)
        to_own = (q @ keys.transpose(2, 3)).float()  # (N, K, H/K, S)
        if self.unused is not None:
            to_own = to_own.masked_fill(self.unused[:, None, None, : now + 1], float("-inf"))

        weights = torch.cat([to_prefix, to_own], -1).softmax(-1).to(v.dtype)
        on_prefix, on_own = weights.split([to_prefix.shape[-1], to_own.shape[-1]], -1)
        # The values the same way: up to prompts with n H/K rows each, down to responses.
        on_prefix = self.answers.pad(on_prefix).transpose(1, 2).reshape(M, K, n * (H // K), -1)
        y = self.answers.unpad(
            (on_prefix @ prefix_values).view(M, K, n, H // K, d).transpose(1, 2))  # (N, K, H/K, d)
        return (y + on_own @ values).reshape(N, H, d)

    def keep(self, answers: Tensor) -> None:
        """Go on with these responses only, (N',) in order; forget the others, and prompts that have none left."""
        M, n = self.answers.shape
        prompts = self.answers.unpad(torch.arange(M, device=answers.device)[:, None].expand(M, n))[answers]
        left, counts = prompts.unique_consecutive(return_counts=True)
        self.answers = Ragged(counts.tolist(), answers.device)
        self.lengths = [self.lengths[i] for i in left.tolist()]
        self.blocked = self.blocked[left]
        self.unused = self.unused[answers] if self.unused is not None else None
        if len(left) < M:
            self.prefix = [(k[left], v[left]) for k, v in self.prefix]
        self.own = [(k[answers], v[answers]) for k, v in self.own]


@torch.no_grad()
def generate(
    model: VLM,
    views: list[View],
    prompts: list[list[int]],
    *,
    eos_id: int,
    shows: list[int] | None = None,
    questions: list[tuple[int, ...]] | None = None,
    n: int = 1,
    starts: list[list[list[int]]] | None = None,
    hidden: list[Tensor] | None = None,
    stop: Stop | None = None,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
) -> list[list[list[int]]]:
    """Continue each prompt n times.

    Args:
        views: distinct images.
        prompts: M lists of token ids with as many image tokens as their image has rows.
        shows: for each prompt the number of its image; left out, prompt i shows image i.
        questions: for each prompt what `VLM.connect` reads of it (`Processor.question`); left out, nothing.
        starts: for each prompt the beginnings of its responses, each a list of token ids (or none); left out, n
            responses that begin with nothing. All of a prompt share it, whatever they begin with.
        hidden: for each prompt (len(prompt),) bool, True at tokens that must not be looked at (model/attention.py).
        stop: (prompt, response, new tokens so far) -> whether this response needs no more; asked every 8 steps, so
            it may come back longer than needed.
        max_new_tokens: at most so many are added to each beginning.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches top_p.
        seeds: one (>= 0) per prompt; needed when temperature > 0.
    Returns: [M][n] lists of new token ids, without EOS. One of max_new_tokens has been cut off.
    Raises BadInput on a temperature or top_p out of range or a window that is too short; NotFinite, which is one,
    when logits are NaN or infinite; ValueError on missing seeds, a prompt of fewer than two tokens, one whose image
    tokens are not those of its image, beginnings or hidden flags that do not fit.
    """
    starts = [[[]] * n for _ in prompts] if starts is None else starts
    _check(model, prompts, starts, max_new_tokens, temperature, top_p, seeds)
    names = [(i, j) for i, group in enumerate(starts) for j in range(len(group))]  # (N,)
    device, decoder = model.device, model.language_model.model
    noise = _noise(seeds, starts, max_new_tokens).to(device) if temperature > 0 else None  # (N, steps)
    cache, states, position = _prefill(model, views, prompts, starts, shows or range(len(prompts)),
                                       questions or [()] * len(prompts), max_new_tokens, hidden)

    tokens = torch.full((len(names), max_new_tokens), eos_id, device=device)  # (N, steps)
    finished = torch.zeros(len(names), dtype=torch.bool, device=device)
    broken = finished.clone()
    rows = torch.arange(len(names), device=device)  # (N',) responses in the cache: unfinished, and a few finished
    for step in range(max_new_tokens):
        logits, finite = _predict(model, states)  # (N', V), (N',)
        broken[rows] |= ~finite  # asked about below, where the device is waited for anyway
        new = pick(logits, temperature, top_p, noise[rows, step] if noise is not None else None)  # (N',)
        new = new.masked_fill(finished[rows], eos_id)
        tokens[rows, step] = new
        finished[rows] |= new == eos_id
        if step + 1 == max_new_tokens:
            break
        if step % 8 == 7:  # asking costs a device synchronisation, so not at every step
            _refuse_broken(broken, names)
            if stop is not None:
                finished[rows] |= _stopped(stop, names, rows, finished[rows], tokens[:, : step + 1])
            going = (~finished[rows]).nonzero()[:, 0]
            if not len(going):
                break
            if len(going) <= 0.75 * len(rows):
                cache.keep(going)
                rows, new = rows[going], new[going]
        cache.column += 1
        states = decoder(decoder.embed_tokens(new), position[rows] + step, cache)  # (N', D)
    _refuse_broken(broken, names)
    answers = iter(_cut(row, eos_id) for row in tokens.tolist())
    return [[next(answers) for _ in group] for group in starts]


def _check(model: VLM, prompts: list[list[int]], starts: list[list[list[int]]], max_new_tokens: int,
           temperature: float, top_p: float, seeds: list[int] | None) -> None:
    """Refuse what cannot be generated, as the docstring of `generate` lists it."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise BadInput(f"temperature {temperature} and top_p {top_p}: need temperature >= 0 and 0 < top_p <= 1")
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed per prompt")
    if len(starts) != len(prompts) or not all(starts):
        raise ValueError("each prompt needs at least one beginning of a response, be it empty")
    longest = max(len(p) + max(map(len, g)) for p, g in zip(prompts, starts)) + max_new_tokens
    if longest > model.config.text.max_position_embeddings:
        raise BadInput(f"prompt and answer may reach {longest} tokens, the decoder takes "
                       f"{model.config.text.max_position_embeddings}")


def _prefill(model: VLM, views: list[View], prompts: list[list[int]], starts: list[list[list[int]]],
             shows: Sequence[int], questions: list[tuple[int, ...]], steps: int,
             hidden: list[Tensor] | None) -> tuple[Cache, Tensor, Tensor]:
    """Compute prompts and beginnings: the filled cache, the states (N, D) that predict the first new tokens, and the
    positions (N,) of these."""
    device, decoder = model.device, model.language_model.model
    pixels, rows = stack(views, model.config.tile_tokens)
    layout = lay_out(prompts, starts, [rows[image] for image in shows], questions, model.config.image_token_index)
    lengths, begun = [len(p) for p in prompts], [[len(ids) for ids in group] for group in starts]
    cache = Cache(lengths, begun, steps, len(decoder.layers), device, hidden)
    features = model.vision_features(pixels.to(device))  # (tiles, P, C)
    ids, positions, slots, shown = (x.to(device) for x in layout[:4])
    x = model.embed(ids, features, shown, slots, layout.questions)  # (T, D)
    states = decoder(x, positions, cache)  # (tail tokens, D)
    cache.filling = False
    first = torch.tensor([x + y for x, group in zip(lengths, begun) for y in group], device=device)  # (N,)
    return cache, states[cache.ends.to(device)], first


def _predict(model: VLM, states: Tensor) -> tuple[Tensor, Tensor]:
    """states (N', D) -> logits of the next tokens (N', V), never of the image token, and which are finite (N',)."""
    logits = model.language_model.lm_head(states).float()  # (N', V)
    finite = logits.sum(-1).isfinite()
    if model.config.image_token_index < logits.shape[-1]:  # a row that was never trained, and no word
        logits[:, model.config.image_token_index] = float("-inf")
    return logits, finite


def _refuse_broken(broken: Tensor, names: list[tuple[int, int]]) -> None:
    """Raise NotFinite for the first response with such logits; `broken` (N,)."""
    if True in (flags := broken.tolist()):
        raise NotFinite(names[flags.index(True)][0])


def _stopped(stop: Stop, names: list[tuple[int, int]], rows: Tensor, finished: Tensor, tokens: Tensor) -> Tensor:
    """Which of the responses going on (N',) need no more tokens; `tokens` (N, steps so far) of all."""
    written = zip(rows.tolist(), finished.tolist(), tokens[rows].tolist())
    return torch.tensor([not done and stop(*names[row], ids) for row, done, ids in written], device=rows.device)


def pick(logits: Tensor, temperature: float, top_p: float, u: Tensor | None) -> Tensor:
    """Next token of each row, (N, V) -> (N,): the best, or by inverse transform sampling with uniform u (N,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True, dim=-1, stable=True)  # (N, V)
    total = probs.cumsum(-1)
    inside = total - probs < top_p  # the best token always is
    kept = total.masked_fill(~inside, 0).amax(-1, keepdim=True)
    rank = (total < u[:, None] * kept).sum(-1, keepdim=True)
    return order.gather(1, rank.clamp_max(logits.shape[-1] - 1))[:, 0]


def _noise(seeds: list[int], starts: list[list[list[int]]], steps: int) -> Tensor:
    """Uniform numbers (N, steps) for all responses."""
    return torch.cat([_uniforms([seed], len(group), steps) for seed, group in zip(seeds, starts)])


def _uniforms(seeds: list[int], n: int, steps: int) -> Tensor:
    """(N, steps) uniform numbers in [0, 1); the stream of response j depends on its prompt's seed and j only."""
    streams = [np.random.default_rng([seed, j]) for seed in seeds for j in range(n)]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))


def _cut(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def answers(
    model: VLM,
    processor,
    images: list[str | None],
    prompts: list[str],
    *,
    n: int = 1,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    seeds: list[int] | None = None,
    finished: bool = False,
    root=None,
    progress: str = "",
) -> list[list[str]]:
    """Text in, text out: n responses to each (image, prompt).

    Args:
        processor: data.processor.Processor of the model's folder.
        images, prompts: M references, None for a question without an image, and M questions.
        seed: the sampling seed of item i is `seed + i`, in the order given; `seeds` names them one by one.
        finished: a response that was cut at `max_new_tokens` becomes "".
        progress: label of a progress bar; empty for none.
    Returns: [M][n] responses.
    Raises BadInput as `generate` does; for logits that are not finite it names the image.
    """
    result: list[list[str]] = []
    seeds = seeds if seeds is not None else [seed + i for i in range(len(images))]
    bar = tqdm(total=len(images), desc=progress, disable=None if progress else True, unit="image")
    training = model.training
    model.eval()
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        distinct = list(dict.fromkeys(images[part]))  # an image asked about twice is encoded once
        views = {ref: processor.image(ref, root) for ref in distinct}
        try:
            batch = generate(
                model,
                list(views.values()),
                [processor.prompt(text, len(views[ref].rows)) for ref, text in zip(images[part], prompts[part])],
                eos_id=processor.eos_id,
                shows=[distinct.index(ref) for ref in images[part]],
                questions=[processor.question(text) for text in prompts[part]],
                n=n,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seeds=seeds[part],
            )
        except NotFinite as error:
            raise BadInput(f"{images[start + error.prompt]}: {error.what}") from None
        result += [["" if finished and len(ids) == max_new_tokens else processor.decode(ids) for ids in group]
                   for group in batch]
        bar.update(len(batch))
    bar.close()
    model.train(training)
    return result
