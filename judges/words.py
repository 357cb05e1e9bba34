"""FiSAO's verifier: CLIP scores each object word that an answer says against the answer's image.

FiSAO, C. Cui et al., ICLR 2025, arXiv 2410.14148; what its scores become is in losses/fisao.py. Needs the
whole CLIP (both towers and projections), of which LLaVA uses the vision tower only. All words of
data/entities.txt are embedded once and every image once, so scoring is a gather and a dot product.

    s(o, v) = scale max(cos(text(o), image(v)), 0)                                          losses/fisao.py

Reconstructed: a word is embedded alone, without a sentence around it (`template`); CLIP sees the image as
CLIP preprocesses it.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.mentions import load_entities, mentions
from data.processor import ClipProcessor, Processor
from data.sentences import sentences
from judges.known import KnownObjects
from losses.fisao import verifier_scores
from model.clip import CLIP
from retrieval.embed import embed_images, embed_texts


class Scored(NamedTuple):
    """Mentions of a batch of answers; mention i covers the tokens starts[i] .. stops[i] - 1 of answer rows[i]."""

    scores: Tensor  # (N,)
    rows: Tensor  # (N,) long
    starts: Tensor  # (N,) long
    stops: Tensor  # (N,) long
    entities: list[str]
    correct: Tensor  # (N,) long: 1 the image shows it, 0 it does not, -1 unknown


class Verifier:
    """Scores answers (token ids of `processor`) to images.

    Args:
        scale: 250 is 100 CLIPScore, 100 is CLIP's logit; the unit of everything that is calibrated with it.
    """

    def __init__(self, clip: CLIP, clip_processor: ClipProcessor, processor: Processor, root: Path | None = None,
                 known: KnownObjects | None = None, *, scale: float = 250.0, template: str = "{}"):
        self.processor, self.known, self.scale = processor, known or KnownObjects(), scale
        self.entities = load_entities()
        # One image at a time: the last bits depend on the batch, and a resumed run meets its images in others.
        self.image = cache(lambda reference: torch.from_numpy(
            embed_images([reference], clip, clip_processor, root=root))[0])  # (E,)
        self.embed = lambda texts: torch.from_numpy(embed_texts(texts, clip, clip_processor))  # (N, E)
        self.place = {word: row for row, word in enumerate(self.entities)}
        self.words = self.embed([template.format(word) for word in self.entities])  # (W, E)

    @property
    def unit(self) -> str:
        """What the scores are, for the record."""
        return f"{self.scale:g} * max(cos, 0)"

    def __call__(self, references: list[str], answers: list[list[int]]) -> Scored:
        """Image reference and token ids of each answer -> scores of all its object mentions, on the CPU."""
        found = [(row, m) for row, ids in enumerate(answers)
                 for m in mentions(ids, self.processor.decode, self.entities)]
        rows, starts, stops = (torch.tensor(x, dtype=torch.long) for x in (
            [row for row, _ in found], [m.start for _, m in found], [m.stop for _, m in found]))
        words = self.words[[self.place[m.word] for _, m in found]]  # (N, E)
        images = torch.stack([self.image(references[row]) for row, _ in found]) if found else words  # (N, E)
        scores = verifier_scores(words, images, scale=self.scale)
        entities = [m.entity for _, m in found]
        return Scored(scores, rows, starts, stops, entities, self.correct(references, rows, entities))

    def correct(self, references: list[str], rows: Tensor, entities: list[str]) -> Tensor:
        """The labels of Eq. 7, as CHAIR's (`Scored.correct`): entity i was said of image references[rows[i]]."""
        known = {reference: self.known(reference) for reference in set(references)}
        labels = []
        for row, entity in zip(rows.tolist(), entities, strict=True):
            shown, classes = known[references[row]] or ((), ())
            labels.append(int(entity in shown) if entity in classes else -1)
        return torch.tensor(labels, dtype=torch.long)  # (N,)

    def sentences(self, references: list[str], texts: list[str]) -> tuple[Tensor, list[str], list[str]]:
        """Scores (N,) of all answers' sentences against their images, the sentences and their images."""
        lines = [sentences(text) for text in texts]
        shown = [reference for reference, own in zip(references, lines, strict=True) for _ in own]
        said = [line for own in lines for line in own]
        images = torch.stack([self.image(reference) for reference in shown])  # (N, E)
        return verifier_scores(self.embed(said), images, scale=self.scale), said, shown
