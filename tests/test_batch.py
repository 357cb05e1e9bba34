"""Records -> batch: each picture once, image tokens by the picture, errors that name the pair."""

from __future__ import annotations

import pytest
import small
import torch

from data.batch import collate
from data.images import View
from losses.rdpo import SEQUENCES


class Words:
    """Stands for data.processor.Processor: texts are numbers; picture "n" has n tiles and shows 4 n features."""

    image_id, patches = small.IMAGE_TOKEN, small.PATCHES

    def __init__(self, extra: int = 0):
        self.opened, self.extra = [], extra

    def image(self, reference: str, root=None) -> View:
        if reference == "bad":
            raise ValueError("/x/bad: not a readable image")
        self.opened.append(reference)
        n = int(reference)
        return View(torch.full((n, 3, 2, 2), float(n)), torch.tensor([*range(4 * n - 1), -1]))

    def prompt(self, text: str, count: int) -> list[int]:
        return [1, *[self.image_id] * (count + self.extra), int(text)]

    def response(self, text: str) -> list[int]:
        return [int(text), 2]


RECORDS = [
    dict(id="a", image="3", rejected_image="1", prompt="7", chosen="20", rejected="21"),
    dict(id="b", image="1", rejected_image="2", prompt="8", chosen="22", rejected="23"),
]


def test_each_picture_is_opened_once_and_gives_its_own_image_tokens():
    """Sequences: chosen and rejected on pictures 3, 1, then chosen on the others' 1, 2: tiles 3 + 1 + 2 = 6.

    Prefixes in the order they are met: (3, "7"), (1, "8"), (1, "7"), (2, "8") with 12, 4, 4 and 8 image tokens.
    """
    words = Words()
    batch = collate(RECORDS, SEQUENCES, words)
    assert words.opened == ["3", "1", "2"] and batch.pixels[:, 0, 0, 0].tolist() == [3, 3, 3, 1, 2, 2]
    assert batch.packed.prefixes == [14, 6, 6, 10]
    at = 3 * small.PATCHES
    rows = [*range(11), -1, *range(at, at + 3), -1, *range(at, at + 3), -1, *range(at + 9, at + 16), -1]
    assert batch.packed.rows.tolist() == rows
    assert (batch.packed.ids[batch.packed.slots] == small.IMAGE_TOKEN).all() and len(batch.packed.slots) == 28


def test_errors_name_the_pair():
    with pytest.raises(ValueError, match="record 'b': /x/bad: not a readable image"):
        collate([RECORDS[0], {**RECORDS[1], "image": "bad"}], SEQUENCES, Words())
    with pytest.raises(ValueError, match="record 'a': 13 image tokens in the prompt, 3 has 12 features"):
        collate(RECORDS, SEQUENCES, Words(extra=1))
