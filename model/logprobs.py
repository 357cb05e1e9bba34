"""The scoring core: log p(response | image, prompt), token by token, computing nothing twice.

Every preference loss needs log-probabilities of a few responses to the same image and prompt, under the policy and
under the reference. In this order the work is saved:

  1. each distinct image goes through the vision tower once per batch           (`Llava.vision_features`)
  2. responses with the same image and prompt share one computed prefix         (`pack`, model/attention.py)
  3. examples of different length are packed, not padded                        (`Packed`)
  4. the last layer runs only where a response token is predicted               (`SharedPrefix.skip`)
  5. the language-model head runs at those positions only, in chunks; of its (tokens, vocabulary) output only one
     number a token survives                                                    (`SelectedLogProbs`)

The result equals one sequence at a time with full logits (`Llava.logits`), gradients included.

Shapes: N sequences, L longest response, M images, P patches, C vision width, T packed tokens, D width, V vocabulary,
n scored tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.attention import SharedPrefix
from model.llava import Llava

CHUNK_ELEMENTS = 2**22  # logits alive at a time: 16 MiB in fp32


class Sequence(NamedTuple):
    """One thing to score. `image` is the row of the batch's image tensor; `prompt` has the image tokens, not last."""

    image: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    competitor: bool = False  # score the model's best other token instead of the label (losses/rdpo.py)


@dataclass
class Packed:
    """Sequences laid out for one forward pass. Built on the CPU by `pack`, moved by `to`."""

    ids: Tensor  # (T,) input tokens, all bodies, then all tails
    positions: Tensor  # (T,) position of each token in its own sequence
    images: Tensor  # (groups,) row of the image tensor that each group's prefix shows
    labels: Tensor  # (n,) response tokens, sequence after sequence
    sources: Tensor  # (n,) tail row whose state predicts the label
    competitor: Tensor  # (n,) bool
    lengths: list[int]  # response length of each sequence, in the order they were given
    prefixes: list[int]  # prefix length of each group
    responses: list[list[int]]  # input lengths of the responses of each group

    def to(self, device: torch.device | str) -> "Packed":
        """Move the tensors; from pinned memory the copy does not block."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return Packed(**moved)

    def pin_memory(self) -> "Packed":
        """Called by the data loader when it pins batches for CUDA."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Packed(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in values.items()})


def pack(sequences: list[Sequence]) -> Packed:
    """Lay sequences out so that those with the same image and prompt share their prefix.

    Raises ValueError on an empty response or a prompt of fewer than two tokens.
    """
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(sequences):
        if not s.response or len(s.prompt) < 2:
            raise ValueError(f"sequence {i}: needs a response and a prompt of at least two tokens")
        groups.setdefault((s.image, s.prompt), []).append(i)

    bodies, tails, body_positions, tail_positions = [], [], [], []
    first = {}  # sequence -> (tail row that predicts its first token, tail row of its first input token)
    for (_, prompt), members in groups.items():
        bodies += prompt[:-1]
        body_positions += range(len(prompt) - 1)
        anchor = len(tails)
        tails.append(prompt[-1])
        tail_positions.append(len(prompt) - 1)
        for i in members:
            inputs = sequences[i].response[:-1]  # the last token predicts nothing
            first[i] = (anchor, len(tails))
            tails += inputs
            tail_positions += range(len(prompt), len(prompt) + len(inputs))

    labels, sources, competitor = [], [], []
    for i, s in enumerate(sequences):
        anchor, start = first[i]
        labels += s.response
        sources += [anchor, *range(start, start + len(s.response) - 1)]
        competitor += [s.competitor] * len(s.response)
    return Packed(
        ids=torch.tensor(bodies + tails),
        positions=torch.tensor(body_positions + tail_positions),
        images=torch.tensor([image for image, _ in groups]),
        labels=torch.tensor(labels),
        sources=torch.tensor(sources),
        competitor=torch.tensor(competitor),
        lengths=[len(s.response) for s in sequences],
        prefixes=[len(prompt) for _, prompt in groups],
        responses=[[len(sequences[i].response) - 1 for i in members] for members in groups.values()],
    )


class Scorer(nn.Module):
    """Llava as a function from a packed batch to log-probs; an nn.Module so that DDP can wrap it.

    Args:
        autocast: dtype of mixed-precision compute, or None. Its cache of cast weights is off, because `Reference`
            changes weights between two calls.
    """

    def __init__(self, model: Llava, autocast: torch.dtype | None = None):
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, packed: Packed, features: Tensor) -> tuple[Tensor, Tensor]:
        """Score a batch.

        Args:
            packed: from `pack`, on the model's device.
            features: (M, P, C) from `Llava.vision_features`.
        Returns: token log-probs (N, L) in fp32, zero where there is no token, and the mask (N, L) bool.
        """
        with self._precision():
            states = self.states(packed, features)  # (tail tokens, D)
            weight = self.model.language_model.lm_head.weight  # (V, D)
            flat = SelectedLogProbs.apply(states[packed.sources], weight, packed.labels, packed.competitor)  # (n,)
        rows = flat.split(packed.lengths)
        mask = [torch.ones_like(r, dtype=torch.bool) for r in rows]
        return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)

    def states(self, packed: Packed, features: Tensor) -> Tensor:
        """Final decoder states of the tail tokens (tail tokens, D)."""
        x = self.model.embed(packed.ids, features[packed.images])  # (T, D)
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
    """Softmax times its denominator, in place of the logits (c, V); the denominator (c, 1); log sum exp (c, 1)."""
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


def naive_logprobs(model: Llava, sequences: list[Sequence], pixels: Tensor) -> list[Tensor]:
    """The same by definition: one sequence at a time, full logits. For tests and benchmarks.

    Returns one tensor of token log-probs per sequence.
    """
    result = []
    for s in sequences:
        ids = torch.tensor(s.prompt + s.response, device=model.device)
        logits = model.logits(ids[:-1], pixels[s.image : s.image + 1])[len(s.prompt) - 1 :].float()  # (R, V)
        labels = torch.tensor(s.response, device=model.device)
        if s.competitor:
            labels = _best_competitor(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        result.append(F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0])
    return result
