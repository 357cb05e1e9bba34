"""Prompt template, special tokens and decoding, on a small tokenizer built like LLaMA's."""

import json
from pathlib import Path

import pytest
import small
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.processor import ClipProcessor, Processor

QUESTION, ANSWER = "Is there a dog in {the} image?", "Yes, a dog."
SPECIAL = ["<unk>", "<s>", "<pad>", "</s>", "<image>"]


def tokenizer(special: list[str] = SPECIAL, last: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-fallback BPE, a blank before every text, bytes not special, as in LLaMA's tokenizer.json.

    special: the first tokens; last: special tokens after all others.
    """
    result = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    result.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    result.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merges across blanks
    result.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    result.train_from_iterator([f"USER: \n{QUESTION} ASSISTANT: {ANSWER}"] * 9, trainer)
    spec = json.loads(result.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in special]
    result = Tokenizer.from_str(json.dumps(spec))
    result.add_special_tokens(list(last))
    return result


CONFIG = {**small.LLAVA, "text_config": {**small.TEXT, "vocab_size": 400}, "image_token_index": 4}


@pytest.fixture
def processor(tmp_path) -> Processor:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    return Processor(tmp_path)


def test_template_equals_tokenising_the_whole_text(processor):
    """Pieces tokenised apart give the ids of the whole, with the image token repeated once per patch."""
    whole = f"<s>USER: <image>\n{QUESTION} ASSISTANT: {ANSWER}</s>"
    expected = processor.tokenizer.core.encode(whole, add_special_tokens=False).ids
    at = expected.index(4)
    expected[at : at + 1] = [4] * small.PATCHES
    assert processor.prompt(QUESTION) + processor.response(ANSWER) == expected
    assert processor.response(ANSWER)[-1] == processor.eos_id == 3


def test_the_embedded_model_reads_what_it_was_trained_on():
    """Ids that model/tiny learned: <s> ▁USER : ▁ <image> ▁⏎ ▁Is … ▁ASSISTANT : | ▁Yes , ▁there … ▁dog . </s>"""
    tiny = Processor(Path(__file__).parents[1] / "model" / "tiny")
    question = [317, 327, 325, 308, 428, 324, 307, 323, 264, 321, 263]
    assert tiny.prompt("Is there a dog in the image?", 1) == [1, 373, 263, 303, 4, *question]
    assert tiny.response("Yes, there is a dog.") == [340, 49, 325, 328, 308, 428, 262, 3]


def test_prompts_of_different_text_share_their_start(processor):
    a, b = processor.prompt("a dog"), processor.prompt("Yes")
    assert a[: len(processor.prefix)] == b[: len(processor.prefix)] == processor.prefix
    assert a.count(4) == small.PATCHES and a[-1] != 4


@pytest.mark.parametrize("text", [ANSWER, "naïve 犬 dog", "  two  blanks", "line\nbreak", ""])
def test_decode_undoes_response(processor, text):
    assert processor.decode(processor.response(text)) == text


@pytest.mark.parametrize("token", ["<image>", "</s>", "<s>", "<pad>"])
def test_special_tokens_in_text_are_refused(processor, token):
    with pytest.raises(ValueError, match=f"special token {token}: 'a dog {token}"):
        processor.response(f"a dog {token} here")
    with pytest.raises(ValueError, match=f"special token {token}"):
        processor.prompt(f"a {token}")


def test_image(processor, tmp_path):
    """Side from the model's config, mean and deviation from the preprocessor's: (v / 255 - 0.5) / 0.25."""
    raw = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(raw))
    Image.new("RGB", (30, 50), (255, 0, 51)).save(tmp_path / "red.png")
    view = Processor(tmp_path).image("red.png", tmp_path)
    assert view.pixels.shape == (1, 3, small.SIDE, small.SIDE) and view.rows.tolist() == list(range(small.PATCHES))
    torch.testing.assert_close(view.pixels[0, :, 3, 5], torch.tensor([2.0, -2.0, -1.2]))


def test_a_folder_without_the_tokens_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small.LLAVA))
    with pytest.raises(ValueError, match="has no tokenizer.json, no tokenizer.model and no vocab.json"):
        Processor(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json: has no token </s>"):
        Processor(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a readable tokenizer"):
        Processor(tmp_path)


def test_a_vocabulary_larger_than_the_table_is_refused(tmp_path, processor):
    """Ids that text can have need a row; <image> and other special tokens that no template uses do not."""
    largest = max(i for t, i in processor.tokenizer.core.get_vocab().items() if t not in SPECIAL)
    core = processor.tokenizer.core
    core.add_special_tokens(["<extra>"])
    core.save(str(tmp_path / "tokenizer.json"))
    for rows, fits in ((largest + 1, True), (largest, False)):
        config = {**CONFIG, "text_config": {**small.TEXT, "vocab_size": rows}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if fits:
            assert Processor(tmp_path).eos_id == 3
        else:
            reason = f"tokenizer.json: token '.*' has the id {largest}, the embedding table has {rows} rows"
            with pytest.raises(ValueError, match=reason):
                Processor(tmp_path)


@pytest.mark.parametrize("eos_in_config, fits", [(3, True), (2, False), (5, False)])
def test_clip_must_pool_where_its_tokenizer_ends(tmp_path, eos_in_config, fits):
    """At </s>, id 3 here; eos_token_id 2 stands for the largest id."""
    text = {**small.CLIP_TEXT, "vocab_size": 400, "eos_token_id": eos_in_config}
    (tmp_path / "config.json").write_text(json.dumps({**small.CLIP_BOTH, "text_config": text}))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    if not fits:
        with pytest.raises(ValueError, match="ends a text with id 3"):
            ClipProcessor(tmp_path)
    else:
        ids = ClipProcessor(tmp_path).text("Is there a dog in the image? " * 5)
        assert len(ids) == 12 and ids[0] == 1 and ids[-1] == 3  # cut to the tower's 12 positions


def test_clip_vocabulary_larger_than_the_table(tmp_path):
    text = {**small.CLIP_TEXT, "vocab_size": 100, "eos_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps({**small.CLIP_BOTH, "text_config": text}))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json: token .* the embedding table has 100 rows"):
        ClipProcessor(tmp_path)
