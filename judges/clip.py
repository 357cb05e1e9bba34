"""CLIP as judge, by likeness of images and texts: reconstructed scores, for photographs without a description."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.processor import ClipProcessor
from data.sentences import sentences
from judges.scores import Judge, Score
from model.clip import CLIP
from retrieval.embed import embed_images, embed_texts

Similarity = Callable[[list[str], list[str]], list[float]]  # two lists of texts -> cosines


def clip_judge(clip: CLIP, processor: ClipProcessor, *, batch_size: int = 64, root: Path | None = None) -> Judge:
    """A judge by likeness: mean cosine between the image and the sentences of an answer. The mean, not AdaViP's sum,
    so that more sentences are no merit."""

    def judge(records: list[dict], answers: list[list[str]]) -> list[list[Score]]:
        images = embed_images([record["image"] for record in records], clip, processor,
                              batch_size=batch_size, root=root)  # (M, E)
        lines = iter(embed_sentences([answer for texts in answers for answer in texts], clip, processor))
        return [[Score(round(float((next(lines) @ image).mean()), 6)) for _ in texts]
                for image, texts in zip(images, answers, strict=True)]

    return judge


def clip_similarity(clip: CLIP, processor: ClipProcessor) -> Similarity:
    """A `similarity`: cosine of the mean CLIP embeddings of the sentences of two texts."""

    def vectors(texts: list[str]) -> np.ndarray:
        means = np.stack([lines.mean(axis=0) for lines in embed_sentences(texts, clip, processor)])  # (N, E)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    return lambda left, right: (vectors(left) * vectors(right)).sum(axis=1).tolist() if left else []


def embed_sentences(texts: list[str], clip: CLIP, processor: ClipProcessor) -> list[np.ndarray]:
    """Unit vectors of the sentences of each text, (its sentences, E); one pass of the text tower for all."""
    said = [sentences(text) for text in texts]
    rows = embed_texts([sentence for lines in said for sentence in lines], clip, processor)
    return np.split(rows, np.cumsum([len(lines) for lines in said]))[:-1]
