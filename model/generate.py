"""Generation with a key-value cache: greedy, temperature, top-p; batched; n continuations share one prefix.

A prompt with its image is computed once however many responses are drawn from it, and its keys and values are
kept once (model/cache.py): at each step the n responses to a prompt are n queries of the same prefix, followed by each
response's own tokens. Responses may begin with given tokens, different ones for each. `generate` does it all; who
continues the same prompts several times computes them once, with `read`, and calls `write` each time.

Random numbers are drawn per response, not per batch: response j to a prompt with seed s gets its own stream, so
what is sampled does not depend on what else is in the batch or on how many processes share the work.

Shapes: M prompts, n responses to each (or at most), N responses in all, N' of them in the cache, D decoder width, V
vocabulary, T tokens, P patches and C width of the vision tower.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import BadInput
from model.cache import Cache, Prompts, Recorder
from model.lora import adapters_cast
from model.packing import lay_out
from model.views import View, rows_of, stack
from model.vlm import VLM

Stop = Callable[[int, int, list[int]], bool]
CANDIDATES = 64  # tokens that a draw is first looked for among, on a CPU
ROUNDING = 1e-5  # more than float sums of probabilities are off
# cuDNN's attention, torch's first choice on some GPUs, is planned for each shape, and here every token has a new one.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class NotFinite(BadInput):
    """Logits that are NaN or infinite; `prompt` is the number of the prompt they are for."""

    what = "the model's logits are NaN or infinite"

    def __init__(self, prompt: int):
        super().__init__(f"prompt {prompt}: {self.what}")
        self.prompt = prompt


@torch.no_grad()
def generate(model: VLM, views: list[View], prompts: list[list[int]], *, eos_id: int,
             shows: Sequence[int | tuple[int, ...]] | None = None, questions: list[tuple[int, ...]] | None = None,
             n: int = 1, starts: list[list[list[int]]] | None = None, hidden: list[Tensor] | None = None,
             stop: Stop | None = None, max_new_tokens: int = 96, temperature: float = 0.0, top_p: float = 1.0,
             seeds: list[int] | None = None) -> list[list[list[int]]]:
    """Continue each prompt n times: `read`, then `write`, whose arguments these are.

    Args:
        n: responses to each prompt, where no `starts` are given.
    Returns: [M][n] lists of new token ids, without EOS. One of max_new_tokens has been cut off.
    Raises BadInput on a temperature or top_p out of range or a window that is too short; NotFinite, which is one,
    when logits are NaN or infinite; ValueError on missing seeds, a prompt of fewer than two tokens, one whose image
    tokens are not those of its image, beginnings or hidden flags that do not fit.
    """
    starts = [[[]] * n for _ in prompts] if starts is None else starts
    lengths = [len(prompt) for prompt in prompts]
    settings = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seeds=seeds)
    _check(model, lengths, starts, **settings)
    read_ones = read(model, views, prompts, shows=shows, questions=questions, hidden=hidden,
                     room=_room(starts, max_new_tokens))
    return write(model, read_ones, starts, eos_id=eos_id, stop=stop, **settings)


@torch.no_grad()
def read(model: VLM, views: list[View], prompts: list[list[int]], *,
         shows: Sequence[int | tuple[int, ...]] | None = None, questions: list[tuple[int, ...]] | None = None,
         hidden: list[Tensor] | None = None, room: int = 0) -> Prompts:
    """Compute prompts.

    Args:
        views: distinct images.
        prompts: M lists of token ids with as many image tokens as their images have rows.
        shows: for each prompt the number of its image, or those of several; left out, prompt i shows image i.
        questions: for each prompt what `VLM.connect` reads of it (`Processor.question`); left out, nothing.
        hidden: for each prompt (len(prompt),) bool, True at tokens that must not be looked at (model/attention.py).
        room: tokens to make room for after each prompt; `write` copies what has too little.
    Raises ValueError as `generate` does.
    """
    device, decoder = model.device, model.language_model.model
    pixels, rows = stack(views, model.config.tile_tokens)
    layout = lay_out(prompts, [[] for _ in prompts], [rows_of(image, rows) for image in shows or range(len(prompts))],
                     questions or [()] * len(prompts), model.config.image_token_index)
    lengths = [len(prompt) for prompt in prompts]
    recorder = Recorder(lengths, room, device, hidden)
    with _writing(model):
        features = model.vision_features(pixels.to(device))  # (tiles, P, C)
        ids, positions, slots, shown = (x.to(device) for x in layout[:4])
        x = model.embed(ids, features, shown, slots, layout.questions)  # (T, D)
        states = decoder(x, positions, recorder)  # (M, D)
    return Prompts(lengths, recorder.blocked, states, recorder.layers)


@torch.no_grad()
def write(model: VLM, prompts: Prompts, starts: list[list[list[int]]], *, eos_id: int, rows: list[int] | None = None,
          stop: Stop | None = None, max_new_tokens: int = 96, temperature: float = 0.0, top_p: float = 1.0,
          seeds: list[int] | None = None) -> list[list[list[int]]]:
    """Continue prompts that have been read.

    Args:
        rows: the M of them to continue, in order; left out, all.
        starts: for each prompt the beginnings of its responses, each a list of token ids (or none). All of a prompt
            share it, whatever they begin with.
        stop: (prompt, response, new tokens so far) -> whether this response needs no more; asked every 8 steps, so
            it may come back longer than needed.
        max_new_tokens: at most so many are added to each beginning.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of tokens whose probability reaches top_p.
        seeds: one (>= 0) per prompt; needed when temperature > 0.
    Returns and raises as `generate` does.
    """
    rows = list(range(len(prompts.lengths))) if rows is None else rows
    _check(model, [prompts.lengths[row] for row in rows], starts, max_new_tokens, temperature, top_p, seeds)
    device, config = model.device, model.config.text
    names = [(i, j) for i, group in enumerate(starts) for j in range(len(group))]  # (N,)
    noise = _noise(seeds, starts, max_new_tokens).to(device) if temperature > 0 else None  # (N, steps)

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        return pick(logits, temperature, top_p, noise if noise is None else noise[rows, step])

    prompts = prompts.take(rows, _room(starts, max_new_tokens))
    cache = Cache(prompts, [[len(ids) for ids in group] for group in starts],
                  config.num_attention_heads // config.num_key_value_heads)
    with _writing(model):
        states, positions = _begin(model, prompts, starts, cache)
        tokens = _continue(model, cache, states, positions, names, choose, stop, eos_id, max_new_tokens)
    responses = iter(_cut(row, eos_id) for row in tokens.tolist())
    return [[next(responses) for _ in group] for group in starts]


@contextmanager
def _writing(model: VLM) -> Iterator[None]:
    """Inside, the model is as it writes: without dropout, its adapters in the dtype of its weights."""
    training = model.training
    with adapters_cast(model), sdpa_kernel(KERNELS):
        try:
            yield model.eval()
        finally:
            model.train(training)


def _check(model: VLM, lengths: list[int], starts: list[list[list[int]]], max_new_tokens: int,
           temperature: float, top_p: float, seeds: list[int] | None) -> None:
    """Refuse what cannot be generated, as the docstring of `generate` lists it; `lengths` of the prompts."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise BadInput(f"temperature {temperature} and top_p {top_p}: need temperature >= 0 and 0 < top_p <= 1")
    if temperature > 0 and (seeds is None or len(seeds) != len(lengths)):
        raise ValueError("sampling needs one seed per prompt")
    if len(starts) != len(lengths) or not all(starts):
        raise ValueError("each prompt needs at least one beginning of a response, be it empty")
    longest = max(n + max(map(len, group)) for n, group in zip(lengths, starts)) + max_new_tokens
    if longest > model.config.text.max_position_embeddings:
        raise BadInput(f"prompt and answer may reach {longest} tokens, the decoder takes "
                       f"{model.config.text.max_position_embeddings}")


