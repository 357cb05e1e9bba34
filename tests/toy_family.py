"""A family as small as one can be, for tests/test_families.py: what a new file of model/families has to hold.

It takes LLaVA's tower, decoder and file handling and changes what InstructBLIP and Janus-Pro change: image tokens depend
on the question (four queries read the patches, each shifted by the words of the question), the prompt begins with them,
and a token opens and another closes the image.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.config import Template, read_config
from model.families.llava import (  # noqa: F401  the names that a family has to have, unchanged
    canonical,
    find_aspect,
    llava_config,
    may_ignore,
    peft_name,
    preprocessing,
    saved_name,
    settings_folder,
    tensors,
)
from model.llava import Llava, LlavaConfig
from model.views import Preprocessing, View, preprocess, single

QUERIES = 4
SEVERAL_IMAGES = False
COMPANIONS = ("reader/vocabulary.txt",)  # of a tokenizer for questions
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")  # of the small tokenizer: <unk> opens an image, <pad> closes it
TEMPLATES = {"toy": Template("", "<unk><image><pad>", "<s>Q {prompt} A", " {answer}", "</s>")}


@dataclass(frozen=True)
class ToyConfig(LlavaConfig):
    @property
    def tile_tokens(self) -> int:
        return QUERIES


class Model(Llava):
    def __init__(self, config: ToyConfig):
        super().__init__(config)
        width = config.vision.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(QUERIES, width))
        self.words = nn.Embedding(256, width)
        self.calls = []  # for the test: prompts that were read

    def connect(self, features: Tensor, rows: Tensor, questions: list[tuple[int, ...]]) -> Tensor:
        """features (N, P, C), rows (I,) -> (I, D): once for each prompt with an image."""
        self.calls.append(len(questions))
        shown = features[rows.view(len(questions), QUERIES)[:, 0] // QUERIES]  # (G, P, C)
        words = [self.words(torch.tensor(question, device=rows.device)).mean(0) for question in questions]
        queries = self.query_tokens + torch.stack(words)[:, None]  # (G, 4, C)
        weights = (queries @ shown.mT).softmax(-1)  # (G, 4, P)
        return self.multi_modal_projector(weights @ shown).flatten(0, 1)


def read(folder: Path) -> ToyConfig:
    raw = read_config(folder)
    plain = llava_config({**raw, "model_type": "llava"})
    return ToyConfig(**vars(replace(plain, model_type="toy", template="toy")))


def converted_config(config: ToyConfig, raw: dict) -> None:
    return None


def question_reader(folder: Path):
    vocabulary = (folder / "reader" / "vocabulary.txt").read_text()
    return lambda text: tuple(vocabulary.index(letter) for letter in text)


def view(image, aspect: str, how: Preprocessing, config: ToyConfig) -> View:
    return single(preprocess(image, how), QUERIES)


def image_tokens(size, aspect: str, how: Preprocessing, config: ToyConfig) -> int:
    return QUERIES
