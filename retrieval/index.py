"""Nearest neighbours by cosine with FAISS: exact (IndexFlatIP over unit vectors), or approximate.

The library: Douze et al. 2024, "The Faiss library", arXiv 2401.08281. Re-Align searches the training set for
the images most similar to one of the training set, so no image may be found as its own neighbour. Data sets hold
the same photograph under several names (COCO 2014 and 2017, Visual Genome), so identity is content, not name:
`Duplicates` says which hits show the same image, and the search goes on past them.

The approximate index (IndexIVFFlat) sorts the vectors into `lists` k-means cells and looks into the
`nprobe` cells nearest to the query only, about lists / nprobe times faster. What that misses is measured,
not assumed: `recall` compares with the exact index. Exact search costs about 6 ms a query among 100,000
vectors of 768 on one core, so the approximate one is for larger sets.
"""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import faiss
import numpy as np
from PIL import Image

from common import BadInput
from data.images import open_image


def build_index(vectors: np.ndarray) -> faiss.IndexFlatIP:
    """Index over the rows of `vectors` (N, E). BadInput naming the first row whose length is not 1."""
    vectors = _unit_rows(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def build_approximate_index(vectors: np.ndarray, nprobe: int, lists: int | None = None) -> faiss.IndexIVFFlat:
    """Index over the rows of `vectors` (N, E) in `lists` cells, of which a search looks into `nprobe`.

    Args:
        lists: reconstructed: None takes 4 sqrt(N), at most N / 39 (FAISS asks for 39 vectors a cell).

    The cells are the same in every run. BadInput on a row whose length is not 1, or more probes than cells.
    """
    vectors = _unit_rows(vectors)
    lists = lists or max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
    if not 1 <= nprobe <= lists:
        raise BadInput(f"nprobe {nprobe}: must be between 1 and the number of cells, {lists}")
    width = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.train(vectors)
    index.add(vectors)
    index.nprobe = nprobe
    return index


def recall(index: faiss.Index, vectors: np.ndarray, k: int, queries: int = 256) -> float:
    """Share of the true `k` nearest of a row that `index` finds, over `queries` evenly spaced rows.

    Rows are their own nearest neighbour and do not count as found.
    """
    rows = np.unique(np.linspace(0, len(vectors) - 1, min(queries, len(vectors))).astype(int)).tolist()
    asked, own = np.asarray(vectors)[rows], [{row} for row in rows]
    true = search(build_index(vectors), asked, k, own)
    found = search(index, asked, k, own)
    hits = sum(len({row for row, _ in a} & {row for row, _ in b}) for a, b in zip(true, found))
    return hits / max(1, sum(len(each) for each in true))


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))  # written so that NaN is bad; the slack is for bf16
    if len(bad):
        raise ValueError(f"vector {bad[0]} has length {lengths[bad[0]]:.4g}: inner product = cosine needs 1")
    return vectors


def search(index: faiss.Index, queries: np.ndarray, k: int,
           exclude: Sequence[Collection[int]]) -> list[list[tuple[int, float]]]:
    """The `k` nearest rows of every query, best first, as (row, cosine); fewer when the index is too small.

    Args:
        queries: (Q, E) unit vectors.
        exclude: for each query the rows that must not be found, among them the query's own row.
    """
    deep = min(index.ntotal, k + max((len(rows) for rows in exclude), default=0))
    scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), max(deep, 1))  # (Q, deep)
    return [[(row, score) for row, score in zip(*found) if row >= 0 and row not in banned][:k]
            for *found, banned in zip(rows.tolist(), scores.tolist(), exclude, strict=True)]


