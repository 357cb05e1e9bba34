"""Which of a folder's tokenizer files counts, and CLIP's BPE from vocab.json and merges.txt."""

import json
import shutil
from pathlib import Path

import pytest
import small
from tokenizers import Tokenizer, models, pre_tokenizers

from data.processor import ClipProcessor
from data.tokenizer import CLIP_SPECIAL, TextTokenizer, clip_bpe

MODEL = Path(__file__).parent / "goldens" / "tokenizer.model"
MERGES = ("d o", "do g</w>", "c a", "ca t</w>", "' s</w>", "1 2</w>", "Ġ a</w>", "! !</w>")
TEXTS = (
    "A DOG's  cat12", "", "  dog\n\tcat ", "dogcat don't!!", "É犬🙂 ½", "DOĜ", "<|endoftext|> dog",
    "a_b-c\u00a0d", "\x00",
)


def clip_folder(folder: Path) -> Path:
    """A CLIP folder with a vocabulary of all bytes, in the middle and at the end of a word, and MERGES."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = [merge.replace(" ", "") for merge in MERGES]
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet), *joined, *CLIP_SPECIAL]
    text = {**small.CLIP_TEXT, "vocab_size": len(vocabulary), "eos_token_id": len(vocabulary) - 1}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**small.CLIP_BOTH, "text_config": text}))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder


def test_clip_bpe(tmp_path):
    """Lower case; an ending is a word ('s); every digit is a word, so 1 and 2 never merge."""
    processor = ClipProcessor(clip_folder(tmp_path))
    ids = processor.text("A DOG's \n cat12")
    names = " ".join(processor.tokenizer.core.id_to_token(i) for i in ids)
    assert names == "<|startoftext|> a</w> dog</w> 's</w> cat</w> 1</w> 2</w> <|endoftext|>"
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"]["eos_token_id"] = 2  # the old convention: pooled at the largest id
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ClipProcessor(tmp_path).eos_id == processor.eos_id == raw["text_config"]["vocab_size"] - 1
    assert len(processor.text("dog " * 50)) == small.CLIP_TEXT["max_position_embeddings"]


def test_clip_bpe_from_tokenizer_json(tmp_path):
    """The one-file form of the same vocabulary gives the same ids, without vocab.json and merges.txt."""
    processor = ClipProcessor(clip_folder(tmp_path))
    clip_bpe(tmp_path / "vocab.json", tmp_path / "merges.txt").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "merges.txt").unlink()
    assert [ClipProcessor(tmp_path).text(text) for text in TEXTS] == [processor.text(text) for text in TEXTS]


def test_clip_bpe_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = ClipProcessor(clip_folder(tmp_path))
    oracle = transformers.CLIPTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        expected = oracle(text, truncation=True, max_length=processor.limit).input_ids
        assert processor.text(text) == expected, text


def test_the_first_file_counts(tmp_path):
    """tokenizer.json before tokenizer.model before vocab.json with merges.txt."""
    clip_folder(tmp_path)
    assert TextTokenizer(tmp_path).path.name == "vocab.json"
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    assert TextTokenizer(tmp_path).path.name == "tokenizer.model"
    Tokenizer(models.WordLevel({"a": 7}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.path.name == "tokenizer.json" and tokenizer.encode("a") == [7]


def test_special_tokens_do_not_survive_decoding(tmp_path):
    shutil.copy(MODEL, tmp_path / "tokenizer.model")
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.special == {"<unk>", "<s>", "</s>"}
    assert tokenizer.decode([1, *tokenizer.encode("two dogs"), 2, 2]) == "two dogs"


def test_a_vocabulary_without_merges_is_no_tokenizer(tmp_path):
    (clip_folder(tmp_path) / "merges.txt").unlink()
    with pytest.raises(ValueError, match="no vocab.json with merges.txt"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [("vocab.json", "{"), ("merges.txt", "not in the vocabulary\n"), ("merges.txt", "a " + "b" * 9000)],
    ids=range(3),
)
def test_damaged_files_are_named(tmp_path, name, content):
    (clip_folder(tmp_path) / name).write_text(content)
    with pytest.raises(ValueError, match="vocab.json with merges.txt: not a readable tokenizer .{10,250}$"):
        TextTokenizer(tmp_path)


def test_what_the_library_says_is_one_line(tmp_path):
    """It quotes the token as it is."""
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "\n"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    with pytest.raises(ValueError, match="tokenizer.json: not a readable tokenizer") as caught:
        TextTokenizer(tmp_path)
    assert "\n" not in str(caught.value)
