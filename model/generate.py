"""Generation with a key-value cache: greedy, temperature, top-p; batched; n continuations share one prefix.

A prompt with its picture is computed once however many answers are drawn from it, and its keys and values are
kept once: at each step the n answers of a prompt are n queries against the same prefix, followed by each
answer's own short cache.

Random numbers are drawn per answer, not per batch: answer j of a prompt with seed s gets its own stream, so
what is sampled does not depend on what else is in the batch or on how many processes share the work.

Shapes: M prompts, n answers each, N = M n, b longest prefix body, S steps so far, H heads, K key-value heads,
d head width, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.attention import SharedPrefix
from model.llava import Llava


class Cache:
    """Keys and values of every layer: one prefix per prompt, one continuation per answer.

    It is both attention rules of generation. While the prefix is computed it records what `SharedPrefix` sees; then
    each call mixes one new token per answer over its prompt's prefix and its own continuation.
    """

    def __init__(self, lengths: list[int], n: int, steps: int, layers: int, device: torch.device):
        self.n, self.steps, self.step = n, steps, -1
        self.prefill = SharedPrefix(lengths, [[] for _ in lengths], device)
        longest = torch.arange(max(lengths), device=device)
        self.hidden = longest >= torch.tensor(lengths, device=device)[:, None]  # (M, b + 1) padding of the prefix
        self.lengths = lengths
        self.prefix: list[tuple[Tensor, Tensor]] = [()] * layers
        self.own: list[tuple[Tensor, Tensor]] = [()] * layers

    @property
    def skip(self) -> int:
        """Tokens whose last-layer state nobody needs: in the prefill all but the last of each prompt."""
        return self.prefill.skip if self.step < 0 else 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Prefill: q, k, v packed as in SharedPrefix. Decoding: q (N, H, d), k and v (N, K, d). -> like q."""
        if self.step < 0:
            self.prefix[layer] = (self._prefix_rows(k), self._prefix_rows(v))
            return self.prefill(layer, q, k, v)
        return self._decode(layer, q, k, v)

    def _prefix_rows(self, x: Tensor) -> Tensor:
        """Packed bodies and last tokens (T, K, d) -> (M, K, b + 1, d), each prefix contiguous, padding behind."""
        body, last = self.prefill.body.pad(x[: self.prefill.skip]), x[self.prefill.skip :]  # (M, b, K, d), (M, K, d)
        rows = torch.cat([body, torch.zeros_like(body[:, :1])], 1)
        rows[torch.arange(len(last)), torch.tensor(self.lengths) - 1] = last
        return rows.transpose(1, 2)

    def _decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        M, n, (N, H, d), K = len(self.lengths), self.n, q.shape, k.shape[1]
        if not self.own[layer]:
            self.own[layer] = (q.new_zeros(N, K, self.steps, d), q.new_zeros(N, K, self.steps, d))
        keys, values = self.own[layer]
        keys[:, :, self.step], values[:, :, self.step] = k, v
        keys, values = keys[:, :, : self.step + 1], values[:, :, : self.step + 1]  # (N, K, S, d)
        prefix_keys, prefix_values = self.prefix[layer]  # (M, K, b + 1, d)

        q = q.view(N, K, H // K, d) * d**-0.5
        shared = q.view(M, n, K, H // K, d).transpose(1, 2).reshape(M, K, -1, d)  # (M, K, n H/K, d)
        to_prefix = (shared @ prefix_keys.transpose(2, 3)).float()  # (M, K, n H/K, b + 1)
        to_prefix = to_prefix.masked_fill(self.hidden[:, None, None], float("-inf"))
        to_prefix = to_prefix.view(M, K, n, H // K, -1).transpose(1, 2).reshape(N, K, H // K, -1)
        to_own = (q @ keys.transpose(2, 3)).float()  # (N, K, H/K, S)

        weights = torch.cat([to_prefix, to_own], -1).softmax(-1).to(v.dtype)
        on_prefix, on_own = weights.split([to_prefix.shape[-1], to_own.shape[-1]], -1)
        on_prefix = on_prefix.view(M, n, K, H // K, -1).transpose(1, 2).reshape(M, K, n * (H // K), -1)
        y = (on_prefix @ prefix_values).view(M, K, n, H // K, d).transpose(1, 2).reshape(N, K, H // K, d)
        return (y + on_own @ values).reshape(N, H, d)

    def keep(self, prompts: Tensor) -> None:
        """Go on with these prompts only (M',) and forget the others."""
        answers = (prompts[:, None] * self.n + torch.arange(self.n, device=prompts.device)).flatten()
        self.lengths = [self.lengths[i] for i in prompts.tolist()]
        self.hidden = self.hidden[prompts]
        self.prefix = [(k[prompts], v[prompts]) for k, v in self.prefix]
        self.own = [(k[answers], v[answers]) for k, v in self.own]


@torch.no_grad()
def generate(
    model: Llava,
    pixels: Tensor,
    prompts: list[list[int]],
    *,
    eos_id: int,
    shows: list[int] | None = None,
    n: int = 1,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: list[int] | None = None,
) -> list[list[list[int]]]:
    """Continue each prompt n times.

    Args:
        pixels: (I, 3, S, S) distinct pictures.
        prompts: M lists of token ids with expanded image tokens.
        shows: for each prompt the row of its picture; left out, prompt i shows picture i.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches top_p.
        seeds: one (>= 0) per prompt; needed when temperature > 0.
    Returns: [M][n] lists of new token ids, without EOS.
    Raises ValueError on missing seeds, a temperature or top_p out of range, or a prompt of fewer than two tokens.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} and top_p {top_p}: need temperature >= 0 and 0 < top_p <= 1")
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("sampling needs one seed per prompt")
    if min(len(p) for p in prompts) < 2:
        raise ValueError("a prompt needs at least two tokens")
    device = model.device
    lengths = [len(p) for p in prompts]
    decoder, head = model.language_model.model, model.language_model.lm_head
    cache = Cache(lengths, n, max_new_tokens, len(decoder.layers), device)
    noise = _uniforms(seeds, n, max_new_tokens).to(device) if temperature > 0 else None  # (N, steps)

    ids = torch.tensor([t for p in prompts for t in p[:-1]] + [p[-1] for p in prompts], device=device)
    positions = torch.cat([torch.arange(x - 1) for x in lengths] + [torch.tensor(lengths) - 1]).to(device)
    features = model.vision_features(pixels.to(device))
    features = features[shows] if shows is not None else features  # (M, P, C)
    states = decoder(model.embed(ids, features), positions, cache)  # (M, D)
    states = states.repeat_interleave(n, 0)  # (N, D): all answers start from the prompt's last state

    tokens = torch.full((len(prompts) * n, max_new_tokens), eos_id, device=device)  # (N, steps)
    alive = torch.arange(len(prompts), device=device)  # prompts with an unfinished answer
    finished = torch.zeros(len(prompts) * n, dtype=torch.bool, device=device)
    rows = torch.arange(len(prompts) * n, device=device)  # answers of the alive prompts
    position = torch.tensor(lengths, device=device).repeat_interleave(n)
    for step in range(max_new_tokens):
        u = noise[rows, step] if noise is not None else None
        new = pick(head(states).float(), temperature, top_p, u)  # (N,)
        new = new.masked_fill(finished, eos_id)
        tokens[rows, step] = new
        finished = finished | (new == eos_id)
        if step + 1 == max_new_tokens:
            break
        if step % 8 == 7:  # asking costs a device synchronisation, so not at every step
            if finished.all():
                break
            going = (~finished.view(-1, n).all(1)).nonzero()[:, 0]
            if len(going) <= 0.75 * len(alive):
                cache.keep(going)
                picked = (going[:, None] * n + torch.arange(n, device=device)).flatten()
                alive, rows, new, finished = alive[going], rows[picked], new[picked], finished[picked]
                position = position[picked]
        cache.step = step
        states = decoder(decoder.embed_tokens(new), position + step, cache)  # (N, D)
    return _cut(tokens.tolist(), n, eos_id)


def pick(logits: Tensor, temperature: float, top_p: float, u: Tensor | None) -> Tensor:
    """Next token of each row: the best one, or by inverse transform sampling with uniform u (N,). (N, V) -> (N,)"""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True, dim=-1, stable=True)  # (N, V)
    total = probs.cumsum(-1)
    inside = total - probs < top_p  # the best token always is
    kept = total.masked_fill(~inside, 0).amax(-1, keepdim=True)
    rank = (total < u[:, None] * kept).sum(-1, keepdim=True)
    return order.gather(1, rank.clamp_max(logits.shape[-1] - 1))[:, 0]


def _uniforms(seeds: list[int], n: int, steps: int) -> Tensor:
    """(N, steps) uniform numbers in [0, 1); the stream of answer j depends on its prompt's seed and j only."""
    streams = [np.random.default_rng([seed, j]) for seed in seeds for j in range(n)]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))


def _cut(tokens: list[list[int]], n: int, eos_id: int) -> list[list[list[int]]]:
    answers = [row[: row.index(eos_id)] if eos_id in row else row for row in tokens]
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def answers(
    model: Llava,
    processor,
    images: list[str],
    prompts: list[str],
    *,
    n: int = 1,
    batch_size: int = 64,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    root=None,
    progress: str = "",
) -> list[list[str]]:
    """Text in, text out: n answers to each (image, prompt).

    Args:
        processor: data.processor.Processor of the model's folder.
        images, prompts: M references and M questions.
        seed: the sampling seed of item i is `seed + i`, in the order given.
        progress: label of a progress bar; empty for none.
    Returns: [M][n] answers.
    """
    result: list[list[str]] = []
    bar = tqdm(total=len(images), desc=progress, disable=None if progress else True, unit="image")
    training = model.training
    model.eval()
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        distinct = list(dict.fromkeys(images[part]))  # a picture asked about twice is encoded once
        batch = generate(
            model,
            torch.stack([processor.image(ref, root) for ref in distinct]),
            [processor.prompt(text) for text in prompts[part]],
            eos_id=processor.eos_id,
            shows=[distinct.index(ref) for ref in images[part]],
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seeds=[seed + i for i in range(len(images))[part]],
        )
        result += [[processor.decode(ids) for ids in group] for group in batch]
        bar.update(len(batch))
    bar.close()
    model.train(training)
    return result
