"""Records -> batch: each picture once, image tokens by the picture, errors that name the pair."""

import pickle

import pytest
import small
import torch

import data.batch
from common import BadInput
from data.batch import BadRecord, Scored, collate, fields_of, with_seeds, without_bad
from data.order import Drawn, MicroBatches
from losses.rdpo import SEQUENCES
from model.views import View


class Words:
    """Stands for data.processor.Processor: texts are numbers; picture "n" has n tiles and shows 4 n features."""

    image_id, patches = small.IMAGE_TOKEN, small.PATCHES

    def __init__(self, extra: int = 0):
        self.opened, self.extra = [], extra

    def image(self, reference: str, root=None) -> View:
        if reference == "bad":
            raise BadInput("/x/bad: not a readable image")
        self.opened.append(reference)
        n = int(reference)
        return View(torch.full((n, 3, 2, 2), float(n)), torch.tensor([*range(4 * n - 1), -1]))

    def prompt(self, text: str, count: list[int]) -> list[int]:
        return [1, *[self.image_id] * (sum(count) + self.extra), int(text)]

    def question(self, text: str) -> tuple[int, ...]:
        return (int(text), 9)

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
    assert batch.packed.questions == [(7, 9), (8, 9), (7, 9), (8, 9)]
    at = 3 * small.PATCHES
    rows = [*range(11), -1, *range(at, at + 3), -1, *range(at, at + 3), -1, *range(at + 9, at + 16), -1]
    assert batch.packed.rows.tolist() == rows
    assert (batch.packed.ids[batch.packed.slots] == small.IMAGE_TOKEN).all() and len(batch.packed.slots) == 28


def test_labels_picked_in_noise_are_those_of_their_sequences(monkeypatch):
    """Two of four names are picked, not next to each other: responses of 2 and 3 tokens each, so marks in the middle
    and at the end. The noisy ones come in the same order, each under its own noisy image."""
    monkeypatch.setattr(data.batch, "open_image", lambda reference, root: reference)
    monkeypatch.setattr(data.batch, "add_noise", lambda image, seed: (image, seed))
    noise = []
    words = Words()
    words.view = lambda image: noise.append(image) or View(torch.full((1, 3, 2, 2), 9.0), torch.tensor([0, 1]))
    rows = [{**row, "chosen": f"2{i}", "rejected": [30, 31 + i, 2]} for i, row in enumerate(RECORDS)]
    pick, own = dict(tokens="picked_in_noise"), dict(tokens="own_picked_in_noise")
    batch = collate(rows, {"a": dict(image="image", response="chosen"), "b": dict(image="image", response="rejected", **pick),
                           "c": dict(image="image", response="chosen"), "d": dict(image="rejected_image", response="chosen", **own)},
                    words, seeds=[5, 6])
    assert batch.packed.lengths == [2, 2, 3, 3, 2, 2, 2, 2] and batch.noisy.lengths == [3, 3, 2, 2]
    assert batch.picked.tolist() == [False] * 4 + [True] * 6 + [False] * 4 + [True] * 4
    assert batch.own.tolist() == [False] * 14 + [True] * 4
    assert batch.packed.labels[batch.picked].tolist() == batch.noisy.labels.tolist()
    assert noise == [("3", 5), ("1", 6), ("1", 5), ("2", 6)]
    assert batch.noisy.prefixes == [4] * 4 and batch.packed.prefixes == [14, 6, 6, 10]


def test_each_record_has_a_crop_of_its_own(monkeypatch):
    """Also where two records show one image; what is shown whole is opened once."""
    monkeypatch.setattr(data.batch, "crop", lambda pixels, seed: pixels + seed)
    rows = [{**row, "image": "1"} for row in RECORDS]
    batch = collate(rows, {"a": dict(image="image", response="chosen"),
                           "b": dict(image="image", response="chosen", view="crop")}, Words(), seeds=[5, 6])
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 6, 7]


def test_an_image_is_hidden_as_the_rejected_image_of_its_record(monkeypatch):
    """Two records show one image: of either a quarter and a half as in its own other one, and what is shown whole once."""
    monkeypatch.setattr(data.batch, "open_image", lambda reference, root: reference)
    monkeypatch.setattr(data.batch, "hide", lambda image, other, share: (image, other, share))
    hidden = []
    words = Words()
    words.view = lambda image: hidden.append(image) or View(torch.full((1, 3, 2, 2), 9.0), torch.tensor([0]))
    rows = [{**row, "image": "1", "rejected_image": other} for row, other in zip(RECORDS, "23")]
    whole, quarter, half = (dict(image="image", response="chosen", **more) for more in ({}, {"hidden": 0.25}, {"hidden": 0.5}))
    collate(rows, {"a": whole, "b": quarter, "c": half, "d": quarter | dict(response="rejected")}, words, seeds=[5, 6])
    assert hidden == [("1", "2", 0.25), ("1", "3", 0.25), ("1", "2", 0.5), ("1", "3", 0.5)] and words.opened == ["1"]