class Duplicates:
    """Which images are the same one: those of equal pixels, or whose thumbnails have a cosine of at least `limit`.

    A thumbnail is 8 x 8 pixels less their mean; the embeddings' cosine does not tell copies from similar images. Of
    200 scenes as JPEG of quality 75, 30, or 75 at half the size, thumbnails have at least .9994, .9978 and .9957, the
    nearest two of 4000 scenes .9943; embeddings have from .81, .62 and .46, the nearest two of 600 scenes .98.
    Cropped, turned and mirrored copies are other images.

    Args:
        limit: reconstructed. Above 1, only equal pixels count.
        root: folder that relative paths start from.
    """

    def __init__(self, limit: float = 0.995, root: Path | None = None):
        self.limit, self.root = limit, root
        self.content: dict[str, tuple[bytes, np.ndarray]] = {}  # reference -> SHA-256 of the pixels, thumbnail
        self.found: dict[str, set[tuple[str, str]]] = {"copies": set(), "near copies": set()}

    def __call__(self, one: str, other: str) -> bool:
        """Whether two references show the same image; remembered in `found`."""
        (digest, thumbnail), (other_digest, other_thumbnail) = self._content(one), self._content(other)
        copy = digest == other_digest
        same = copy or float(thumbnail @ other_thumbnail) >= self.limit
        if same:
            self.found["copies" if copy else "near copies"].add((min(one, other), max(one, other)))
        return same

    def _content(self, reference: str) -> tuple[bytes, np.ndarray]:
        if reference not in self.content:
            image = open_image(reference, self.root)
            digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
            small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float32).ravel()
            small -= small.mean()
            self.content[reference] = digest, small / max(float(np.linalg.norm(small)), 1e-6)  # zeros if of one colour
        return self.content[reference]


def neighbours(references: Sequence[str], vectors: np.ndarray, k: int, duplicates: Duplicates | None = None,
               index: faiss.Index | None = None) -> list[list[tuple[str, float]]]:
    """For every image its `k` nearest other images of the same list, as (reference, cosine).

    Args:
        references: N image references; one image may occur several times (several questions about it).
        vectors: (N, E) their unit vectors.
        duplicates: which of them are the same image under another name; None: none.
        index: over the vectors of `_distinct`; None: the exact one.

    Every image enters the index once, so neither the query nor its repetitions are ever found. Duplicates of the
    query are passed over, and of images that are duplicates of each other the nearest is returned.
    """
    unique, base = _distinct(references, vectors)
    index = build_index(base) if index is None else index
    result: dict[int, list[tuple[int, float]]] = {}
    waiting, deep = list(range(len(unique))), k
    while waiting:  # searches deeper where the first hits were duplicates, until each has k or nothing is left
        hits = search(index, base[waiting], deep, [{row} for row in waiting])
        short = []
        for row, found in zip(waiting, hits):
            kept = _without_duplicates(row, found, unique, duplicates) if duplicates else found
            result[row] = kept[:k]
            if len(kept) < k and len(found) == deep:  # there may be more
                short.append(row)
        waiting, deep = short, 2 * deep
    place = {reference: row for row, reference in enumerate(unique)}
    return [[(unique[row], score) for row, score in result[place[reference]]] for reference in references]


def approximate_neighbours(references: Sequence[str], vectors: np.ndarray, k: int, nprobe: int,
                           lists: int | None = None, duplicates: Duplicates | None = None,
                           ) -> tuple[list[list[tuple[str, float]]], float]:
    """`neighbours` by an approximate index, and the measured recall of that index at k."""
    _, base = _distinct(references, vectors)
    index = build_approximate_index(base, nprobe, lists)
    return neighbours(references, vectors, k, duplicates, index), recall(index, base, k)


def _distinct(references: Sequence[str], vectors: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Every image once, with its vector: U references, (U, E)."""
    first = {reference: row for row, reference in reversed(list(enumerate(references)))}
    unique = list(dict.fromkeys(references))
    return unique, np.asarray(vectors)[[first[reference] for reference in unique]]


def _without_duplicates(query: int, found: list[tuple[int, float]], unique: list[str],
                        duplicates: Duplicates) -> list[tuple[int, float]]:
    kept: list[tuple[int, float]] = []
    for row, score in found:
        if not any(duplicates(unique[other], unique[row]) for other in (query, *(other for other, _ in kept))):
            kept.append((row, score))
    return kept