def _room(starts: list[list[list[int]]], steps: int) -> int:
    """Tokens to make room for after each prompt: of as many responses as any has, as long as any may become."""
    return max(map(len, starts)) * (max(len(ids) for group in starts for ids in group) + steps)


def _begin(model: VLM, prompts: Prompts, starts: list[list[list[int]]], cache: Cache) -> tuple[Tensor, Tensor]:
    """Compute the beginnings: the states (N, D) that predict each response's first new token, and its position (N,)."""
    device, decoder = model.device, model.language_model.model
    flat = [(i, ids) for i, group in enumerate(starts) for ids in group]  # (N,)
    states, ends, total = prompts.states, [], len(starts)
    for i, ids in flat:
        total += len(ids)
        ends.append(total - 1 if ids else i)  # row of `states` below
    if total > len(starts):
        ids = torch.tensor([token for _, ids in flat for token in ids], device=device)  # (T,)
        positions = torch.tensor([prompts.lengths[i] + t for i, ids in flat for t in range(len(ids))], device=device)
        states = torch.cat([states, decoder(decoder.embed_tokens(ids), positions, cache)])  # (M + T, D)
    first = torch.tensor([prompts.lengths[i] + len(ids) for i, ids in flat], device=device)
    return states[torch.tensor(ends, device=device)], first


