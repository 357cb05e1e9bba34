"""Between people and tensors: texts to token ids, image references to pixels, and back.

The template is the one that the checkpoint was trained with (model/families). The text is cut at <image> and at
special tokens and its pieces are tokenised separately, as LLaVA does, with the image tokens put between them, so their
count can never depend on the tokenizer. The response's ids are those that follow the prompt's when both are tokenised
as one text; the prompt's ids are the same whatever the response, which prefix sharing relies on.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from common import BadInput
from data.images import IMAGE, image_size, open_image, references
from data.records import continued
from data.tokenizer import CLIP_SPECIAL, TextTokenizer
from model.config import clip_config, read_config
from model.families import family_of
from model.hub import resolve
from model.layouts import config_folder, tokenizer_folder
from model.settings import read_preprocessing
from model.views import View, no_image, preprocess


class Processor:
    """Tokenizer, template and image handling of a model's folder.

    Args:
        template: a name of model.families.TEMPLATES; None: the one that belongs to the checkpoint.
        aspect: of the family's ways to show an image, for example "crop", "pad" or "anyres" of LLaVA; None: what
            belongs to the checkpoint.
    Raises BadInput naming an unusable file, the unknown template or aspect.
    """

    def __init__(self, folder: Path | str, template: str | None = None, aspect: str | None = None):
        self.folder = config_folder(resolve(folder))
        self.family = family_of(self.folder)
        self.config = config = self.family.read(self.folder)
        self.tokenizer = TextTokenizer(tokenizer_folder(resolve(folder)))
        name, known = template or config.template, self.family.TEMPLATES
        if name not in known:
            raise BadInput(f"no template {name!r} (there are: {', '.join(known)})")
        self.template = known[name]
        self.aspect = self.family.find_aspect(self.folder, config, aspect)
        self.preprocessing = self.family.preprocessing(self.folder, config, self.aspect)
        self.question = self.family.question_reader(self.folder)  # question -> what `VLM.connect` reads of it
        self.eos_id = self.tokenizer.id(self.template.stop)
        self.image_id = config.image_token_index
        self.patches = config.tile_tokens  # image tokens of a tile
        self.window = config.text.max_position_embeddings  # tokens that the decoder takes
        before = self._encode(self.template.before + self.template.image.partition(IMAGE)[0])
        self.tokenizer.check_rows(config.text.vocab_size, [*before, self.eos_id])
        self.prefix = [*before, *[self.image_id] * self.patches]
        self.tag = self._cut(self.template.after)[-1].rpartition("{prompt}")[2]  # " ASSISTANT:", before the response
        self.tag_ids = self.tokenizer.encode(self.tag)
        self.tag_text = self.tokenizer.decode(self.tag_ids)
        refused = sorted({IMAGE, *self.family.SPECIAL, *self.tokenizer.special}, reverse=True)  # the longer first
        self.refused = re.compile("|".join(map(re.escape, refused)))

    def image(self, reference: str | None, root: Path | str | None = None) -> View:
        """Reference -> tiles and rows; None -> a view of no image, for a question without one."""
        return no_image(self.preprocessing.size) if reference is None else self.view(open_image(reference, root))

    def show(self, images: list, root: Path | str | None = None) -> tuple[list[View], list[tuple[int, ...]]]:
        """What prompts show, each distinct image once.

        Args:
            images: of each prompt a reference, a list of several, or None.
        Returns: the views, and for each prompt the numbers of its views.
        """
        numbers: dict[str | None, int] = {}
        shows = [tuple(numbers.setdefault(name, len(numbers)) for name in references(image)) for image in images]
        return [self.image(name, root) for name in numbers], shows

    def questions(self, images: list, texts: Sequence[str], root: Path | str | None = None) -> dict[str, list]:
        """Images (references, lists of several, or None) and questions -> arguments of `model.generate.read`."""
        views, shows = self.show(images, root)
        prompts = [self.prompt(text, [len(views[i].rows) for i in shown]) for text, shown in zip(texts, shows)]
        return dict(views=views, prompts=prompts, shows=shows, questions=[self.question(text) for text in texts])

    def view(self, image: Image.Image) -> View:
        """RGB image -> tiles and rows, by `aspect`."""
        return self.family.view(image, self.aspect, self.preprocessing, self.config)

    def image_tokens(self, reference: str, root: Path | str | None = None) -> int:
        """len(rows) of `image`, of the image's header alone. BadInput as from `data.images.image_size`."""
        size = partial(image_size, reference, root)
        return self.family.image_tokens(size, self.aspect, self.preprocessing, self.config)

    def prompt(self, text: str, count: int | Sequence[int] | None = None) -> list[int]:
        """Question -> ids of everything before the response.

        Args:
            text: <image> in it is the place of an image if there are several, and as many marks; else the template
                places them.
            count: image tokens, len(view.rows) of the image or of each of several; None: those of one tile; 0: a
                question without an image.
        Raises BadInput on another <image> or special token in the text, and on more images than the family takes.
        """
        counts = [self.patches] if count is None else [count] if isinstance(count, int) else count
        counts = [n for n in counts if n]  # a view of no image has none
        if len(counts) > 1 and not self.family.SEVERAL_IMAGES:
            raise BadInput(f"{len(counts)} images, {self.config.model_type} takes one")
        marked = len(counts) > 1 and text.count(IMAGE) == len(counts)
        shown = "" if marked else self.template.image * len(counts)
        parts = map(self._plain, text.split(IMAGE) if marked else [text])
        question = self.template.image.strip().join(parts)
        return self._encode(self.template.before + shown + self.template.after.format(prompt=question), counts)

    def response(self, text: str) -> list[int]:
        """Response -> ids, ending in the stop token; that alone for the empty one. BadInput as in `prompt`."""
        ids = self._follow(self.template.answer.format(answer=self._plain(text))) if text else []
        return [*ids, self.eos_id]

    def opening(self, text: str) -> list[int]:
        """Beginning of a response that is to be continued -> ids; spaces at its end are left out, as they belong to the
        word that follows. BadInput as in `prompt`."""
        text = self._plain(text.rstrip(" "))
        return self._follow(self.template.answer.partition("{answer}")[0] + text) if text else []

    def continuation(self, context: str, text: str) -> list[int]:
        """What comes after the beginning `context` of a response -> ids, no stop token: the response may go on.

        After `opening(context)` they are the ids of both as one string, so that all continuations of a context share
        its ids. Raises BadInput where there is no such place to cut, as the tokenizer merges the end of the context
        with what follows, and as `prompt` does.
        """
        start, ids = self.opening(context), self.opening(continued(context, text))
        if ids[: len(start)] != start or len(ids) == len(start):
            raise BadInput(f"answer merges with the end of its context, {context[-40:]!r}: {text[:80]!r}")
        return ids[len(start) :]

    def decode(self, ids: list[int]) -> str:
        """Ids -> text without special tokens and without what the template puts around a response."""
        # After the tag, because some tokenizers take a blank off the beginning of what they decode and some do not.
        text = self.tokenizer.decode([*self.tag_ids, *(i for i in ids if i != self.eos_id)])
        before, _, after = self.template.answer.partition("{answer}")
        return text.removeprefix(self.tag_text).removeprefix(before).removesuffix(after)

    def _plain(self, text: str) -> str:
        """The text; BadInput when it holds a special token."""
        if found := self.refused.search(text):
            raise BadInput(f"text contains the special token {found.group()}: {text[:80]!r}")
        return text

    def _cut(self, text: str) -> list[str]:
        return cut(text, (IMAGE, *self.family.SPECIAL))

    def _encode(self, text: str, counts: Sequence[int] = ()) -> list[int]:
        """Text with the template's special tokens, and <image> for the image tokens of each image -> ids; every part
        has its own dummy prefix."""
        ids, images = [], iter(counts)
        for part in self._cut(text):
            if part == IMAGE:
                ids += [self.image_id] * next(images)
            else:
                ids += [self.tokenizer.id(part)] if part in self.family.SPECIAL else self.tokenizer.encode(part)
        return ids

    def _follow(self, text: str) -> list[int]:
        """Ids of a text that comes after the prompt: no dummy prefix of its own."""
        ids, count = self.tokenizer.encode(self.tag + text), len(self.tag_ids)
        if ids[:count] != self.tag_ids:
            raise BadInput(f"answer merges with the {self.tag!r} before it: {text[:80]!r}")
        return ids[count:]


def cut(text: str, special: tuple[str, ...]) -> list[str]:
    """Special tokens and the texts between them, in order; no part is empty."""
    return [part for part in re.split(f"({'|'.join(map(re.escape, special))})", text) if part]


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
            raise BadInput(f"{folder}: the tokenizer ends a text with id {self.eos_id}, the tower pools at {pooled}")

    def image(self, reference: str, root: Path | str | None = None) -> Tensor:
        """Reference -> (3, S, S) fp32."""
        return preprocess(open_image(reference, root), self.preprocessing)

    def text(self, text: str) -> list[int]:
        """Text -> ids with BOS and EOS; text beyond the tower's limit is cut, as CLIP's own tokenizer does."""
        ids = self.tokenizer.encode(text)
        return [self.bos_id, *ids[: self.limit - 2], self.eos_id]
