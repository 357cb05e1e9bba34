"""The layout that scoring and generation share, against the drawing in its header."""

import pytest
import torch

from model import packing
from model.packing import lay_out, tail_rows

WORDS = "<s> # Is it ? Why No . Yes So".split()
IMAGE = WORDS.index("#")
ROWS = [torch.tensor([3, -1]), torch.tensor([7])]


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def drawn(label: str) -> list[str]:
    """The row of the drawing that begins with this label, without the note at its end."""
    line = next(line for line in packing.__doc__.splitlines() if line.startswith(f"    {label} "))
    return line.removeprefix(f"    {label}").split("   " + " " * 20)[0].split()


def test_the_drawing():
    layout = lay_out([ids("<s> # # Is it ?"), ids("<s> # Why ?")], [[ids("No ."), ids("Yes")], [ids("So")]], ROWS,
                     [(5,), (6, 6)], IMAGE)
    assert [WORDS[i] for i in layout.ids] == drawn("ids")
    assert layout.positions.tolist() == list(map(int, drawn("the sequence")))
    assert layout.slots.tolist() == [1, 2, 6] and layout.rows.tolist() == [3, -1, 7]
    assert layout.anchors == [0, 4] and layout.begins == [[1, 3], [5]]
    assert layout.questions == [(5,), (6, 6)]


def test_empty_beginnings_and_an_image_at_the_end_of_the_prompt():
    """The last token of a prompt is in the tail, image token or not; nothing follows where nothing was written."""
    layout = lay_out([ids("<s> Is #"), ids("Why ?"), ids("# <s>")], [[[], []], [[], ids("No")], [[]]],
                     [ROWS[1], torch.tensor([], dtype=torch.long), ROWS[1]], [(1,), (2,), (3,)], IMAGE)
    assert [WORDS[i] for i in layout.ids] == ["<s>", "Is", "Why", "#", "#", "?", "No", "<s>"]
    assert layout.positions.tolist() == [0, 1, 0, 0, 2, 1, 2, 1]
    assert layout.slots.tolist() == [4, 3] and layout.questions == [(1,), (3,)]  # none of the prompt without an image
    assert (layout.anchors, layout.begins) == ([0, 1, 3], [[1, 1], [2, 2], [4]])
    assert tail_rows([[0, 0], [0, 1], [0]]) == (layout.anchors, layout.begins)


@pytest.mark.parametrize("prompt, reason", [("<s>", "prompt 1: needs at least two tokens"),
                                            ("<s> Is", "prompt 1: 0 image tokens, its image needs 1"),
                                            ("# # Is", "prompt 1: 2 image tokens, its image needs 1")])
def test_prompts_that_do_not_fit(prompt, reason):
    with pytest.raises(ValueError, match=reason):
        lay_out([ids("<s> # # Is"), ids(prompt)], [[[]], [[]]], ROWS, [(), ()], IMAGE)