def _continue(model: VLM, cache: Cache, states: Tensor, positions: Tensor, names: list[tuple[int, int]],
              choose: Callable[[Tensor, Tensor, int], Tensor], stop: Stop | None, eos_id: int, steps: int) -> Tensor:
    """Write token after token, (N, steps), EOS after each response's last."""
    device, decoder = model.device, model.language_model.model
    tokens = torch.full((len(names), steps), eos_id, device=device)
    finished = torch.zeros(len(names), dtype=torch.bool, device=device)
    broken = finished.clone()
    rows = torch.arange(len(names), device=device)  # (N',) responses in the cache: unfinished, and a few finished
    for step in range(steps):
        logits, finite = _predict(model, states)  # (N', V), (N',)
        broken[rows] |= ~finite  # asked about below, where the device is waited for anyway
        new = choose(logits, rows, step).masked_fill(finished[rows], eos_id)  # (N',)
        tokens[rows, step] = new
        finished[rows] |= new == eos_id
        if step + 1 == steps:
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
        cache.step()
        states = decoder(decoder.embed_tokens(new), positions[rows] + step, cache)  # (N', D)
    _refuse_broken(broken, names)
    return tokens


def _predict(model: VLM, states: Tensor) -> tuple[Tensor, Tensor]:
    """states (N', D) -> logits of the next tokens (N', V), never the image token, and which are finite (N',)."""
    head = model.language_model.lm_head
    if states.device.type == "cpu" and states.dtype == torch.float32 and len(states) > 4:
        logits = (head.weight @ states.T).T  # a third faster than x W^T with 8 rows, as fast with many
    else:
        logits = head(states).float()
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
    """Next token of each row, (N, V) -> (N,): the best, or by inverse transform sampling with uniform u (N,).

    Tokens are drawn in order of their probability. Sorting all of them takes a CPU as long as the rest of a step, so
    there the best candidates are tried first; the token is the same.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)  # (N, V)
    if logits.is_cuda or logits.shape[-1] <= CANDIDATES:
        return _draw(*probs.sort(descending=True, dim=-1, stable=True), top_p, u)
    new, certain = _draw_of_best(probs, top_p, u)
    if not certain.all():
        rest = (~certain).nonzero()[:, 0]
        new[rest] = _draw(*probs[rest].sort(descending=True, dim=-1, stable=True), top_p, u[rest])
    return new


def _draw(probs: Tensor, order: Tensor, top_p: float, u: Tensor) -> Tensor:
    """Sorted probabilities and their tokens (N, V) -> (N,)."""
    total = probs.cumsum(-1)
    inside = total - probs < top_p  # the best token always is
    kept = total.masked_fill(~inside, 0).amax(-1, keepdim=True)
    rank = (total < u[:, None] * kept).sum(-1, keepdim=True)  # u of what is kept: its probabilities renormalised
    return order.gather(1, rank.clamp_max(probs.shape[-1] - 1))[:, 0]


def _draw_of_best(probs: Tensor, top_p: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, V) -> what `_draw` gives of them, sorted, (N,), and where that is certain, (N,)."""
    best = probs.topk(CANDIDATES, -1, sorted=False).indices.sort(-1).values  # tokens of equal probability in order
    probs, order = probs.gather(-1, best).sort(descending=True, dim=-1, stable=True)
    total = probs.cumsum(-1)
    kept = total.masked_fill(total - probs >= top_p, 0).amax(-1, keepdim=True)
    known = total[:, -1] > top_p + ROUNDING  # all that top_p keeps is here
    if top_p == 1:
        kept, known = torch.ones_like(kept), torch.ones_like(known)
    low, high = ((total < u[:, None] * kept * (1 + sign * ROUNDING)).sum(-1, keepdim=True) for sign in (-1, 1))
    rank = low.clamp_max(CANDIDATES - 1)
    # Of tokens as probable as the last candidate others may be missing here.
    certain = known & ((low == high) & (probs.gather(-1, rank) > probs[:, -1:]))[:, 0]
    return best.gather(-1, order.gather(-1, rank))[:, 0], certain


