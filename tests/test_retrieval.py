"""Embedding and nearest-neighbour search."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from data.images import open_image
from data.processor import ClipProcessor
from model.checkpoint import DEFAULT_CLIP, load_clip
from model.clip import CLIP
from model.config import ClipConfig, ClipTextConfig, VisionConfig
from model.views import Preprocessing
from retrieval import cache
from retrieval.cache import cached_images, fingerprint
from retrieval.embed import embed_images, embed_texts
from retrieval.index import (
    Duplicates,
    approximate_neighbours,
    build_approximate_index,
    build_index,
    neighbours,
    recall,
    search,
)


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


def saved_again(image: Image.Image, path: Path, quality: int, side: int) -> None:
    image.resize((side, side), Image.Resampling.BICUBIC).save(path, quality=quality)


@pytest.fixture
def album(tmp_path) -> tuple[Path, list[str], np.ndarray]:
    """a.png, the same pixels as b.bmp, c.jpg of it at half the size, and other pictures d.png, e.png and f.png. Their
    vectors say otherwise: d's is next to c's, c's further from a's."""
    names = ["a.png", "b.bmp", "c.jpg", "d.png", "e.png", "f.png"]
    for name, scene in zip(names, (0, 0, 0, 1, 2, 3)):
        image = open_image(f"scene:{scene}")
        saved_again(image, tmp_path / name, quality=75, side=48) if name == "c.jpg" else image.save(tmp_path / name)
    angles = np.array([0, 0, 0.3, 0.31, 0.8, 1.2])
    return tmp_path, names, np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_a_picture_is_not_found_under_another_name(album):
    """Copies and near copies of the query are passed over, and the search goes on until there are k."""
    root, names, vectors = album
    duplicates = Duplicates(root=root)
    found = [[name for name, _ in hits] for hits in neighbours(names, vectors, 2, duplicates)]
    assert found[:3] == [["d.png", "e.png"]] * 3
    assert found[3:] == [["c.jpg", "e.png"], ["f.png", "d.png"], ["e.png", "d.png"]]  # of a, b and c only the nearest
    assert duplicates.found == {"copies": {("a.png", "b.bmp")},
                                "near copies": {("a.png", "c.jpg"), ("b.bmp", "c.jpg")}}
    everything = [name for name, _ in neighbours(names, vectors, 9, Duplicates(root=root))[0]]
    assert everything == ["d.png", "e.png", "f.png"]


def test_without_a_limit_only_equal_pixels_are_the_same_picture(album):
    root, names, vectors = album
    duplicates = Duplicates(1.1, root)
    found = [[name for name, _ in hits] for hits in neighbours(names, vectors, 2, duplicates)]
    assert found[0] == ["c.jpg", "d.png"] and duplicates.found == {"copies": {("a.png", "b.bmp")}, "near copies": set()}
    hits, share = approximate_neighbours(names * 20, np.tile(vectors, (20, 1)), 2, nprobe=1, lists=1,
                                         duplicates=Duplicates(1.1, root))
    assert [name for name, _ in hits[0]] == ["c.jpg", "d.png"] and share == 1


def test_the_default_limit_tells_copies_from_other_pictures(tmp_path):
    """Each of 30 scenes is the same as its copies and as no other scene; pictures of one colour are not the same."""
    same, names = Duplicates(root=tmp_path), [f"scene:{seed}" for seed in range(30)]
    for name in names:
        for quality, side in [(95, 96), (30, 96), (75, 192), (75, 48)]:
            copy = f"{name[6:]}-{quality}-{side}.jpg"
            saved_again(open_image(name), tmp_path / copy, quality, side)
            assert same(name, copy) and same(copy, name), copy
    assert not any(same(one, other) for one, other in itertools.combinations(names, 2))
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
    assert not same("red.png", "blue.png") and same("red.png", "red.png")


def test_a_single_picture_has_no_neighbour():
    assert neighbours(["a", "a"], unit(1, 4)[[0, 0]], 3) == [[], []]


@pytest.mark.parametrize("bad", [2.0, float("nan"), 0.0])
def test_vectors_that_are_not_unit_vectors(bad):
    vectors = unit(3, 4)
    vectors[1] *= bad
    with pytest.raises(ValueError, match="vector 1 has length"):
        build_index(vectors)


def test_every_query_needs_its_exclusions():
    with pytest.raises(ValueError, match="shorter"):
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


def test_approximate_index_finds_all_when_it_looks_everywhere():
    vectors = unit(2000, 16)
    index = build_approximate_index(vectors, nprobe=20, lists=20)
    assert index.nlist == 20 and recall(index, vectors, 5) == 1
    assert search(index, vectors[:50], 5, [{i} for i in range(50)]) == [
        [(row, pytest.approx(score, abs=1e-6)) for row, score in hits]
        for hits in search(build_index(vectors), vectors[:50], 5, [{i} for i in range(50)])]


def test_recall_is_what_the_approximate_index_misses():
    """More probes find more; the reported recall equals a count by hand over the same queries."""
    vectors = unit(2000, 16)
    found = [recall(build_approximate_index(vectors, nprobe, lists=40), vectors, 10) for nprobe in (1, 3, 40)]
    assert 0.2 < found[0] < found[1] < found[2] == 1
    index = build_approximate_index(vectors, 1, lists=40)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    hits = search(index, vectors, 10, [{i} for i in range(2000)])
    shares = [len({row for row, _ in found} & set(np.argsort(-line)[:10].tolist())) / 10
              for found, line in zip(hits, cosines)]
    assert recall(index, vectors, 10, queries=2000) == pytest.approx(np.mean(shares), abs=1e-3)


def test_approximate_neighbours():
    vectors = unit(1000, 16)
    names = [f"p{i}" for i in range(1000)] + ["p0", "p7"]
    vectors = np.concatenate([vectors, vectors[[0, 7]]])
    hits, share = approximate_neighbours(names, vectors, 4, nprobe=10, lists=10)
    exact = neighbours(names, vectors, 4)
    assert share == 1
    assert [[name for name, _ in each] for each in hits] == [[name for name, _ in each] for each in exact]
    first = approximate_neighbours(names, vectors, 4, nprobe=2)
    assert first[1] < 1 and first == approximate_neighbours(names, vectors, 4, nprobe=2)
    with pytest.raises(ValueError, match="nprobe 99: must be between 1 and the number of cells, 25"):
        approximate_neighbours(names, vectors, 4, nprobe=99)


@pytest.fixture(scope="module")
def tiny():
    return load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP)


@pytest.fixture
def embedded(monkeypatch):
    """The pictures that were really embedded, and after how many calls the run is interrupted."""
    log = {"pictures": [], "stop": None}

    def spy(references, *arguments, **options):
        if log["stop"] == 0:
            raise KeyboardInterrupt
        log["stop"] = log["stop"] and log["stop"] - 1
        log["pictures"] += references
        return embed_images(references, *arguments, **options)

    monkeypatch.setattr(cache, "embed_images", spy)
    return log


def test_embeddings_are_computed_once(tiny, tmp_path, embedded):
    scenes = [f"scene:{i}" for i in range(10)]
    asked = [*scenes, scenes[3]]
    embedded["stop"] = 2
    with pytest.raises(KeyboardInterrupt):
        cached_images(asked, *tiny, tmp_path / "c", shard=4)
    assert embedded["pictures"] == scenes[:8]
    embedded["stop"] = None
    vectors = cached_images(asked, *tiny, tmp_path / "c", shard=4)
    assert embedded["pictures"] == scenes  # the interrupted run's eight were kept
    assert vectors.dtype == np.float32 and np.allclose(vectors, embed_images(asked, *tiny), atol=1e-6)
    again = cached_images(asked[::-1], *tiny, tmp_path / "c")
    assert embedded["pictures"] == scenes and np.array_equal(again, vectors[::-1])
    assert cached_images([], *tiny, tmp_path / "c").shape == (0, vectors.shape[1])
    assert all(name.endswith(".safetensors") for name in os.listdir(tmp_path / "c"))


def test_a_changed_picture_or_model_is_embedded_again(tiny, tmp_path, embedded):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "p.png")
    first = cached_images(["p.png"], *tiny, tmp_path / "c", root=tmp_path)
    Image.new("RGB", (50, 30), "blue").save(tmp_path / "p.png")
    assert not np.allclose(cached_images(["p.png"], *tiny, tmp_path / "c", root=tmp_path), first)
    os.utime(tmp_path / "p.png", ns=(1, 1))
    cached_images(["p.png"], *tiny, tmp_path / "c", root=tmp_path)
    assert len(embedded["pictures"]) == 3
    cached_images(["p.png"], tiny[0].bfloat16(), tiny[1], tmp_path / "c", root=tmp_path)
    tiny[0].float()
    assert len(embedded["pictures"]) == 4
    with pytest.raises(ValueError, match="none.png: no such image"):
        cached_images(["none.png"], *tiny, tmp_path / "c", root=tmp_path)


def test_fingerprint(tiny):
    clip, processor = load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP)
    first = fingerprint(clip, processor)
    assert first == fingerprint(clip, ClipProcessor(DEFAULT_CLIP)) != fingerprint(clip.bfloat16(), processor)
    processor.preprocessing = Preprocessing(processor.preprocessing.size, (0.5, 0.5, 0.5))
    assert fingerprint(load_clip(DEFAULT_CLIP), processor) != first


def test_a_broken_shard(tiny, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="x.safetensors: not a shard"):
        cached_images(["scene:1"], *tiny, tmp_path)
    keys, vectors = np.zeros((2, 32), np.uint8), np.ones((2, 16), np.float32)
    for damage in ({"vectors": vectors[0]}, {"vectors": vectors[:1]}, {"vectors": vectors * np.nan},
                   {"vectors": vectors.astype(np.float64)}, {"keys": keys.astype(np.float32)}):
        save_file({"keys": keys, "vectors": vectors} | damage, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="x.safetensors: not a shard"):
            cached_images(["scene:1"], *tiny, tmp_path)
