"""SentencePiece's tokenizer.model, read without the sentencepiece or protobuf packages.

SentencePiece: a simple and language independent subword tokenizer and detokenizer for neural text processing.
T. Kudo, J. Richardson, EMNLP 2018 (demo), arXiv 1808.06226. LLaMA, Vicuna, Mistral and Yi ship such a file.

The file is one protobuf message. Of it, this is read (message.field, number, default when absent):

    ModelProto.pieces                              1         one message a token; its index is the token's id
      SentencePiece.piece, score, type             1, 2, 3   text; float32; NORMAL
    ModelProto.trainer_spec                        2
      model_type, treat_whitespace_as_suffix       3, 24     UNIGRAM; false
    ModelProto.normalizer_spec                     3
      precompiled_charsmap, add_dummy_prefix       2, 3      none; true
      remove_extra_whitespaces, escape_whitespaces 4, 5      true; true

How a text becomes ids
1. Blanks become "▁" (U+2581); with add_dummy_prefix, one more "▁" is put before any text that is not empty.
2. User-defined pieces are cut out whole. Control pieces (<s>, </s>) are never made from text.
3. Of all neighbours that make a piece together, those that make the piece with the highest score are joined
   first, the leftmost first among equals.
4. A character left over that is no piece becomes its UTF-8 bytes (<0x00> ... <0xFF>), or <unk> in a
   vocabulary without bytes; neighbouring unknown characters are one <unk>.

`tokenizers` needs merges of pairs instead of scores of pieces, so every cut of a piece in two pieces is a
merge, ordered by the score of the whole. One difference remains: two cuts of one piece that overlap in the
text ("aa", "a", "aa" where "aaa" is a piece) are joined in the merges' order, not leftmost first.

Unigram models, Unicode normalisation and the removal of blanks are refused: none of these models uses them.
"""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models

from common import BadInput

BLANK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}  # TrainerSpec.ModelType


class Piece(NamedTuple):
    """One line of the vocabulary."""

    text: str
    score: float
    type: int


class Model(NamedTuple):
    """What the file says: the vocabulary, and whether a text gets a "▁" in front."""

    pieces: list[Piece]
    dummy_prefix: bool


def read_sentencepiece(path: Path) -> tuple[Tokenizer, Callable[[str], str]]:
    """tokenizer.model -> (tokenizer, escape).

    `tokenizer.encode(escape(text)).ids` equals sentencepiece's `encode(text)`: the escape stays outside
    because a normaliser of `tokenizers` would put the dummy prefix after every user-defined piece, too.
    Raises BadInput naming the file and the reason.
    """
    model = read_model(Path(path))
    return build(model), lambda text: escape(text, model.dummy_prefix)


def escape(text: str, dummy_prefix: bool) -> str:
    """Step 1 of the module docstring."""
    return (BLANK if dummy_prefix and text else "") + text.replace(" ", BLANK)


def read_model(path: Path) -> Model:
    """Parse the file. Raises BadInput naming it when it is damaged or of a kind that is not supported."""
    try:
        message = _collect(path.read_bytes())
        pieces = [_piece(_collect(raw)) for raw in message.get(1, [])]
        trainer, normalizer = (_collect(b"".join(message.get(number, []))) for number in (2, 3))
    except (OSError, IndexError, ValueError, TypeError, struct.error) as error:
        raise BadInput(f"{path}: not a SentencePiece model ({error})") from None
    if not pieces:
        raise BadInput(f"{path}: not a SentencePiece model (it has no pieces)")
    kind = _last(trainer, 3, 1)
    refused = {
        f"{MODEL_TYPES.get(kind, kind)} model (BPE is supported)": kind != 2,
        "blanks at the end of words": _last(trainer, 24, False),
        "Unicode normalisation (precompiled_charsmap)": _last(normalizer, 2, b""),
        "removal of extra blanks": _last(normalizer, 4, True),
        "blanks that are not escaped": not _last(normalizer, 5, True),
        "unused pieces": any(piece.type == UNUSED for piece in pieces),
        "pieces that occur twice": len({piece.text for piece in pieces}) < len(pieces),
    }
    for reason, found in refused.items():
        if found:
            raise BadInput(f"{path}: not supported: {reason}")
    return Model(pieces, bool(_last(normalizer, 3, True)))


def build(model: Model) -> Tokenizer:
    """The vocabulary as a byte-fallback BPE of `tokenizers`, for escaped text. Control pieces are special."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = next((piece.text for piece in model.pieces if piece.type == UNKNOWN), None)
    byte_fallback = any(piece.type == BYTE for piece in model.pieces)
    merges = _merges(model.pieces)
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, byte_fallback=byte_fallback, fuse_unk=True))
    for piece in model.pieces:
        if piece.type in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(piece.text, special=True, normalized=False)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.text, special=False, normalized=False)])
    tokenizer.encode_special_tokens = True  # "</s>" inside a text is text
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * model.dummy_prefix)
    return tokenizer


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every cut of a normal piece into two normal pieces; best score first, then longest first part."""
    scores = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    cuts = [(text[:i], text[i:]) for text in scores for i in range(len(text) - 1, 0, -1)
            if text[:i] in scores and text[i:] in scores]
    return sorted(cuts, key=lambda cut: -scores["".join(cut)])  # stable


def _piece(fields: dict[int, list]) -> Piece:
    (score,) = struct.unpack("<f", _last(fields, 2, bytes(4)))
    return Piece(_last(fields, 1, b"").decode(), score, _last(fields, 3, NORMAL))


def _collect(message: bytes) -> dict[int, list]:
    """Field number -> its values in file order."""
    fields: dict[int, list] = {}
    for number, value in _fields(message):
        fields.setdefault(number, []).append(value)
    return fields


def _last(fields: dict[int, list], number: int, default):
    """The value of a field that occurs once (protobuf: the last one counts), as the default a number or bytes."""
    value = fields.get(number, [default])[-1]
    if isinstance(value, bytes) != isinstance(default, bytes):
        raise BadInput(f"field {number} is of another type")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field on the wire; lengths and integers are varints, floats 4 bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            size, at = _varint(message, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = message[at : at + size], at + size
        else:
            raise BadInput(f"wire type {kind} at byte {at}")
        if at > len(message):
            raise BadInput(f"cut off at byte {len(message)}")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first, the top bit says that more follow -> (value, position after it)."""
    value = 0
    for i in range(10):  # enough for 64 bits
        byte = message[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise BadInput(f"a number of more than 64 bits at byte {at}")
