"""networks/chain.py: three networks in a row, on small random weights and with made-up answers."""

import numpy as np
import pytest
import test_ram
import test_sam
import torch
from PIL import Image

from common import BadInput
from networks import chain, dino, ram, sam


@pytest.fixture
def files(tmp_path):
    found = {}
    for name in ("ram", "ram_tags", "dino", "dino_tokenizer", "sam"):
        found[name] = tmp_path / name
        found[name].write_text("dog\nkitchen\ncat\nstand\nzebra")
    return found


class Fake:
    """Stands for the three networks, and remembers what they are asked."""

    def __init__(self, tags, boxes, masks):
        self.answers, self.asked = dict(tags=tags, boxes=boxes, masks=masks), {}

    def __getattr__(self, name):
        def answer(image, *args, **kwargs):
            self.asked[name] = (*args, kwargs)
            return self.answers[name]
        return answer


@pytest.fixture
def fake(monkeypatch):
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, :2], masks[2, 3:] = True, True
    made = Fake([("dog", 0.9), ("kitchen", 0.8), ("Cat", 0.7), ("stand", 0.7)],
                [("dog", 0.8, (0.0, 0.0, 8.0, 2.0)), ("dog", 0.6, (1.0, 1.0, 2.0, 2.0)),
                 ("Cat", 0.5, (0.0, 3.0, 8.0, 6.0))],
                masks)
    loaded = []
    for module, name in ((ram, "load_ram"), (dino, "load_dino"), (sam, "load_sam")):
        monkeypatch.setattr(module, name, lambda *args, name=name: (loaded.append((name, *args)), made)[1])
    made.loaded = loaded
    return made


def test_tags_become_boxes_become_masks(files, fake):
    detect = chain.ram_dino_sam(files, box_threshold=0.3, overlap=0.6)
    assert fake.loaded == []
    found = detect("a.png", Image.new("L", (8, 6)))
    assert fake.asked["boxes"] == (["dog", "Cat"], {"threshold": 0.3, "overlap": 0.6})  # no place, no action
    assert torch.equal(fake.asked["masks"][0], torch.tensor([box for *_, box in fake.answers["boxes"]]))
    boxes = fake.answers["boxes"]
    assert [(d.label, d.score, d.box) for d in found] == [boxes[0], boxes[2]]  # no empty mask
    assert torch.equal(found[1].mask, fake.answers["masks"][2])
    detect("b.png", Image.new("L", (8, 6)))
    assert [name for name, *_ in fake.loaded] == ["load_ram", "load_dino", "load_sam"]  # once
    assert fake.loaded[0][1:3] == (files["ram"], 5)


def test_nothing_found_is_no_error(files, fake):
    detect = chain.ram_dino_sam(files, objects_only=False)
    fake.answers["boxes"] = []
    assert detect("a.png", Image.new("RGB", (8, 6))) == []
    assert fake.asked["boxes"][0] == ["dog", "kitchen", "Cat", "stand"] and "masks" not in fake.asked
    fake.answers["tags"] = []
    del fake.asked["boxes"]
    assert detect("a.png", Image.new("RGB", (8, 6))) == [] and "boxes" not in fake.asked


def test_missing_files_are_listed_at_once(files, tmp_path):
    files["sam"], files["ram"] = None, tmp_path / "none.pth"
    with pytest.raises(BadInput) as error:
        chain.ram_dino_sam(files)
    first, second = str(error.value).splitlines()
    assert first.startswith(f"{tmp_path}/none.pth: not found; wanted is ram_plus_swin_large_14m.pth (3.0 GB")
    assert second.startswith("--sam: not found; wanted is sam_vit_b_01ec64.pth")


def test_real_networks_on_a_photograph(files, tmp_path, monkeypatch):
    """RAM and SAM with random weights; boxes are given."""
    tagger = test_ram.build(5, 3)
    tagger.fc.bias.data += 50  # every tag fits
    torch.save(tagger.state_dict(), files["ram"])
    torch.save(test_sam.build().state_dict(), files["sam"])
    load = ram.load_ram
    monkeypatch.setattr(ram, "load_ram", lambda *args: load(*args, **test_ram.SIZES))
    given = Fake([], [("dog", 0.8, (2.0, 3.0, 30.0, 20.0))], [])
    monkeypatch.setattr(dino, "load_dino", lambda *args: given)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    found = chain.ram_dino_sam(files)("a.png", image)
    assert set(given.asked["boxes"][0]) == {"dog", "cat", "zebra"} and all(d.mask.shape == (40, 50) for d in found)
