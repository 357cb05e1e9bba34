"""Texts are refused at the start exactly where they would be refused later."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from data.batch import collate
from data.check import check_records, problems_of
from data.processor import Processor
from losses import dpo, rdpo
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import generate
from model.logprobs import Scorer

RECORD = {"id": "a", "image": "scene:7", "rejected_image": "scene:8", "prompt": "What is there?",
          "chosen": "A dog.", "rejected": "A cat."}


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def tiny():
    return load_llava(DEFAULT_MODEL)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<|im_end|>"])
@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_special_tokens(processor, field, token):
    (found,) = problems_of({**RECORD, field: f"It says {token} here"}, processor, None, dpo.SEQUENCES)
    assert found == f"{field!r}: text contains the special token {token}: 'It says {token} here'"


def test_only_what_the_loss_scores_is_looked_at(processor):
    odd = {**RECORD, "rejected": "<s>"}
    assert problems_of(odd, processor, None, {"chosen": dict(image="image", response="chosen")}) == []
    assert problems_of(odd, processor, None) == []


def longest(processor, extra: int) -> dict:
    """A record whose chosen answer fills the decoder's window, and `extra` tokens more."""
    want = processor.window + 1 + extra - len(processor.prompt(RECORD["prompt"]))
    text = "A" + " dog" * (want - 2)
    assert len(processor.response(text)) == want
    return {**RECORD, "chosen": text}


@pytest.mark.parametrize("end", [False, True])
def test_the_window_is_the_scorers(processor, tiny, end):
    """The longest answer that the scorer takes passes, one token more does not; `end` adds one to each."""
    for extra in (0, 1):
        record, refused = longest(processor, extra - end), f"{processor.window + 1} tokens"
        batch = collate([record], dpo.SEQUENCES, processor, end=end)
        found = problems_of(record, processor, None, dpo.SEQUENCES, end=end)
        if extra:
            assert found == [f"'chosen': {refused} with prompt and image, the decoder takes {processor.window}"]
            with pytest.raises(ValueError, match=f"a sequence of {refused}"):
                Scorer(tiny)(batch.packed, tiny.vision_features(batch.pixels))
        else:
            assert found == []
            with torch.no_grad():
                Scorer(tiny)(batch.packed, tiny.vision_features(batch.pixels))


def test_a_long_answer_about_two_pictures_is_named_once(processor):
    assert len(problems_of(longest(processor, 1), processor, None, rdpo.SEQUENCES)) == 1


def test_the_room_for_new_tokens_is_the_generators(processor, tiny):
    """As many new tokens as fit pass, one more does not."""
    prompt = processor.prompt(RECORD["prompt"])
    room = processor.window - len(prompt)
    assert problems_of(RECORD, processor, None, new_tokens=room) == []
    (found,) = problems_of(RECORD, processor, None, new_tokens=room + 1)
    assert found.endswith(f"{room + 1} new ones (--max-new-tokens), the decoder takes {processor.window}")
    with pytest.raises(ValueError, match="prompt and answer may reach"):
        generate(tiny, [processor.image("scene:7")], [prompt], eos_id=processor.eos_id, max_new_tokens=room + 1)


@pytest.mark.parametrize("size", [(40, 90), (300, 20), (64, 64), (1, 1), (1000, 700)])
def test_image_tokens_follow_from_the_header(tmp_path, size):
    """With tiles and without: as many as `image` gives, though the pixels are cut off."""
    processor = Processor(DEFAULT_MODEL)
    Image.new("RGB", size).save(tmp_path / "a.bmp")
    side = processor.preprocessing.size
    tiles = replace(processor.config, image_grid_pinpoints=((side, 2 * side), (2 * side, side)))
    for aspect, config in (("crop", processor.config), ("anyres", tiles)):
        processor.aspect, processor.config = aspect, config
        expected = len(processor.image("a.bmp", tmp_path).rows)
        whole = (tmp_path / "a.bmp").read_bytes()
        (tmp_path / "cut.bmp").write_bytes(whole[:56])
        assert processor.image_tokens("cut.bmp", tmp_path) == expected


def test_all_records_are_listed_and_a_long_list_is_cut(processor, monkeypatch):
    records = [{**RECORD, "id": f"r{i}", "chosen": "<s>" * (i % 2)} for i in range(9)]
    with pytest.raises(ValueError) as error:
        check_records(records, processor, None, "d.jsonl", sequences=dpo.SEQUENCES)
    lines = str(error.value).split("\n")
    assert [line.split(":")[1] for line in lines] == [f" record 'r{i}'" for i in (1, 3, 5, 7)]
    monkeypatch.setattr("common.SHOWN", 2)
    with pytest.raises(ValueError) as error:
        check_records(records, processor, None, "d.jsonl", sequences=dpo.SEQUENCES)
    assert str(error.value).split("\n") == [*lines[:2], "... and 2 more problems"]
