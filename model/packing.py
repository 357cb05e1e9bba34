"""Prompts and what follows them as one row of tokens: the layout that scoring and generation share.

A group is one prompt and the responses (or their beginnings) to it. The order is that of `SharedPrefix`
(model/attention.py): of each prompt all but the last token, the bodies; then of each group the last token of the
prompt and its responses one after the other, the tails. Tails are the positions that predict something.

Two groups, # an image token:

    prompts        0: <s> # # Is it ?        1: <s> # Why ?
    responses      0: No . | Yes             1: So

                   bodies                         tails
                   ------ 0 ------  --- 1 ---     ---- 0 ----  - 1 -
    ids            <s> #  #  Is it  <s> #  Why    ?  No .  Yes  ?  So
    position in
    the sequence   0   1  2  3  4   0   1  2      5  6  7  6    3  4
    slots              1  2             6                                   index of each image token
    anchors                                       0             4           tail row of each prompt's last token
    begins                                           1     3       5        tail row where each response begins
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Movable:
    """Tensors that go together from the CPU to a device; a dataclass of tensors need say no more."""

    def to(self, device: torch.device | str):
        """On a device; from pinned memory the copy does not block."""
        return self.moved(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self):
        """Called by the data loader when it pins batches for CUDA."""
        return self.moved(lambda x: x.pin_memory())

    def moved(self, move: Callable[[Tensor], Tensor]):
        """With `move` applied to all tensors."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: move(x) if isinstance(x, Tensor) else x.moved(move)
                                for name, x in values.items() if isinstance(x, Tensor | Movable)})


class Layout(NamedTuple):
    """Built on the CPU by `lay_out`."""

    ids: Tensor  # (T,) all bodies, then all tails
    positions: Tensor  # (T,) position of each token in its own sequence
    slots: Tensor  # (I,) where the image tokens are in ids
    rows: Tensor  # (I,) what each of them stands for (model/views.py)
    questions: list[tuple[int, ...]]  # of each group with image tokens
    anchors: list[int]  # of each group
    begins: list[list[int]]  # of each response of each group


def lay_out(prompts: list[Sequence[int]], responses: list[list[Sequence[int]]], rows: list[Tensor],
            questions: list[tuple[int, ...]], image_id: int) -> Layout:
    """Lay groups out as drawn above.

    Args:
        prompts: token ids of each group's prompt.
        responses: of each group the token ids of each response; may be empty lists.
        rows: of each group what the prompt's image tokens stand for, of all its images; empty for a question without.
        questions: of each group what `VLM.connect` reads of the question.
    Raises ValueError on a prompt of fewer than two tokens, or image tokens that are not as many as the rows.
    """
    bodies, tails, body_positions, tail_positions, slots = [], [], [], [], []
    skip = sum(len(prompt) - 1 for prompt in prompts)  # tail row i is token skip + i
    anchors, begins = tail_rows([[len(ids) for ids in group] for group in responses])
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        _check(g, prompt, len(rows[g]), image_id)
        # Where each token of the prompt goes: the last one, which may be an image token too, opens the tail.
        places = [*range(len(bodies), len(bodies) + len(prompt) - 1), skip + len(tails)]
        slots += [place for place, token in zip(places, prompt) if token == image_id]
        bodies += prompt[:-1]
        body_positions += range(len(prompt) - 1)
        tails += [prompt[-1], *(token for ids in group for token in ids)]
        tail_positions += [len(prompt) - 1, *(len(prompt) + t for ids in group for t in range(len(ids)))]
    ids, positions, slots = (torch.tensor(x, dtype=torch.long)
                             for x in (bodies + tails, body_positions + tail_positions, slots))
    questions = [question for question, shown in zip(questions, rows, strict=True) if len(shown)]
    return Layout(ids, positions, slots, torch.cat(rows), questions, anchors, begins)


def tail_rows(lengths: list[list[int]]) -> tuple[list[int], list[list[int]]]:
    """(anchors, begins) of `Layout`, of the length of each response of each group."""
    anchors, begins, row = [], [], 0
    for group in lengths:
        anchors.append(row)
        row += 1
        begins.append([])
        for length in group:
            begins[-1].append(row)
            row += length
    return anchors, begins


def _check(g: int, prompt: Sequence[int], rows: int, image_id: int) -> None:
    if len(prompt) < 2:
        raise ValueError(f"prompt {g}: needs at least two tokens")
    if (count := list(prompt).count(image_id)) != rows:
        raise ValueError(f"prompt {g}: {count} image tokens, its image needs {rows}")