def _noise(seeds: list[int], starts: list[list[list[int]]], steps: int) -> Tensor:
    """Uniform numbers (N, steps) for all responses."""
    return torch.cat([_uniforms([seed], len(group), steps) for seed, group in zip(seeds, starts)])


def _uniforms(seeds: list[int], n: int, steps: int) -> Tensor:
    """(N, steps) uniform numbers in [0, 1); the stream of response j depends on its prompt's seed and j only."""
    streams = [np.random.default_rng([seed, j]) for seed in seeds for j in range(n)]
    return torch.from_numpy(np.stack([stream.random(steps, dtype=np.float32) for stream in streams]))


def _cut(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


def answers(model: VLM, processor, images: list[str | list[str] | None], prompts: list[str], *, n: int = 1,
            batch_size: int = 64, max_new_tokens: int = 96, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
            seeds: list[int] | None = None, finished: bool = False, root=None, progress: str = "") -> list[list[str]]:
    """Text in, text out: n responses to each (image, prompt).

    Args:
        processor: data.processor.Processor of the model's folder.
        images, prompts: M references, or lists of several, None for a question without an image; and M questions.
        seed: the sampling seed of item i is `seed + i`, in the order given; `seeds` names them one by one.
        finished: a response that was cut at `max_new_tokens` becomes "".
        progress: label of a progress bar; empty for none.
    Returns: [M][n] responses.
    Raises BadInput as `generate` does; for logits that are not finite it names the image.
    """
    result: list[list[str]] = []
    seeds = seeds if seeds is not None else [seed + i for i in range(len(images))]
    bar = tqdm(total=len(images), desc=progress, disable=None if progress else True, unit="image")
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        asked = processor.questions(images[part], prompts[part], root)  # an image asked about twice is encoded once
        try:
            batch = generate(model, **asked, eos_id=processor.eos_id, n=n, max_new_tokens=max_new_tokens,
                             temperature=temperature, top_p=top_p, seeds=seeds[part])
        except NotFinite as error:
            raise BadInput(f"{images[start + error.prompt]}: {error.what}") from None
        result += [["" if finished and len(ids) == max_new_tokens else processor.decode(ids) for ids in group]
                   for group in batch]
        bar.update(len(batch))
    bar.close()
    return result
