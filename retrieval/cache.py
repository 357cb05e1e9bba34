"""Image embeddings kept on disk: an interrupted run goes on where it was, a repeated one embeds nothing.

A folder of shards. A shard is one safetensors file with two tensors,

    keys       (n, 32) uint8    SHA-256 of what the embedding depends on
    vectors    (n, E) float32   rows of length 1

where the key covers the vision tower's weights, the preprocessing and the image: of a file its path, size
and time of change, of a drawn scene its reference. So a changed image, another model or another precision
is embedded again, and one folder may serve several models. Shards are written whole or not at all, each as
soon as it is full; nothing is ever deleted.
"""

import hashlib
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from common import BadInput, written_whole
from data.processor import ClipProcessor
from model.clip import CLIP
from retrieval.embed import embed_images


def cached_images(references: list[str], clip: CLIP, processor: ClipProcessor, folder: Path | str, *,
                  shard: int = 1024, batch_size: int = 64, root: Path | None = None,
                  progress: str = "") -> np.ndarray:
    """`embed_images` that keeps what it computes: image references -> float32 (N, E), rows of length 1.

    Args:
        folder: of the shards.
        shard: images after which a shard is written; an interruption loses fewer than so many.
        root: folder that relative file paths start from.

    Each distinct image is embedded once. Raises BadInput naming a missing image or an unreadable shard.
    """
    folder = Path(folder)
    model = fingerprint(clip, processor)
    keys = {reference: image_key(model, reference, root) for reference in dict.fromkeys(references)}
    width = len(clip.visual_projection.weight)
    known = _read_shards(folder, width)
    missing = [reference for reference, key in keys.items() if key not in known]
    with tqdm(total=len(missing), desc=progress, disable=None if progress else True) as bar:
        for start in range(0, len(missing), shard):
            part = missing[start : start + shard]
            vectors = embed_images(part, clip, processor, batch_size=batch_size, root=root)
            _write_shard(folder, [keys[reference] for reference in part], vectors)
            known |= {keys[reference]: vector for reference, vector in zip(part, vectors)}
            bar.update(len(part))
    return np.array([known[keys[reference]] for reference in references], np.float32).reshape(-1, width)


def fingerprint(clip: CLIP, processor: ClipProcessor) -> bytes:
    """SHA-256 of what turns pixels into an embedding: weights, their names, types, shapes; preprocessing."""
    digest = hashlib.sha256(repr(astuple(processor.preprocessing)).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        if name.startswith(("vision_model", "visual_projection")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def image_key(model: bytes, reference: str, root: Path | None = None) -> bytes:
    """Key of an image's embedding. BadInput naming a file that is not there."""
    what = reference
    if not reference.startswith("scene:"):
        path = Path(root or ".") / reference
        try:
            state = path.stat()
        except OSError:
            raise BadInput(f"{path}: no such image") from None
        what = f"{path.resolve()} {state.st_size} {state.st_mtime_ns}"
    return hashlib.sha256(model + what.encode()).digest()


def _read_shards(folder: Path, width: int) -> dict[bytes, np.ndarray]:
    """Key -> vector of every shard; those of models with other widths are left out."""
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = load_file(path)
            keys, vectors = found["keys"], found["vectors"]
        except (SafetensorError, KeyError, TypeError, OSError) as error:
            raise BadInput(f"{path}: not a shard of embeddings ({error}); delete it") from None
        kinds = keys.dtype, vectors.dtype, keys.ndim, vectors.ndim
        if kinds != (np.uint8, np.float32, 2, 2) or len(keys) != len(vectors) or not np.isfinite(vectors).all():
            raise BadInput(f"{path}: not a shard of embeddings (keys or vectors of another kind); delete it")
        if vectors.shape[1] == width:
            known |= {key.tobytes(): vector for key, vector in zip(keys, vectors)}
    return known


def _write_shard(folder: Path, keys: list[bytes], vectors: np.ndarray) -> None:
    rows = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
    path = folder / f"{hashlib.sha256(rows.tobytes()).hexdigest()[:24]}.safetensors"
    with written_whole(path) as temporary:
        save_file({"keys": rows.copy(), "vectors": np.ascontiguousarray(vectors, np.float32)}, temporary)