def test_what_a_loss_may_ask_for():
    """Fields that are read; what differs from step to step; a word that means nothing is refused."""
    assert fields_of({"x": dict(image="rejected_image", response="chosen")}) == {"prompt", "rejected_image", "chosen"}
    assert fields_of({"x": dict(image="image", response="chosen", hidden=0.5)}) == {"prompt", "image", "rejected_image", "chosen"}
    kinds = [{"hidden": 0.5}, {"tokens": "best_other"}, {"view": "crop"}, {"view": "noise"}, {"tokens": "picked_in_noise"},
             {"tokens": "own_picked_in_noise"}]
    assert [Scored("image", "chosen", **kind).drawn for kind in kinds] == [False, False, True, True, True, True]
    for kind in ({"view": "crops"}, {"tokens": "noisy"}):
        with pytest.raises(ValueError, match="is none of"):
            Scored("image", "chosen", **kind)
    for kind in ({"view": "crop"}, {"view": "noise"}, {"tokens": "picked_in_noise"}):
        with pytest.raises(ValueError, match="neither a crop nor noise"):
            Scored("image", "chosen", hidden=0.5, **kind)


def test_errors_name_the_pair():
    with pytest.raises(ValueError, match="record 'b': /x/bad: not a readable image"):
        collate([RECORDS[0], {**RECORDS[1], "image": "bad"}], SEQUENCES, Words())
    with pytest.raises(ValueError, match="record 'a': 13 image tokens in the prompt, 3 has 12 features"):
        collate(RECORDS, SEQUENCES, Words(extra=1))


NAMES = [{"id": name} for name in "abcdefgh"]


def ids_of(records: list[dict], seeds: list[int] | None = None) -> str:
    """Records c and f cannot be used."""
    for record in records:
        if record["id"] in "cf":
            raise BadRecord(record["id"], "damaged")
    return "".join(record["id"] for record in records)


def micro_batches(rank: int = 0, world: int = 1, size: int = 4, **more) -> MicroBatches:
    return MicroBatches(NAMES, **{**dict(batch_size=4, micro_batch_size=size, rank=rank, world=world, seed=3, steps=12,
                                         make=ids_of, skip=True), **more})


def test_a_bad_record_is_replaced_in_its_place():
    """Only the places of c and f change, and each of them gets what can be used."""
    batches = micro_batches()
    made = "".join(batches[key].batch for key in batches.keys())
    plain = micro_batches(make=lambda records, seeds: "".join(record["id"] for record in records))
    order = "".join(plain[key].batch for key in plain.keys())
    assert sorted(order[:8]) == list("abcdefgh") and not set("cf") & set(made)
    assert [a for a, b in zip(order, made) if a != b] == [a for a in order if a in "cf"]
    assert len({b for a, b in zip(order, made) if a in "cf"}) > 2  # not always the same one
    bad = [record for step in range(2) for record in batches[step, 0].bad]
    assert sorted(record.name for record in bad) == ["c", "f"] and str(bad[0]).endswith(": damaged")


def test_replacements_do_not_depend_on_processes_and_parts():
    whole = [micro_batches()[step, 0].batch for step in range(12)]
    for world, size in ((2, 2), (1, 1), (2, 1)):
        shares = [micro_batches(rank, world, size) for rank in range(world)]
        assert whole == ["".join(share[key].batch for share in shares for key in share.keys() if key[0] == step)
                         for step in range(12)]


def test_without_skip_the_first_bad_record_leaves_no_batch():
    found = [micro_batches(skip=False)[step, 0] for step in range(2)]
    assert any(drawn.batch is None and len(drawn.bad) == 1 for drawn in found)
    assert all(drawn.bad == [] for drawn in found if drawn.batch is not None)


def test_when_no_record_can_be_used():
    def never(records, seeds):
        raise BadRecord(records[0]["id"], "damaged")

    drawn = micro_batches(make=never)[0, 0]
    assert drawn.batch is None and sorted(record.name for record in drawn.bad) == list("abcdefgh")


def test_without_bad():
    made, bad = without_bad(NAMES[:4], ids_of)
    assert made == "abd" and [record.name for record in bad] == ["c"]
    assert without_bad([NAMES[2]], ids_of)[0] is None


def test_a_refusal_can_be_sent_to_another_process():
    drawn = pickle.loads(pickle.dumps(Drawn(None, [BadRecord("a", "damaged")])))
    assert str(drawn.bad[0]) == "record 'a': damaged" and isinstance(drawn.bad[0], ValueError)


def test_losses_that_sample_get_records_whose_pictures_can_be_decoded(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"?")
    good, bad = {"id": "a", "image": "scene:1"}, {"id": "b", "image": "bad.png"}
    assert with_seeds([good], [5], tmp_path) == [(good, 5)]
    with pytest.raises(BadRecord, match="record 'b': .*bad.png: not a readable image"):
        with_seeds([good, bad], [5, 6], tmp_path)
