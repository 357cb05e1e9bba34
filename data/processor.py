"""Between people and tensors: texts to token ids, picture references to pixels, and back.

The template (data/templates.py) is the one that the checkpoint was trained with, for example llava-hf's

    USER: <image>\\n{prompt} ASSISTANT: {answer}</s>

The text is cut at <image> and at special tokens and its pieces are tokenised separately, as LLaVA does, with
the picture's image tokens put between them, so their count can never depend on the tokenizer. The answer's ids
are those that follow the prompt's when both are tokenised as one text; the prompt's ids are the same whatever
the answer, which prefix sharing relies on.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from torch import Tensor

from common import BadInput
from data.anyres import anyres, image_rows
from data.images import View, image_size, open_image, pad_to_square, preprocess, single
from data.settings import find_aspect, read_preprocessing
from data.templates import SPECIAL, cut, find_template
from data.tokenizer import CLIP_SPECIAL, TextTokenizer
from model.config import clip_config, read_config, read_llava_config
from model.hub import resolve
from model.layouts import config_folder, tokenizer_folder


class Processor:
    """Tokenizer, template and image handling of a LLaVA folder.

    Args:
        template: a name of data/templates.py; None: the one that belongs to the checkpoint.
        aspect: "crop", "pad" or "anyres" (data/images.py); None: what belongs to the checkpoint. "pad" on a
            LLaVA-1.6 checkpoint shows one tile without a newline, as Re-Align does.
    Raises BadInput naming an unusable file, the unknown template or aspect.
    """

    def __init__(self, folder: Path | str, template: str | None = None, aspect: str | None = None):
        self.folder = config_folder(resolve(folder))
        config = read_llava_config(self.folder)
        self.tokenizer = TextTokenizer(tokenizer_folder(resolve(folder)))
        self.template = find_template(template or config.template)
        self.aspect, self.pinpoints = find_aspect(self.folder, config, aspect), config.image_grid_pinpoints
        self.preprocessing = read_preprocessing(self.folder, config.vision.image_size, self.aspect)
        self.eos_id = self.tokenizer.id(self.template.stop)
        self.before = self._encode(self.template.before)
        self.tokenizer.check_rows(config.text.vocab_size, [*self.before, self.eos_id])
        self.image_id = config.image_token_index
        self.patches = config.vision.num_patches
        self.window = config.text.max_position_embeddings  # tokens that the decoder takes
        self.prefix = [*self.before, *[self.image_id] * self.patches]
        self.tag = cut(self.template.after)[-1].rpartition("{prompt}")[2]  # " ASSISTANT:", before the answer
        self.tag_ids = self.tokenizer.encode(self.tag)
        refused = sorted({"<image>", *SPECIAL, *self.tokenizer.special}, reverse=True)  # the longer first
        self.refused = re.compile("|".join(map(re.escape, refused)))

    def image(self, reference: str, root: Path | str | None = None) -> View:
        """Reference -> tiles and rows."""
        return self.view(open_image(reference, root))

    def view(self, image: Image.Image) -> View:
        """RGB image -> tiles and rows, by `aspect`."""
        if self.aspect == "anyres":
            return anyres(image, self.pinpoints, self.preprocessing, self.patches)
        image = pad_to_square(image, self.preprocessing.fill) if self.aspect == "pad" else image
        return single(preprocess(image, self.preprocessing), self.patches)

    def image_tokens(self, reference: str, root: Path | str | None = None) -> int:
        """len(rows) of `image`, of the picture's header alone. BadInput as from `data.images.image_size`."""
        if self.aspect != "anyres":
            return self.patches
        return len(image_rows(image_size(reference, root), self.pinpoints, self.preprocessing.size, self.patches))

    def prompt(self, text: str, count: int | None = None) -> list[int]:
        """Question -> ids of everything in front of the answer.

        Args:
            count: image tokens, len(view.rows) of the picture; None: those of one tile.
        Raises BadInput on <image> or another special token in the text: the template places the picture.
        """
        image_tokens = [self.image_id] * (self.patches if count is None else count)
        after = self.template.after.format(prompt=self._plain(text))
        return [*self.before, *image_tokens, *self._encode(after)]

    def response(self, text: str) -> list[int]:
        """Answer -> ids, ending in the stop token; that alone for the empty answer. BadInput as in `prompt`."""
        ids = self._follow(self.template.answer.format(answer=self._plain(text))) if text else []
        return [*ids, self.eos_id]

    def opening(self, text: str) -> list[int]:
        """Beginning of an answer that is to be continued -> ids. BadInput as in `prompt`."""
        return self._follow(self.template.answer.partition("{answer}")[0] + self._plain(text)) if text else []

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens and without what the template puts behind an answer."""
        text = self.tokenizer.decode([i for i in ids if i != self.eos_id])
        return text.removesuffix(self.template.answer.partition("{answer}")[2])

    def _plain(self, text: str) -> str:
        """The text; BadInput when it holds a special token."""
        if found := self.refused.search(text):
            raise BadInput(f"text contains the special token {found.group()}: {text[:80]!r}")
        return text

    def _encode(self, text: str) -> list[int]:
        """Text with the template's special tokens -> ids; every part has its own dummy prefix."""
        read = self.tokenizer
        parts = [[read.id(part)] if part in SPECIAL else read.encode(part) for part in cut(text)]
        return sum(parts, [])

    def _follow(self, text: str) -> list[int]:
        """Ids of a text that stands behind the prompt: no dummy prefix of its own."""
        ids, count = self.tokenizer.encode(self.tag + text), len(self.tag_ids)
        if ids[:count] != self.tag_ids:
            raise BadInput(f"answer merges with the {self.tag!r} in front of it: {text[:80]!r}")
        return ids[count:]


class ClipProcessor:
    """Tokenizer and image handling of a CLIP folder."""

    def __init__(self, folder: Path | str):
        folder = resolve(folder)
        config = clip_config(read_config(folder), str(folder / "config.json"))
        self.tokenizer = TextTokenizer(folder)
        self.preprocessing = read_preprocessing(folder, config.vision.image_size)
        self.limit = config.text.max_position_embeddings
        names = ("<s>", "</s>") if self.tokenizer.core.token_to_id("<s>") is not None else CLIP_SPECIAL
        self.bos_id, self.eos_id = map(self.tokenizer.id, names)
        # eos_token_id = 2 is the old convention of pooling at the largest id (model/clip.py).
        pooled = config.text.vocab_size - 1 if config.text.eos_token_id == 2 else config.text.eos_token_id
        self.tokenizer.check_rows(config.text.vocab_size, [self.bos_id])
        if self.eos_id != pooled:
            raise BadInput(f"{folder}: the tokenizer ends a text with id {self.eos_id},"
                           f" the tower pools at {pooled}")

    def image(self, reference: str, root: Path | str | None = None) -> Tensor:
        """Reference -> (3, S, S) fp32."""
        return preprocess(open_image(reference, root), self.preprocessing)

    def text(self, text: str) -> list[int]:
        """Text -> ids with BOS and EOS; text beyond the tower's limit is cut, as CLIP's own tokenizer does."""
        ids = self.tokenizer.encode(text)
        return [self.bos_id, *ids[: self.limit - 2], self.eos_id]
