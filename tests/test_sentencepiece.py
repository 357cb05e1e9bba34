"""tokenizer.model without the sentencepiece library: its ids and texts, as goldens and, if there, asked again."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from data.sentencepiece import read_model, read_sentencepiece

GOLDENS = Path(__file__).parent / "goldens"
MODEL = GOLDENS / "tokenizer.model"
NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }; appended, it overrides


def make():
    """tests/goldens/make_sentencepiece.py as a module."""
    spec = importlib.util.spec_from_file_location("make_sentencepiece", GOLDENS / "make_sentencepiece.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encode(path: Path):
    """(text -> ids, ids -> text) of a file."""
    tokenizer, escape = read_sentencepiece(path)
    return lambda text: tokenizer.encode(escape(text), add_special_tokens=False).ids, tokenizer.decode


def test_equals_what_sentencepiece_said():
    ids, text = encode(MODEL)
    cases = json.loads((GOLDENS / "sentencepiece.json").read_text())
    assert len(cases) > 30
    for case in cases:
        assert ids(case["text"]) == case["ids"], case["text"]
        assert text(case["ids"]) == case["decoded"], case["text"]


def texts(pieces: list[str], count: int) -> list[str]:
    """Awkward texts and random joins of pieces, blanks, letters and characters from all planes."""
    rng = random.Random(0)
    draw = (
        lambda: rng.choice(pieces).replace("▁", " "),
        lambda: " " * rng.randrange(1, 9),
        lambda: chr(rng.randrange(*rng.choice(((1, 0x300), (0x4E00, 0x9FFF), (0x1F300, 0x1F700))))),
        lambda: rng.choice("aeios.10") * rng.randrange(1, 12),
    )
    joined = ["".join(rng.choice(draw)() for _ in range(rng.randrange(1, 12))) for _ in range(count)]
    return [*make().TEXTS, *pieces, *joined]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(add_dummy_prefix=False),
        dict(byte_fallback=False, vocab_size=260),
        dict(user_defined_symbols=["dog", "do", "a b", "é", "<pad>"]),
        dict(control_symbols=["<pad>", "cat"], split_digits=False, allow_whitespace_only_pieces=False),
        dict(bos_id=-1, eos_id=-1, unk_id=3, split_by_whitespace=False, byte_fallback=False, vocab_size=260),
    ],
)
def test_equals_sentencepiece(changes, tmp_path):
    """Same ids and same decoded text, with each part of the settings that such files differ in."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(make().train(**changes))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ids, decoded = encode(tmp_path / "tokenizer.model")
    unknown = oracle.unk_id()
    for text in texts([oracle.id_to_piece(i) for i in range(len(oracle))], 2000):
        expected = oracle.encode(text)
        assert ids(text) == expected, text
        if unknown not in expected:  # the library writes a question mark there, ours nothing
            assert decoded(expected) == oracle.decode(expected), text


def test_the_golden_file_is_what_its_script_makes(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
    assert read_model(MODEL) == read_model(_write(tmp_path / "tokenizer.model", make().train()))
    assert [case["ids"] for case in json.loads((GOLDENS / "sentencepiece.json").read_text())] == [
        oracle.encode(text) for text in make().TEXTS
    ]


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_vocabulary():
    """3 control and unknown pieces, 2 user-defined, 256 bytes, the rest learned with falling scores."""
    model = read_model(MODEL)
    assert " ".join(piece.text for piece in model.pieces[:5]) == "<unk> <s> </s> <|im_start|> <|im_end|>"
    assert [piece.type for piece in model.pieces[:6]] == [2, 3, 3, 4, 4, 6]
    assert model.pieces[5].text == "<0x00>" and sum(piece.type == 6 for piece in model.pieces) == 256
    assert model.dummy_prefix and model.pieces[262].score == -1.0


@pytest.mark.parametrize(
    "tail, reason",
    [
        (b"\x12\x02\x18\x01", "unigram model"),  # trainer_spec.model_type
        (b"\x12\x03\xc0\x01\x01", "blanks at the end of words"),  # .treat_whitespace_as_suffix
        (b"\x1a\x03\x12\x01a", "Unicode normalisation"),  # normalizer_spec.precompiled_charsmap
        (b"\x1a\x02\x20\x01", "removal of extra blanks"),
        (b"\x1a\x02\x28\x00", "blanks that are not escaped"),
        (b"\x0a\x05\x0a\x01q\x18\x05", "unused pieces"),
        (b"\x0a\x05\x0a\x03<s>", "pieces that occur twice"),
    ],
)
def test_other_kinds_are_refused(tail, reason, tmp_path):
    """Fields appended to a protobuf message override the earlier ones, or add to repeated ones."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(MODEL.read_bytes() + tail)
    with pytest.raises(ValueError, match=f"tokenizer.model: not supported: {reason}"):
        read_sentencepiece(path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"version https://git-lfs", b"\x0a\x10abc", b"\x0a", b"\x0f", b"\x0a\x02\x0a\x00\x80",
        b"\x0a\x02\x08\x05",  # a piece whose text is a number
    ],
    ids=range(7),
)
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model"):
        read_sentencepiece(path)


def test_a_number_ends_after_64_bits(tmp_path):
    """In a damaged file it would take minutes to add up."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x08" + b"\xff" * 2**10)
    with pytest.raises(ValueError, match="tokenizer.model: not a SentencePiece model .a number of more than 64 bits"):
        read_sentencepiece(tmp_path / "tokenizer.model")


def test_a_field_may_be_cut_off_anywhere(tmp_path):
    """A truncated download is refused, or (cut between two fields) lacks pieces; it never crashes."""
    path, whole = tmp_path / "tokenizer.model", MODEL.read_bytes()
    for size in range(1, 400):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="tokenizer.model: not"):
            read_sentencepiece(path)
