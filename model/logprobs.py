"""The scoring core: log p(response | image, prompt), token by token, computing nothing twice.

Every preference loss needs log-probabilities of a few responses to the same image and prompt, under the
policy and under the reference. In this order the work is saved:

  1. each distinct image goes through the vision tower once per batch           (`VLM.seen`)
  2. responses with the same image and prompt share one computed prefix         (`pack`, model/packing.py)
  3. examples of different length are packed, not padded                        (`Packed`)
  4. the last layer runs only where a response token is predicted               (`SharedPrefix.skip`)
  5. the language-model head runs at those positions only, in chunks; of its
     (tokens, vocabulary) output only one number a token survives               (`SelectedLogProbs`)

The result equals one sequence at a time with full logits (`VLM.logits`), gradients included.

Shapes: N sequences, L longest response, tiles of images, P patches, C vision width, T packed tokens, I image
tokens among them, D width, V vocabulary, n scored tokens.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from common import BadInput
from model.attention import SharedPrefix
from model.ops import compute_dtype
from model.packing import Movable, lay_out
from model.views import View, rows_of, stack
from model.vlm import VLM

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # logits alive at a time: 16 and 256 MiB in fp32


class Sequence(NamedTuple):
    """One thing to score. `image` is the number of the image in the batch, or of several; `prompt` has image tokens."""

    image: int | tuple[int, ...]
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    competitor: bool = False  # score the model's best other token instead of the label (losses/rdpo.py)
    question: tuple[int, ...] = ()  # of `Processor.question`; the same for the same prompt


@dataclass
class Packed(Movable):
    """Sequences laid out for one forward pass. Built on the CPU by `pack`, moved by `to`."""

    ids: Tensor  # (T,) input tokens, all bodies, then all tails (model/packing.py)
    positions: Tensor  # (T,) position of each token in its own sequence
    slots: Tensor  # (I,) where the image tokens are in ids
    rows: Tensor  # (I,) what each of them stands for, see VLM.embed
    labels: Tensor  # (n,) response tokens, sequence after sequence
    sources: Tensor  # (n,) tail row whose state predicts the label
    competitor: Tensor | None  # (n,) bool; None where no competitor is scored
    lengths: list[int]  # response length of each sequence, in the order they were given
    prefixes: list[int]  # prefix length of each group
    responses: list[list[int]]  # input lengths of the distinct responses of each group
    attend: SharedPrefix  # who sees whom, the same for policy and reference
    questions: list[tuple[int, ...]] = field(default_factory=list)  # of each group with image tokens


def pack(sequences: list[Sequence], rows: list[Tensor], image_id: int) -> Packed:
    """Lay sequences out so that those with the same image and prompt share their prefix.

        sequences      image  prompt  response                 group 0: prompt p
        0 chosen         0      p     a b c </s>                   inputs  a b c, a d
        1 rejected       0      p     a d </s>                 group 1: prompt p, another image
        2 other image    1      p     a b c </s>                   inputs  a b c

        tails                           p  a  b  c  a  d     p  a  b  c
        predicts of sequence 0          a  b  c  </s>
                    sequence 1          a           d  </s>
                    sequence 2                               a  b  c  </s>

    A response goes in without its last token, which predicts nothing; the token before its first one is the last of
    the prompt (p), which all responses of a group share. So `sources` of sequence 1 above are the tail rows 0, 4, 5.

    Args:
        rows: for each image what its image tokens stand for (`model.views.stack`).
        image_id: id of the image token.
    Raises ValueError on an empty response, one with image tokens, or as from `lay_out`.
    """
    groups: dict[tuple, list[int]] = {}
    for i, s in enumerate(sequences):
        if not s.response or image_id in s.response:
            raise ValueError(f"sequence {i}: the response is empty or holds image tokens")
        groups.setdefault((s.image, s.prompt), []).append(i)

    # What goes in, once for each distinct response: two that differ in the last token only are the same input.
    inputs = [list(dict.fromkeys(sequences[i].response[:-1] for i in members)) for members in groups.values()]
    questions = [sequences[members[0]].question for members in groups.values()]
    shown = [rows_of(image, rows) for image, _ in groups]
    layout = lay_out([prompt for _, prompt in groups], inputs, shown, questions, image_id)
    where = {i: (layout.anchors[g], layout.begins[g][inputs[g].index(sequences[i].response[:-1])])
             for g, members in enumerate(groups.values()) for i in members}

    labels, sources, competitor = [], [], []
    for i, s in enumerate(sequences):  # in the order they were given, which is not that of the groups
        anchor, begin = where[i]
        labels += s.response
        sources += [anchor, *range(begin, begin + len(s.response) - 1)]
        competitor += [s.competitor] * len(s.response)
    prefixes, responses = [len(prompt) for _, prompt in groups], [[len(ids) for ids in group] for group in inputs]
    return Packed(
        ids=layout.ids,
        positions=layout.positions,
        slots=layout.slots,
        rows=layout.rows,
        labels=torch.tensor(labels),
        sources=torch.tensor(sources),
        competitor=torch.tensor(competitor) if any(competitor) else None,
        lengths=[len(s.response) for s in sequences],
        prefixes=prefixes,
        responses=responses,
        attend=SharedPrefix(prefixes, responses),
        questions=layout.questions,
    )


class Scorer(nn.Module):
    """A VLM as a function from a packed batch to log-probs; an nn.Module so that DDP can wrap it.

    Args:
        autocast: dtype of mixed-precision compute, or None. Its cache of cast weights is off, because `Reference`
            changes weights between two calls.
        critic: give a value, too, for the state before each token (losses/ppo.py): a linear layer, 0 at first.
    """

    def __init__(self, model: VLM, autocast: torch.dtype | None = None, critic: bool = False):
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
            features: (tiles, P, C), or the pixels where the vision tower trains: `VLM.seen`.
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
            return torch.cat([head(states[part]).argmax(-1) for part in _chunks(states, head.weight)])

    def states(self, packed: Packed, features: Tensor) -> Tensor:
        """Final decoder states of the tail tokens (tail tokens, D)."""
        limit = self.model.config.text.max_position_embeddings
        longest = max(p + max(r) for p, r in zip(packed.prefixes, packed.responses))
        if longest > limit:
            raise BadInput(f"a sequence of {longest} tokens, the decoder takes {limit}")
        if self.model.tower_trains:
            features = self.model.vision_features(features)  # (tiles, P, C)
        x = self.model.embed(packed.ids, features, packed.rows, packed.slots, packed.questions)  # (T, D)
        return self.model.language_model.model(x, packed.positions, packed.attend)

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
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, competitor: Tensor | None) -> Tensor:
        """hidden (n, D), weight (V, D), labels (n,), competitor (n,) bool or None -> (n,) fp32."""
        dtype = compute_dtype(hidden.device, weight.dtype)
        hidden, matrix = hidden.to(dtype), weight.detach().to(dtype)
        labels = labels if competitor is None else labels.clone()
        logps = torch.empty(len(hidden), device=hidden.device)  # (n,)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in _chunks(hidden, matrix):
            logits = (hidden[part] @ matrix.T).float()  # (c, V)
            if competitor is not None:
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
    for part in _chunks(hidden, matrix):
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


def _chunks(hidden: Tensor, matrix: Tensor) -> list[slice]:
    """Rows of hidden (n, D) whose logits, with matrix (V, D), are made at a time."""
    step = max(1, CHUNK_ELEMENTS[hidden.device.type] // len(matrix))
    return [slice(i, i + step) for i in range(0, len(hidden), step)]


def naive_logprobs(model: VLM, sequences: list[Sequence], views: list[View]) -> list[Tensor]:
    """The same by definition: one sequence at a time, full logits. For tests and benchmarks.

    Returns one tensor of token log-probs per sequence; `Sequence.image` is the number of its view, or those of several.
    """
    result = []
    for s in sequences:
        ids = torch.tensor(s.prompt + s.response, device=model.device)
        shown = [views[i] for i in s.image] if isinstance(s.image, tuple) else [views[s.image]]
        pixels, rows = stack(shown, model.config.tile_tokens)
        pixels, rows = pixels.to(model.device), torch.cat(rows).to(model.device)
        logits = model.logits(ids[:-1], pixels, rows, s.question)[len(s.prompt) - 1 :].float()  # (R, V)
        labels = torch.tensor(s.response, device=model.device)
        if s.competitor:
            labels = _best_competitor(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        result.append(F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0])
    return result
