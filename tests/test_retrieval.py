"""Embedding and nearest-neighbour search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.clip import CLIP
from model.config import ClipConfig, ClipTextConfig, VisionConfig
from retrieval.embed import embed_images, embed_texts
from retrieval.index import build_index, neighbours, search


def unit(n: int, width: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_search_agrees_with_brute_force():
    base, queries = unit(200, 16), unit(30, 16, seed=1)
    banned = [{i, 199 - i} for i in range(30)]
    hits = search(build_index(base), queries, 7, banned)
    for query, rows, hit in zip(queries, banned, hits):
        cosines = base @ query
        wanted = [row for row in np.argsort(-cosines) if row not in rows][:7]
        assert [row for row, _ in hit] == wanted
        assert np.allclose([score for _, score in hit], cosines[wanted], atol=1e-6)


def test_hand_made_neighbours():
    """East, north-east (cosine .7071 with both), north: the middle one is nearest to both ends."""
    vectors = np.array([[1, 0], [0.5**0.5, 0.5**0.5], [0, 1]], np.float32)
    first, second, third = neighbours(["e", "ne", "n"], vectors, 2)
    assert [name for name, _ in first] == ["ne", "n"] and [name for name, _ in third] == ["ne", "e"]
    assert [score for _, score in first] == pytest.approx([0.7071, 0.0], abs=1e-4)
    assert {name for name, _ in second} == {"e", "n"}


def test_a_picture_is_never_its_own_neighbour():
    """Reference "a" stands there three times; "b" has the same vector under another name and may be found."""
    vectors = unit(6, 8)
    vectors[[1, 4, 5]] = vectors[0]
    references = ["a", "b", "c", "d", "a", "a"]
    found = [[name for name, _ in hits] for hits in neighbours(references, vectors, 10)]
    assert all(name not in hits and len(hits) == 3 for name, hits in zip(references, found))
    assert all(len(set(hits)) == len(hits) for hits in found)
    assert found[0][0] == found[4][0] == "b" and found[1][0] == "a"


def test_a_single_picture_has_no_neighbour():
    assert neighbours(["a", "a"], unit(1, 4)[[0, 0]], 3) == [[], []]


@pytest.mark.parametrize("bad", [2.0, float("nan"), 0.0])
def test_vectors_that_are_not_unit_vectors(bad):
    vectors = unit(3, 4)
    vectors[1] *= bad
    with pytest.raises(ValueError, match="vector 1 has length"):
        build_index(vectors)


def test_every_query_needs_its_exclusions():
    with pytest.raises(ValueError, match="2 queries but 1 sets"):
        search(build_index(unit(3, 4)), unit(2, 4), 1, [set()])


class FakeProcessor:
    """Pixels and tokens made of the text itself."""

    def image(self, reference, root=None):
        return torch.full((3, 8, 8), float(len(reference))) + torch.arange(8.0)

    def text(self, text):
        return [1, *(3 + ord(letter) % 20 for letter in text), 31]


def small_clip() -> CLIP:
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                projection_dim=12)
    clip = CLIP(ClipConfig(VisionConfig(**size, image_size=8, patch_size=4),
                           ClipTextConfig(**size, vocab_size=32, eos_token_id=31), 12))
    for weight in clip.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return clip.eval()


@pytest.mark.parametrize("size", [1, 2, 64])
def test_embeddings_are_unit_vectors_whatever_the_batch_size(size):
    clip, names = small_clip(), ["x", "xx", "xxx", "xxxxx", "yy"]
    for embed in (embed_images, embed_texts):
        vectors = embed(names, clip, FakeProcessor(), batch_size=size)
        assert vectors.shape == (5, 12) and vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert np.allclose(vectors, embed(names, clip, FakeProcessor(), batch_size=5), atol=1e-5)
        assert embed([], clip, FakeProcessor()).shape == (0, 12)
