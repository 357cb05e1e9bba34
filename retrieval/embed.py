"""Unit vectors of images and texts in the space of a CLIP model, as numpy arrays for a search index.

For retrieval Re-Align names openai/clip-vit-large-patch14 (224 px) but not the feature; this is the projected
embedding, the one that CLIP's cosine is defined on.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.processor import ClipProcessor
from model.clip import CLIP


@torch.no_grad()
def embed_images(references: list[str], clip: CLIP, processor: ClipProcessor, *, batch_size: int = 64,
                 root: Path | None = None, progress: str = "") -> np.ndarray:
    """Image references -> float32 (N, E), rows of length 1, in the given order.

    Args:
        root: folder that relative file paths start from.
        progress: name of a progress bar with the remaining time; "" shows none.
    """
    weight = clip.visual_projection.weight  # (E, D)
    rows = [np.zeros((0, len(weight)), np.float32)]
    with tqdm(total=len(references), desc=progress, disable=None if progress else True) as bar:
        for start in range(0, len(references), batch_size):
            batch = references[start : start + batch_size]
            pixels = torch.stack([processor.image(reference, root) for reference in batch])  # (B, 3, S, S)
            rows.append(clip.image_embeddings(pixels.to(weight.device, weight.dtype)).float().cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(rows)


@torch.no_grad()
def embed_texts(texts: list[str], clip: CLIP, processor: ClipProcessor, *, batch_size: int = 256) -> np.ndarray:
    """Texts -> float32 (N, E), rows of length 1. The processor cuts a text that is too long for the tower."""
    rows = [np.zeros((0, len(clip.text_projection.weight)), np.float32)]
    for start in range(0, len(texts), batch_size):
        ids = [processor.text(text) for text in texts[start : start + batch_size]]
        rows.append(clip.text_embeddings(ids).float().cpu().numpy())
    return np.concatenate(rows)
