"""Exact nearest neighbours by cosine: FAISS IndexFlatIP over unit vectors.

The library: Douze et al. 2024, "The Faiss library", arXiv 2401.08281. Re-Align searches the training set for
the pictures most similar to one of the training set, so no picture may be found as its own neighbour.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import faiss
import numpy as np


def build_index(vectors: np.ndarray) -> faiss.IndexFlatIP:
    """Index over the rows of `vectors` (N, E). ValueError naming the first row whose length is not 1."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 1e-2))  # written so that NaN is bad; the slack is for bf16
    if len(bad):
        raise ValueError(f"vector {bad[0]} has length {lengths[bad[0]]:.4g}: inner product = cosine needs 1")
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def search(index: faiss.IndexFlatIP, queries: np.ndarray, k: int,
           exclude: Sequence[Collection[int]]) -> list[list[tuple[int, float]]]:
    """The `k` nearest rows of every query, best first, as (row, cosine); fewer when the index is too small.

    Args:
        queries: (Q, E) unit vectors.
        exclude: for each query the rows that must not be found, among them the query's own row.
    """
    if len(exclude) != len(queries):
        raise ValueError(f"{len(queries)} queries but {len(exclude)} sets of excluded rows")
    deep = min(index.ntotal, k + max((len(rows) for rows in exclude), default=0))
    scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), max(deep, 1))  # (Q, deep)
    hits = []
    for row_ids, row_scores, banned in zip(rows.tolist(), scores.tolist(), exclude):
        found = [(row, score) for row, score in zip(row_ids, row_scores) if row >= 0 and row not in banned]
        hits.append(found[:k])
    return hits


def neighbours(references: Sequence[str], vectors: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
    """For every picture its `k` nearest other pictures of the same list, as (reference, cosine).

    Args:
        references: N picture references; one picture may occur several times (several questions about it).
        vectors: (N, E) their unit vectors.

    Every picture enters the index once, so neither the query nor its repetitions are ever found, and no
    neighbour is returned twice.
    """
    first = {reference: row for row, reference in reversed(list(enumerate(references)))}
    unique = list(dict.fromkeys(references))
    place = {reference: row for row, reference in enumerate(unique)}
    base = np.asarray(vectors)[[first[reference] for reference in unique]]  # (U, E)
    hits = search(build_index(base), vectors, k, [{place[reference]} for reference in references])
    return [[(unique[row], score) for row, score in found] for found in hits]
