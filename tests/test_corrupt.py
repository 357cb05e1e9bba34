"""Corrupted pictures and the pairs made of them: POVID's noise, mDPO's crop."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from data import scenes
from data.corrupt import add_noise, crop, crop_window, hide, sample_seed, signal_shares, to_image, to_pixels
from data.derived import file_name, store
from data.images import open_image
from data.records import read_pairs, write_jsonl
from pairs.mdpo import crop_pairs
from pairs.povid import noise_pairs


def plain(value: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3)


def test_noise_schedule():
    """sqrt(abar) / noise std: .99829 / .05841 at 100, .86302 / .50517 at 500, .28504 / .95851 at 999."""
    shares = signal_shares()
    assert len(shares) == 1000 and float(1 - shares[500] / shares[499]) == pytest.approx(0.0025125, abs=1e-7)
    for step, share in [(100, 0.99829), (300, 0.98098), (500, 0.86302), (700, 0.59268), (900, 0.36489),
                        (999, 0.28504)]:
        assert float(shares[step].sqrt()) == pytest.approx(share, abs=1e-5)
    assert float((1 - shares[500]).sqrt()) == pytest.approx(0.50517, abs=1e-5)


def test_noise_has_the_mean_and_spread_of_the_schedule():
    """Step 100 on grey .5: nothing reaches 0 or 1, so mean .99829 * 128, deviation .05841 * 255."""
    noisy = np.array(add_noise(plain(128), 100, seed=1), float)
    assert noisy.mean() == pytest.approx(0.99829 * 128, abs=0.7)
    assert noisy.std() == pytest.approx(0.05841 * 255, rel=0.05)


def test_noise_by_hand():
    """One pixel of 200 at step 500: v_t = .86302 * 200 / 255 + .50517 eps, with torch's eps of seed 7."""
    picture = plain(200, (1, 1))
    eps = torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(7)).flatten()
    wanted = [0.863017 * 200 / 255 + 0.505174 * float(e) for e in eps]
    clamped = np.array(add_noise(picture, seed=7)).flatten()
    wrapped = np.array(add_noise(picture, seed=7, overflow="wrap")).flatten()
    for value, low, around in zip(wanted, clamped, wrapped):
        assert abs(int(low) - min(max(value, 0), 1) * 255) <= 0.51
        assert around == int(value * 255) % 256


