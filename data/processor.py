"""Between people and tensors: texts to token ids, picture references to pixels, and back.

The prompt template is that of the llava-hf model cards (it has no system sentence):

    USER: <image>\\n{prompt} ASSISTANT: {answer}</s>

The text is cut at <image> and its pieces are tokenised separately, as LLaVA does, with P image tokens between
them (P = patches), so the count of image tokens can never depend on the tokenizer. Prompt and answer are
tokenised separately too: the prompt's ids are then the same whatever the answer, which prefix sharing relies
on.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from data.images import CLIP_MEAN, CLIP_STD, Preprocessing, open_image, preprocess
from model.config import clip_config, llava_config, read_config

BEFORE_IMAGE, AFTER_IMAGE = "USER: ", "\n{prompt} ASSISTANT:"


class Processor:
    """Tokenizer, template and image handling of a llava-hf folder. Raises ValueError naming an unusable file."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        config = llava_config(read_config(self.folder), str(self.folder / "config.json"))
        self.tokenizer = read_tokenizer(self.folder)
        self.preprocessing = read_preprocessing(self.folder, config.vision.image_size)
        self.bos_id, self.eos_id = (_id(self.tokenizer, t, self.folder) for t in ("<s>", "</s>"))
        self.image_id = config.image_token_index
        self.image_tokens = [self.image_id] * config.vision.num_patches
        self.prefix = [self.bos_id, *self._encode(BEFORE_IMAGE), *self.image_tokens]

    def image(self, reference: str, root: Path | str | None = None) -> Tensor:
        """Reference -> (3, S, S) fp32."""
        return preprocess(open_image(reference, root), self.preprocessing)

    def prompt(self, text: str) -> list[int]:
        """Question -> ids up to and including "ASSISTANT:", image tokens expanded. ValueError on <image> in it."""
        return [*self.prefix, *self._encode(AFTER_IMAGE.format(prompt=text))]

    def response(self, text: str) -> list[int]:
        """Answer -> ids, ending in EOS. ValueError on <image> or </s> inside."""
        return [*self._encode(text), self.eos_id]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for token in {self.image_id, self.eos_id}.intersection(ids):
            raise ValueError(f"text contains the special token {self.tokenizer.id_to_token(token)}: {text[:80]!r}")
        return ids


class ClipProcessor:
    """Tokenizer and image handling of a CLIP folder."""

    def __init__(self, folder: Path | str):
        folder = Path(folder)
        config = clip_config(read_config(folder), str(folder / "config.json"))
        self.tokenizer = read_tokenizer(folder)
        self.preprocessing = read_preprocessing(folder, config.vision.image_size)
        self.limit = config.text.max_position_embeddings
        names = ("<s>", "</s>") if self.tokenizer.token_to_id("<s>") is not None else ("<|startoftext|>", "<|endoftext|>")
        self.bos_id, self.eos_id = (_id(self.tokenizer, t, folder) for t in names)
        # eos_token_id = 2 is the old convention of pooling at the largest id (model/clip.py).
        pooled = config.text.vocab_size - 1 if config.text.eos_token_id == 2 else config.text.eos_token_id
        if self.eos_id != pooled:
            raise ValueError(f"{folder}: the tokenizer ends a text with id {self.eos_id}, the tower pools at {pooled}")

    def image(self, reference: str, root: Path | str | None = None) -> Tensor:
        """Reference -> (3, S, S) fp32."""
        return preprocess(open_image(reference, root), self.preprocessing)

    def text(self, text: str) -> list[int]:
        """Text -> ids with BOS and EOS; text beyond the tower's limit is cut, as CLIP's own tokenizer does."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids[: self.limit - 2], self.eos_id]


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json, truncation and padding off."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_preprocessing(folder: Path, size: int) -> Preprocessing:
    """Mean and standard deviation from preprocessor_config.json (CLIP's where it is absent), side from the model."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing(size)
    raw = json.loads(path.read_text())
    return Preprocessing(size, tuple(raw.get("image_mean", CLIP_MEAN)), tuple(raw.get("image_std", CLIP_STD)))


def _id(tokenizer: Tokenizer, token: str, folder: Path) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{folder / 'tokenizer.json'}: has no token {token}")
    return found
