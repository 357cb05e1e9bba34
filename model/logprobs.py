"""The scoring core: log p(response | image, prompt), token by token, computing nothing twice.

Every preference loss needs log-probabilities of a few responses to the same image and prompt, under the
policy and under the reference. In this order the work is saved:

  1. each distinct image goes through the vision tower once per batch           (`Llava.vision_features`)
  2. responses with the same image and prompt share one computed prefix         (`pack`, model/attention.py)
  3. examples of different length are packed, not padded                        (`Packed`)
  4. the last layer runs only where a response token is predicted               (`SharedPrefix.skip`)
  5. the language-model head runs at those positions only, in chunks; of its
     (tokens, vocabulary) output only one number a token survives               (`SelectedLogProbs`)

The result equals one sequence at a time with full logits (`Llava.logits`), gradients included.

Shapes: N sequences, L longest response, tiles of pictures, P patches, C vision width, T packed tokens, I image
tokens among them, D width, V vocabulary, n scored tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import BadInput
from data.images import View
from model.attention import SharedPrefix
from model.llava import Llava

CHUNK_ELEMENTS = 2**22  # logits alive at a time: 16 MiB in fp32


class Sequence(NamedTuple):
    """One thing to score. `image` is the number of the picture in the batch; `prompt` has its image tokens."""

    image: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    competitor: bool = False  # score the model's best other token instead of the label (losses/rdpo.py)


@dataclass
class Packed:
    """Sequences laid out for one forward pass. Built on the CPU by `pack`, moved by `to`."""

    ids: Tensor  # (T,) input tokens, all bodies, then all tails
    positions: Tensor  # (T,) position of each token in its own sequence
    slots: Tensor  # (I,) where the image tokens are in ids
    rows: Tensor  # (I,) the patch feature that stands at each of them, see Llava.embed
    labels: Tensor  # (n,) response tokens, sequence after sequence
    sources: Tensor  # (n,) tail row whose state predicts the label
    competitor: Tensor  # (n,) bool
    lengths: list[int]  # response length of each sequence, in the order they were given
    prefixes: list[int]  # prefix length of each group
    responses: list[list[int]]  # input lengths of the distinct responses of each group

    def to(self, device: torch.device | str) -> Packed:
        """Move the tensors; from pinned memory the copy does not block."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Packed(**moved)

    def pin_memory(self) -> Packed:
        """Called by the data loader when it pins batches for CUDA."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Packed(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(sequences: list[Sequence], rows: list[Tensor], image_id: int) -> Packed:
    """Lay sequences out so that those with the same image and prompt share their prefix.

    Args:
        rows: for each picture, which patch features its image tokens stand for (`data.images.stack`).
        image_id: id of the image token.
    Raises BadInput on an empty response, a prompt of fewer than two tokens, or image tokens that are not as
    many as the rows of the picture.
    """
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(sequences):
        if not s.response or len(s.prompt) < 2:
            raise ValueError(f"sequence {i}: needs a response and a prompt of at least two tokens")
        if s.prompt.count(image_id) != len(rows[s.image]) or image_id in s.response:
            raise ValueError(f"sequence {i}: {s.prompt.count(image_id)} image tokens in the prompt and "
                             f"{s.response.count(image_id)} in the response, picture {s.image} needs "
                             f"{len(rows[s.image])} in the prompt")
        groups.setdefault((s.image, s.prompt), []).append(i)

    bodies, tails, body_positions, tail_positions, slots = [], [], [], [], []
    skip = sum(len(prompt) - 1 for _, prompt in groups)
    first = {}  # sequence -> (tail row that predicts its first token, tail row of its first input token)
    responses = []
    for (_, prompt), members in groups.items():
        anchor, begins = len(tails), {}  # begins: response -> where it stands; a repeated one is computed once
        places = [*range(len(bodies), len(bodies) + len(prompt) - 1), skip + anchor]
        slots += [place for place, token in zip(places, prompt) if token == image_id]
        bodies += prompt[:-1]
        body_positions += range(len(prompt) - 1)
        tails.append(prompt[-1])
        tail_positions.append(len(prompt) - 1)
        for i in members:
            inputs = sequences[i].response[:-1]  # the last token predicts nothing
            if inputs not in begins:
                begins[inputs] = len(tails)
                tails += inputs
                tail_positions += range(len(prompt), len(prompt) + len(inputs))
            first[i] = (anchor, begins[inputs])
        responses.append([len(inputs) for inputs in begins])

    labels, sources, competitor = [], [], []
    for i, s in enumerate(sequences):
        anchor, start = first[i]
        labels += s.response
        sources += [anchor, *range(start, start + len(s.response) - 1)]
        competitor += [s.competitor] * len(s.response)
    return Packed(
        ids=torch.tensor(bodies + tails),
        positions=torch.tensor(body_positions + tail_positions),
        slots=torch.tensor(slots, dtype=torch.long),
        rows=torch.cat([rows[image] for image, _ in groups]),
        labels=torch.tensor(labels),
        sources=torch.tensor(sources),
        competitor=torch.tensor(competitor),
        lengths=[len(s.response) for s in sequences],
        prefixes=[len(prompt) for _, prompt in groups],
        responses=responses,
    )


class Scorer(nn.Module):
    """Llava as a function from a packed batch to log-probs; an nn.Module so that DDP can wrap it.

    Args:
        autocast: dtype of mixed-precision compute, or None. Its cache of cast weights is off, because `Reference`
            changes weights between two calls.
        critic: give a value, too, for the state before each token (losses/ppo.py): a linear layer, 0 at first.
    """

    def __init__(self, model: Llava, autocast: torch.dtype | None = None, critic: bool = False):
        super().__init__()
        self.model, self.autocast = model, autocast
        self.value_head = nn.Linear(model.config.text.hidden_size, 1).to(model.device) if critic else None
        if critic:
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(self, packed: Packed, features: Tensor) -> tuple[Tensor, ...]:
        """Score a batch.

        Args:
            packed: from `pack`, on the model's device.
            features: (tiles, P, C) from `Llava.vision_features`.
        Returns: token log-probs (N, L) in fp32, zero where there is no token, the mask (N, L) bool and, from a
            critic, the values (N, L).
        """
        with self._precision():
            states = self.states(packed, features)  # (tail tokens, D)
            weight = self.model.language_model.lm_head.weight  # (V, D)
            flat = SelectedLogProbs.apply(
                states[packed.sources], weight, packed.labels, packed.competitor)  # (n,)
        rows = flat.split(packed.lengths)
        mask = [torch.ones_like(r, dtype=torch.bool) for r in rows]
        result = [pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)]
        if self.value_head is not None:
            values = self.value_head(states[packed.sources].float())[:, 0]  # (n,)
            result.append(pad_sequence(values.split(packed.lengths), batch_first=True))
        return tuple(result)

    @torch.no_grad()
    def likeliest(self, packed: Packed, features: Tensor) -> Tensor:
        """The most likely token in the place of every label (n,)."""
        with self._precision():
            states = self.states(packed, features)[packed.sources]  # (n, D)
            head = self.model.language_model.lm_head
            return torch.cat([head(states[part]).argmax(-1) for part in _chunks(len(states), len(head.weight))])

    def states(self, packed: Packed, features: Tensor) -> Tensor:
        """Final decoder states of the tail tokens (tail tokens, D)."""
        limit = self.model.config.text.max_position_embeddings
        longest = max(p + max(r) for p, r in zip(packed.prefixes, packed.responses))
        if longest > limit:
            raise BadInput(f"a sequence of {longest} tokens, the decoder takes {limit}")
        x = self.model.embed(packed.ids, features, packed.rows, packed.slots)  # (T, D)
        rule = SharedPrefix(packed.prefixes, packed.responses, x.device)
        return self.model.language_model.model(x, packed.positions, rule)

    def _precision(self):
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.model.device.type, self.autocast, cache_enabled=False)


class SelectedLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[label] for each token, in chunks that never keep a (tokens, V) tensor.

    The gradient with respect to h is (onehot - softmax) W times the incoming scalar, so it is formed in the same
    pass as the value: with a frozen head, two matrix products in all, none repeated. Only when the head itself
    trains does the backward recompute its chunks.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, competitor: Tensor) -> Tensor:
        """hidden (n, D), weight (V, D), labels (n,), competitor (n,) bool -> (n,) fp32."""
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, matrix = hidden.to(dtype), weight.detach().to(dtype)
        else:
            matrix = weight.detach()
        hidden = hidden.to(matrix.dtype)
        labels = labels.clone()
        logps = torch.empty(len(hidden), device=hidden.device)  # (n,)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        any_competitor = bool(competitor.any())
        for part in _chunks(len(hidden), len(matrix)):
            logits = (hidden[part] @ matrix.T).float()  # (c, V)
            if any_competitor:
                labels[part] = _best_competitor(logits, labels[part], competitor[part])
            picked = logits.gather(1, labels[part, None])  # (c, 1)
            odds, total, log_total = _softmax(logits)
            logps[part] = (picked - log_total)[:, 0]
            if grad_hidden is not None:
                error = _error(odds, total, labels[part])  # (c, V)
                grad_hidden[part] = (error.to(matrix.dtype) @ matrix) / -total
        ctx.weight_dtype = weight.dtype
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(grad_hidden, hidden, matrix, labels)
        else:
            ctx.save_for_backward(grad_hidden)
        return logps

    @staticmethod
    def backward(ctx, grad: Tensor):
        """grad (n,) -> gradients of hidden (n, D) and, if the head trains, of weight (V, D)."""
        grad_hidden, *rest = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad[:, None].to(grad_hidden.dtype) * grad_hidden
        grad_weight = _head_gradient(grad, *rest).to(ctx.weight_dtype) if rest else None
        return grad_hidden, grad_weight, None, None


def _head_gradient(grad: Tensor, hidden: Tensor, matrix: Tensor, labels: Tensor) -> Tensor:
    """d(sum grad * logp) / dW = (grad * (onehot - softmax))^T h, chunk by chunk, summed in fp32."""
    result = torch.zeros(matrix.shape, device=matrix.device)  # (V, D)
    for part in _chunks(len(hidden), len(matrix)):
        logits = (hidden[part] @ matrix.T).float()  # (c, V)
        odds, total, _ = _softmax(logits)
        error = _error(odds, total, labels[part]).mul_(grad[part, None] / -total)
        result += (error.to(matrix.dtype).T @ hidden[part]).float()
    return result


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax times its denominator, in place of the logits (c, V); denominator (c, 1); log sum exp (c, 1)."""
    top = logits.amax(1, keepdim=True)
    odds = logits.sub_(top).exp_()
    total = odds.sum(1, keepdim=True)
    return odds, total, top + total.log()