def test_overflow():
    """Black and white at step 999: half of black's noise is below 0, and 1.2 wraps to 306 - 256 = 50."""
    assert (np.array(add_noise(plain(0), 999)) == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert (np.array(add_noise(plain(0), 999, overflow="wrap")) == 0).mean() < 0.03
    assert int(torch.tensor(-0.1 * 255).long().remainder(256)) == 231
    assert int(torch.tensor(1.2 * 255).long().remainder(256)) == 50


def test_wrapping_erases_the_picture():
    """Two greys, .25 and .75, stay apart when clamped (.32 and .60 at step 500); wrapped, both are .5."""
    greys = plain(64, (256, 256)), plain(191, (256, 256))
    means = {how: [np.array(add_noise(grey, 500, 1, how)).mean() / 255 for grey in greys]
             for how in ("clamp", "wrap")}
    assert means["clamp"][1] - means["clamp"][0] > 0.25
    assert means["wrap"] == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("share, columns", [(0, 0), (0.25, 2), (0.5, 4), (0.75, 6), (1, 8)])
def test_the_left_part_of_what_differs_is_hidden(share, columns):
    """They differ in two pixels, at (3, 2) and (10, 5): of the box of columns 3 .. 10 and rows 2 .. 5 a share is the
    other's, whose other pixels there are equal."""
    other = plain(9, (16, 12))
    other.putpixel((3, 2), (8, 9, 9))
    other.putpixel((10, 5), (9, 9, 200))
    image = plain(9, (16, 12))
    found = hide(image, other, share)
    changed = {(x, y) for x in range(16) for y in range(12) if found.getpixel((x, y)) != (9, 9, 9)}
    assert changed == {spot for spot in [(3, 2), (10, 5)] if spot[0] < 3 + columns}
    assert image.tobytes() == plain(9, (16, 12)).tobytes()  # the image that was given stays


def test_more_and_more_of_a_scene_is_hidden():
    """From the scene itself to the scene without the object, and each share leaves less of what differs."""
    image, other = scenes.open_scene("scene:5"), scenes.open_scene("scene:6")
    left = [(np.array(hide(image, other, share)) != np.array(other)).sum() for share in (0, 0.25, 0.5, 0.75, 1)]
    assert left[0] == (np.array(image) != np.array(other)).sum() and left[-1] == 0
    assert left == sorted(left, reverse=True) and len(set(left)) == 5
    assert hide(image, image, 0.5).tobytes() == image.tobytes()
    small = np.array(hide(image, other.resize((9, 5)), 1))
    assert (small == np.array(other.resize((9, 5)).resize(image.size))).all()


def test_noise_is_a_function_of_the_seed():
    state = torch.get_rng_state()
    picture = scenes.open_scene("scene:5")
    assert add_noise(picture, seed=1).tobytes() == add_noise(picture, seed=1).tobytes()
    assert add_noise(picture, seed=1).tobytes() != add_noise(picture, seed=2).tobytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert to_image(to_pixels(picture)).tobytes() == picture.tobytes()
    for bad in ({"step": 1000}, {"step": -1}):
        with pytest.raises(ValueError, match="want"):
            add_noise(picture, **bad)


@pytest.mark.parametrize("size", [(336, 336), (96, 96), (30, 200)])
def test_crop_equals_torchvision(size):
    """The same window, and the same pixels, as RandomResizedCrop draws after torch.manual_seed."""
    pixels = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    transform = v2.RandomResizedCrop(size, scale=(0.01, 0.2))
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            wanted = transform(pixels)
        assert torch.equal(crop(pixels, seed), wanted)


def test_crop_keeps_less_than_a_fifth():
    shares, ratios = [], []
    for seed in range(300):
        top, left, height, width = crop_window(336, 336, seed)
        assert 0 <= top <= 336 - height and 0 <= left <= 336 - width
        shares.append(height * width / 336**2)
        ratios.append(width / height)
    assert 0.009 < min(shares) < 0.02 and 0.19 < max(shares) < 0.202
    assert 0.74 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.35
    assert crop_window(8, 8, 0, scale=(2, 2))[2:] == (8, 8)  # none fits: as large as possible


def test_tiles_share_the_window():
    pixels = torch.rand(2, 3, 40, 40)
    both = crop(pixels, 3)
    assert both.shape == pixels.shape and torch.equal(both[1], crop(pixels[1], 3))


def test_sample_seeds():
    seeds = [sample_seed(name, run) for run in (0, 1) for name in ("a", "b", "1/a")]
    assert len(set(seeds)) == 6 and sample_seed("a") == seeds[0] and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed("a") == 28294763221082880  # for ever


def test_file_names_are_safe_and_distinct():
    assert file_name("scene-1.crop") == "scene-1.crop.png"
    names = [file_name(name) for name in ("a/b", "a b", "a_b", "../../a", "ä", "", "x" * 300, "x" * 301)]
    assert len(set(names)) == 8 and all(len(name) < 200 and "/" not in name for name in names)


def test_store_is_atomic_and_relative(tmp_path, monkeypatch):
    root, folder = tmp_path / "in", tmp_path / "out" / "pictures"
    root.mkdir()
    assert store(plain(3), folder, "x", root) == "../out/pictures/x.png"
    assert open_image("../out/pictures/x.png", root).tobytes() == plain(3).tobytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        store(plain(4), folder, "y", root)
    assert [file.name for file in folder.iterdir()] == ["x.png"]


def records(tmp_path) -> list[dict]:
    plain(90).save(tmp_path / "photo.png")
    return [{"id": name, "image": image, "prompt": "What?", "chosen": "A dog.", "rejected": "A cat."}
            for name, image in (("a", "photo.png"), ("b/1", "scene:1"), ("c", "scene:1"))]


def test_crop_pairs(tmp_path):
    pairs, _ = crop_pairs(records(tmp_path), tmp_path / "crops", seed=4, root=tmp_path, models={"clip": "none"})
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl", ("rejected_image",)) == pairs
    assert pairs[0]["rejected_image"] == "crops/a.crop.png"
    assert pairs[1]["source"] == {"method": "mdpo", "clip": "none", "seed": 4, "text": None}
    pictures = [open_image(pair["rejected_image"], tmp_path) for pair in pairs]
    assert [picture.size for picture in pictures] == [(64, 48), (96, 96), (96, 96)]
    assert np.array(pictures[0]).min() == np.array(pictures[0]).max() == 90
    assert pictures[1].tobytes() != pictures[2].tobytes()  # every record has its own window
    (alone,), _ = crop_pairs(records(tmp_path)[2:], tmp_path / "again", seed=4, root=tmp_path)
    assert open_image(alone["rejected_image"], tmp_path).tobytes() == pictures[2].tobytes()


def test_noise_pairs(tmp_path):
    pairs, _ = noise_pairs(records(tmp_path), tmp_path / "noisy", root=tmp_path, overflow="wrap", models={"a": 1})
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl", ("rejected_image",)) == pairs
    assert (pairs[0]["rejected"], pairs[0]["rejected_image"]) == ("A cat.", "noisy/a.noise.png")
    assert pairs[0]["source"] == {"method": "povid", "a": 1, "step": 500, "overflow": "wrap", "seed": 0,
                                  "text": None}
    noisy = [open_image(pair["rejected_image"], tmp_path).tobytes() for pair in pairs]
    assert noisy[0] == add_noise(plain(90), 500, sample_seed("a"), "wrap").tobytes()
    assert noisy[1] != noisy[2]  # every record has its own noise
