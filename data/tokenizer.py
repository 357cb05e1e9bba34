"""A folder's tokenizer, whichever of the three forms it comes in.

    tokenizer.json             Hugging Face's one-file form (llava-hf, CLIP)           read by `tokenizers`
    tokenizer.model            SentencePiece (original LLaVA, Vicuna, Mistral, Yi)     data/sentencepiece.py
    vocab.json + merges.txt    CLIP's first form                                       `clip_bpe`

The first that is there counts. Nothing is added, cut or padded here: text in, ids of that text out.
"""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from common import BadInput
from data.sentencepiece import read_sentencepiece

CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"  # a digit is a word


class TextTokenizer:
    """Text <-> ids of a folder. Raises BadInput naming an unusable or missing file."""

    def __init__(self, folder: Path | str):
        self.path, self.core, self.escape = _read(Path(folder))
        self.core.no_truncation()
        self.core.no_padding()
        added = self.core.get_added_tokens_decoder().values()
        self.special = {token.content for token in added if token.special}

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without tokens that begin or end a text."""
        return self.core.encode(self.escape(text), add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens."""
        return self.core.decode(ids, skip_special_tokens=True)

    def check_rows(self, rows: int, used: list[int]) -> None:
        """Raise BadInput when a text may have an id without a row in the embedding table: of a token that is not
        special, or one of those `used` around it."""
        plain = (i for token, i in self.core.get_vocab().items() if token not in self.special)
        largest = max([*plain, *used])
        if largest >= rows:
            raise BadInput(f"{self.path}: token {self.core.id_to_token(largest)!r} has the id {largest}, the"
                           f" embedding table has {rows} rows")

    def id(self, token: str) -> int:
        """Id of one token. Raises BadInput naming the file when it is not in the vocabulary."""
        found = self.core.token_to_id(token)
        if found is None:
            raise BadInput(f"{self.path}: has no token {token}")
        return found


def clip_bpe(vocabulary: Path, merges: Path) -> Tokenizer:
    """CLIP's byte-level BPE: lower case, one blank for any, "</w>" after a word's last piece."""
    options = dict(unk_token=CLIP_SPECIAL[1], end_of_word_suffix="</w>")
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges), **options))
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CLIP_SPECIAL])
    return tokenizer


def _read(folder: Path) -> tuple[Path, Tokenizer, Callable[[str], str]]:
    """The file that decided, the tokenizer, and what turns a text into what it takes."""
    names = "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"
    fast, sentencepiece, vocabulary, merges = (folder / name for name in names)
    if fast.is_file():
        return fast, load_tokenizer(fast), str
    if sentencepiece.is_file():
        return sentencepiece, *read_sentencepiece(sentencepiece)
    if vocabulary.is_file() and merges.is_file():
        return vocabulary, load_tokenizer(vocabulary, merges, read=clip_bpe), str
    raise BadInput(f"{folder}: has no tokenizer.json, no tokenizer.model and no vocab.json with merges.txt")


def load_tokenizer(*paths: Path, read: Callable[..., Tokenizer] = Tokenizer.from_file) -> Tokenizer:
    """What `read` makes of the files. Raises BadInput naming them."""
    try:
        return read(*map(str, paths))
    except Exception as error:  # the library raises bare Exception
        names = " with ".join([str(paths[0]), *(path.name for path in paths[1:])])
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"{names}: not a readable tokenizer ({reason})") from None