def _error(odds: Tensor, total: Tensor, labels: Tensor) -> Tensor:
    """d logp / d logits = onehot - softmax, times -total, in place of the odds. (c, V)

    Subtracted in fp32: where the model is sure, what is left is far below a bf16 rounding of the softmax.
    """
    return odds.scatter_add_(1, labels[:, None], -total)


def _best_competitor(logits: Tensor, labels: Tensor, competitor: Tensor) -> Tensor:
    """Where `competitor`, the most likely token other than the label; elsewhere the label. (c,)"""
    others = logits.scatter(1, labels[:, None], float("-inf")).argmax(1)
    return torch.where(competitor, others, labels)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, i + step) for i in range(0, tokens, step)]


def naive_logprobs(model: Llava, sequences: list[Sequence], views: list[View]) -> list[Tensor]:
    """The same by definition: one sequence at a time, full logits. For tests and benchmarks.

    Returns one tensor of token log-probs per sequence; `Sequence.image` is the number of its view.
    """
    result = []
    for s in sequences:
        ids = torch.tensor(s.prompt + s.response, device=model.device)
        pixels, rows = (t.to(model.device) for t in views[s.image])
        logits = model.logits(ids[:-1], pixels, rows)[len(s.prompt) - 1 :].float()  # (R, V)
        labels = torch.tensor(s.response, device=model.device)
        if s.competitor:
            labels = _best_competitor(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        result.append(F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0])
    return result
