"""Removing objects: masks, filling, LaMa, detectors, and AdaViP's candidates for photographs."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file

from data import scenes
from data.corrupt import to_image, to_pixels
from data.detect import (
    Detection,
    box_of,
    coco_instances,
    decode_mask,
    mask_rcnn,
    overview,
    scene_objects,
    torchvision_detector,
)
from data.images import open_image
from data.inpaint import dilate, fill
from data.lama import Lama, lama_fill, load_lama, symmetric_pad
from pairs.adavip import photo_candidates, removable


def hole(height: int, width: int, *squares: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    for top, bottom, left, right in squares:
        mask[top:bottom, left:right] = True
    return mask


def ramp(height: int, width: int) -> torch.Tensor:
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([rows.expand(height, width), columns.expand(height, width), (rows + columns) / 2])


# ---------------------------------------------------------------------------------------- filling


def test_dilate():
    """A single pixel becomes 5 x 5, cut at the edge: 5 * 3 at (0, 4)."""
    assert dilate(hole(9, 9, (4, 5, 4, 5)), 5).equal(hole(9, 9, (2, 7, 2, 7)))
    assert dilate(hole(9, 9, (0, 1, 4, 5)), 5).equal(hole(9, 9, (0, 3, 2, 7)))
    assert dilate(hole(40, 40, (20, 21, 20, 21))).sum() == 15 * 15
    assert dilate(hole(9, 9, (1, 3, 1, 4)), 1).equal(hole(9, 9, (1, 3, 1, 4)))
    with pytest.raises(ValueError, match="dilation by 4 pixels: want an odd number"):
        dilate(hole(9, 9), 4)


HOLES = [hole(60, 81, (20, 45, 10, 70)), hole(60, 81, (0, 30, 50, 81)),
         hole(60, 81, (5, 6, 5, 6), (30, 60, 0, 40))]


@pytest.mark.parametrize("mask", HOLES)
def test_a_constant_surround_gives_exactly_that_constant(mask):
    picture = torch.tensor([13, 200, 77]).div(255)[:, None, None].expand(3, 60, 81).clone()
    broken = torch.where(mask, 0.5, picture)
    assert to_image(fill(broken, mask)).tobytes() == to_image(picture).tobytes()


def test_a_gradient_is_restored():
    """A linear ramp is harmonic, so nothing but rounding may differ; the hole is not at the edge."""
    for size, mask in [((60, 81), HOLES[0]), ((200, 150), hole(200, 150, (3, 190, 20, 149), (1, 2, 1, 2)))]:
        picture = ramp(*size)
        restored = fill(torch.where(mask, 0, picture), mask)
        assert (restored - picture).abs().max() < 1.5e-3
        assert torch.equal(restored[:, ~mask], picture[:, ~mask])


def test_fill_solves_laplace_equation():
    """Against numpy's dense solution on 12 x 10 pixels of noise, hole at the edge."""
    mask = hole(12, 10, (0, 5, 2, 8), (6, 11, 5, 9))
    picture = torch.rand(1, 12, 10, generator=torch.Generator().manual_seed(0))
    places = {tuple(place): i for i, place in enumerate(mask.nonzero().tolist())}
    system, right = np.zeros((len(places), len(places))), np.zeros(len(places))
    for (row, column), i in places.items():
        for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if 0 <= near[0] < 12 and 0 <= near[1] < 10:
                system[i, i] += 1
                if near in places:
                    system[i, places[near]] -= 1
                else:
                    right[i] += float(picture[0, near[0], near[1]])
    wanted = np.linalg.solve(system, right)
    assert fill(picture, mask, tolerance=1e-6)[0][mask].numpy() == pytest.approx(wanted, abs=1e-4)


def test_holes_that_cannot_be_filled():
    picture = ramp(20, 30)
    assert fill(picture, hole(20, 30)) is picture
    with pytest.raises(ValueError, match="the hole is the whole image"):
        fill(picture, ~hole(20, 30))
    for wrong in (hole(30, 20), hole(20, 30).float()):
        with pytest.raises(ValueError, match="want bool of the image's size"):
            fill(picture, wrong)


# ---------------------------------------------------------------------------------------- LaMa


def small_lama(seed: int = 0) -> Lama:
    """Width 8, two blocks, with norms that do something."""
    torch.manual_seed(seed)
    model = Lama(8, 2).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.2, 1.5)
    return model


def test_lama_has_the_published_size():
    """50,975,875 parameters in 989 tensors with the buffers."""
    with torch.device("meta"):
        model = Lama()
    assert sum(p.numel() for p in model.parameters()) == 50_975_875 and len(model.state_dict()) == 989
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["model.4.ffc.convl2g.weight"] == (384, 256, 3, 3)
    assert shapes["model.22.conv2.ffc.convg2g.fu.conv_layer.weight"] == (384, 384, 1, 1)
    assert shapes["model.24.weight"] == (512, 256, 3, 3) and shapes["model.34.weight"] == (3, 64, 7, 7)


def test_lama_equals_the_published_generator(monkeypatch):
    """Random weights, odd feature sizes (5 x 7 at the bottleneck), strict names. The oracle's ffc.py
    needs only torch; what its package imports besides is replaced by empty modules."""
    package = importlib.util.find_spec("litelama") or pytest.skip("litelama is not installed")
    for name in ("litelama", "kornia", "kornia.geometry", "kornia.geometry.transform"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["litelama"].__path__ = package.submodule_search_locations
    sys.modules["kornia.geometry.transform"].rotate = None
    ffc = importlib.import_module("litelama.ffc")
    plain = {"ratio_gin": 0, "ratio_gout": 0, "enable_lfu": False}
    split = {**plain, "ratio_gin": 0.75, "ratio_gout": 0.75}
    theirs = ffc.FFCResNetGenerator(
        4, 3, ngf=8, n_downsampling=3, n_blocks=2, add_out_act="sigmoid", init_conv_kwargs=plain,
        downsample_conv_kwargs=plain, resnet_conv_kwargs=split)
    ours = small_lama()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(2, 4, 40, 56)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs.eval()(x), atol=1e-6)


def test_symmetric_pad_equals_numpy():
    x = torch.rand(1, 2, 9, 13)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 7), (0, 3)), mode="symmetric")
    assert np.array_equal(symmetric_pad(x).numpy(), padded)
    assert symmetric_pad(padded_x := torch.rand(3, 8, 16)).equal(padded_x)


def test_lama_fill_changes_the_hole_only():
    """What stood in the hole has no influence on what is painted there."""
    model, picture = small_lama(), ramp(21, 30)
    mask = hole(21, 30, (4, 12, 5, 20))
    painted = lama_fill(model)(picture, mask)
    assert torch.equal(painted[:, ~mask], picture[:, ~mask])
    assert not torch.allclose(painted[:, mask], picture[:, mask])
    assert torch.equal(lama_fill(model)(torch.where(mask, 0.9, picture), mask), painted)
    with pytest.raises(ValueError, match="30 x 8 pixels: LaMa needs 9 x 9"):
        lama_fill(model)(picture[:, :8], mask[:8])


def lama_file(kind: str, model: Lama, folder):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "safetensors":
        save_file({f"generator.{name}": tensor for name, tensor in state.items()}, folder / "a.safetensors")
        return folder / "a.safetensors"
    if kind == "bare":
        slim = {name: tensor for name, tensor in state.items() if "num_batches" not in name}
        save_file(slim, folder / "b.safetensors")
        return folder / "b.safetensors"
    more = {"discriminator.model0.0.weight": torch.zeros(3), "loss_resnet_pl.mean": torch.zeros(3)}
    prefixed = {f"generator.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {**prefixed, **more}, "epoch": 3}, folder / "best.ckpt")
    return folder / "best.ckpt"


@pytest.mark.parametrize("kind", ["safetensors", "bare", "checkpoint"])
def test_load_lama(kind, tmp_path):
    model, x = small_lama(), torch.rand(1, 4, 16, 24)
    loaded = load_lama(lama_file(kind, model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x)) and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_load_lama_from_torchscript(tmp_path, monkeypatch):
    """Only the tensors of a script archive are taken, so a wrapper of the same names will do."""
    model, x = small_lama(), torch.rand(1, 4, 16, 24)
    wrapper = torch.nn.Module()
    wrapper.model = torch.nn.Module()
    wrapper.model.generator = torch.nn.Module()
    inner = wrapper.model.generator.model = torch.nn.Module()
    for name, tensor in model.model.state_dict().items():
        place, *path, leaf = inner, *name.split(".")
        for part in path:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_buffer(leaf, tensor)
    torch.jit.script(wrapper).save(tmp_path / "big-lama.pt")
    monkeypatch.setattr(torch.jit, "load", None)  # it would run the archive's code
    with torch.no_grad():
        assert torch.equal(load_lama(tmp_path / "big-lama.pt")(x), model(x))
    (tmp_path / "big-lama.pt").write_bytes((tmp_path / "big-lama.pt").read_bytes()[:-40])
    with pytest.raises(ValueError, match="big-lama.pt: not a readable"):
        load_lama(tmp_path / "big-lama.pt")


def test_unusable_lama_files_are_named(tmp_path):
    state = {f"generator.{name}": tensor.clone() for name, tensor in small_lama().state_dict().items()}
    lacking = {name: tensor for name, tensor in state.items() if "18.bias" not in name}
    cases = {"other": ({"x.weight": torch.zeros(1)}, "no LaMa generator"),
             "lacking": (lacking, "missing tensor 18.bias"),
             "more": ({**state, "generator.model.40.weight": torch.zeros(1)}, "unexpected tensor 40.weight"),
             "first": ({**state, "generator.model.1.ffc.convl2l.weight": torch.tensor(1.0)}, "tensor 1.ffc.convl2l"),
             "bytes": ({**state, "generator.model.18.bias": torch.zeros(3).byte()}, "tensor 18.bias is torch.uint8"),
             "nan": ({**state, "generator.model.18.bias": torch.full((3,), float("nan"))}, "tensor 18.bias holds NaN"),
             "shape": ({**state, "generator.model.18.bias": torch.zeros(4)}, r"tensor 18.bias is \(4,\)")}
    for name, (tensors, reason) in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=f"{name}.safetensors: {reason}"):
            load_lama(tmp_path / f"{name}.safetensors")
    torch.save({"state_dict": state, "callbacks": types.SimpleNamespace()}, tmp_path / "pickled.ckpt")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("pickled.ckpt", "broken.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: not a readable"):
            load_lama(tmp_path / name)
    with pytest.raises(ValueError, match="none.pt: not found"):
        load_lama(tmp_path / "none.pt")


# ---------------------------------------------------------------------------------------- detectors


class FixedModel(torch.nn.Module):
    """Two detections in torchvision's format, whatever the picture shows."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        ((_, height, width),) = (image.shape for image in images)
        masks = torch.zeros(2, 1, height, width)
        masks[0, 0, 2:4, 3:6], masks[0, 0, 2, 2] = 0.9, 0.4
        return [{"labels": torch.tensor([2, 1]), "scores": torch.tensor([0.8, 0.3]), "masks": masks,
                 "boxes": torch.tensor([[3.0, 2.0, 6.0, 4.0], [0.0, 0.0, 1.0, 1.0]])}]


def test_torchvision_detector():
    detect = torchvision_detector(FixedModel(), ["__background__", "dog", "cat"])
    (found,) = detect("x.png", Image.new("RGB", (9, 7)))
    assert found[:3] == ("cat", pytest.approx(0.8), (3.0, 2.0, 6.0, 4.0))
    assert found.mask.equal(hole(7, 9, (2, 4, 3, 6))) and box_of(found.mask) == found.box
    assert box_of(hole(7, 9)) == (0, 0, 0, 0)
    both = torchvision_detector(FixedModel(), ["__background__", "dog", "cat"], min_score=0.2, min_mask=0.3)
    assert [d.label for d in both("x.png", Image.new("RGB", (9, 7)))] == ["cat", "dog"]


def test_mask_rcnn_names_an_unusable_file(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth: not Mask R-CNN's weights"):
        mask_rcnn(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="none.pth: not found"):
        mask_rcnn(tmp_path / "none.pth")


def test_the_overview_shows_mask_box_and_tag():
    found = Detection("dog", 0.8, (10.0, 20.0, 60.0, 70.0), hole(80, 90, (30, 60, 20, 50)))
    image = Image.new("RGB", (90, 80), (100, 100, 100))
    shown = np.asarray(overview(image, [found])).astype(int)
    red = ImageColor.getrgb("hsl(0, 90%, 50%)")
    assert np.abs(shown[55, 45] - [50 + c / 2 for c in red]).max() <= 1  # in the mask
    assert shown[20, 40].tolist() == list(red) and shown[70, 10].tolist() == list(red)  # on the box
    assert shown[65, 55].tolist() == [100] * 3 and np.ptp(shown[21:34, 12:40]) > 100  # outside; the tag
    assert np.asarray(image).max() == 100


def test_scene_detector():
    scene, picture = scenes.sample_scene(3), scenes.open_scene("scene:3")
    found = scene_objects("scene:3", picture)
    assert {d.label for d in found} == scenes.objects_present(scene)
    gone = found[0].label
    assert gone not in {d.label for d in scene_objects(f"scene:3?without={gone}", picture)}


def compress(runs: list[int]) -> str:
    """COCO's string, written as its definition says: the inverse of what is tested."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = not (value == 0 and not bits & 16 or value == -1 and bits & 16)
            text += chr(bits + 32 * more + 48)
            if not more:
                break
    return text


def test_masks_by_hand():
    """3 x 4 pixels, column by column: 4 zeros, 2 ones, 1 zero, 2 ones, 3 zeros."""
    wanted = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    runs = [4, 2, 1, 2, 3]
    for counts in (runs, compress(runs)):
        assert decode_mask({"size": [3, 4], "counts": counts}, 3, 4).equal(wanted)
    assert decode_mask([[1, 1, 3, 1, 3, 3, 1, 3]], 3, 4).equal(wanted)  # middles 1.5 and 2.5 lie inside
    assert decode_mask([[1, 1, 2, 1, 2, 9, 1, 9], [2, 1, 3, 1, 3, 3, 2, 3]], 3, 4).equal(wanted)
    for bad in ({"size": [4, 3], "counts": runs}, {"size": [3, 4], "counts": [4, 2]}):
        with pytest.raises(ValueError, match="for an image of 3 x 4"):
            decode_mask(bad, 3, 4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_masks_equal_pycocotools():
    """Run lengths exactly; polygons but for the outline, which COCO's code rounds to a fifth of a pixel."""
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        mask = rng.random((37, 53)) < density
        mask[:, 20:] = mask[:, 20:21]
        encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
        assert np.array_equal(decode_mask(segmentation, 37, 53).numpy(), mask)
    for _ in range(10):
        angles = np.sort(rng.random(12)) * 2 * np.pi
        radius = rng.uniform(20, 70, 12)
        corners = np.stack([80 + radius * np.cos(angles), 60 + radius * np.sin(angles)], 1)
        polygons = [corners.ravel().tolist()]
        theirs = coco.decode(coco.merge(coco.frPyObjects(polygons, 120, 160))).astype(bool)
        ours = decode_mask(polygons, 120, 160).numpy()
        assert (ours != theirs).sum() < 0.01 * theirs.sum()


def coco_file(folder, **more):
    content = {"images": [{"id": 7, "file_name": "a.png", "width": 12, "height": 10}],
               "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
               "annotations": [
                   {"id": 1, "image_id": 7, "category_id": 18, "segmentation": [[2, 3, 5, 3, 5, 7, 2, 7]]},
                   {"id": 2, "image_id": 7, "category_id": 3, "iscrowd": 1,
                    "segmentation": {"size": [10, 12], "counts": [100, 20]}}], **more}
    (folder / "instances.json").write_text(json.dumps(content))
    return coco_instances(folder / "instances.json")


def test_coco_instances(tmp_path):
    dog, car = coco_file(tmp_path)("train/a.png", Image.new("RGB", (12, 10)))
    assert dog[:3] == ("dog", 1.0, (2, 3, 5, 7)) and dog.mask.equal(hole(10, 12, (3, 7, 2, 5)))
    assert car[:3] == ("car", 1.0, (10, 0, 12, 10))


def test_unusable_instances_are_named(tmp_path):
    detect, picture = coco_file(tmp_path), Image.new("RGB", (12, 10))
    with pytest.raises(ValueError, match="instances.json: no image b.png"):
        detect("b.png", picture)
    with pytest.raises(ValueError, match="a.png is 10 x 12 pixels, the file says 12 x 10"):
        detect("a.png", Image.new("RGB", (10, 12)))
    broken = [{"id": 5, "image_id": 7, "category_id": 3, "segmentation": {"size": [10, 12], "counts": [1]}}]
    with pytest.raises(ValueError, match="annotation 5: run lengths"):
        coco_file(tmp_path, annotations=broken)
    with pytest.raises(ValueError, match="image '7': file_name None is no name"):
        coco_file(tmp_path, images=[{"id": 7}])
    with pytest.raises(ValueError, match="none.json: not found"):
        coco_instances(tmp_path / "none.json")


# ---------------------------------------------------------------------------------------- candidates


def seen(label: str, score: float, mask: torch.Tensor) -> Detection:
    return Detection(label, score, box_of(mask), mask)


def test_one_hole_for_each_class():
    """Two dogs, one hole; the sofa's 50 of 60 pixels are more than .8; an empty mask gives no hole."""
    found = [seen("dog", 0.6, hole(6, 10, (0, 1, 0, 1))), seen("sofa", 0.9, hole(6, 10, (0, 5, 0, 10))),
             seen("dog", 0.7, hole(6, 10, (4, 5, 8, 9))), seen("cat", 0.9, hole(6, 10))]
    ((label, mask),) = removable(found, dilation=3)
    assert label == "dog" and mask.equal(hole(6, 10, (0, 2, 0, 2), (3, 6, 7, 10)))
    ((_, mask),) = removable(found, dilation=3, instances="best")
    assert mask.equal(hole(6, 10, (3, 6, 7, 10)))
    assert [label for label, _ in removable(found, dilation=1, max_area=0.9)] == ["dog", "sofa"]
    assert removable([seen("wall", 0.9, hole(6, 10, (0, 6, 0, 10)))], max_area=1.0) == []  # nothing to fill it from
    with pytest.raises(ValueError, match="instances 'some'"):
        removable(found, instances="some")


def test_photo_candidates(tmp_path):
    """A red and a green square on grey: each candidate is a file of the picture without one of them."""
    pixels = torch.full((3, 48, 64), 0.4)
    pixels[:, 8:16, 8:16] = torch.tensor([1.0, 0, 0])[:, None, None]
    pixels[:, 30:40, 40:56] = torch.tensor([0, 1.0, 0])[:, None, None]
    to_image(pixels).save(tmp_path / "a.png")
    asked = []

    def detect(reference, image):
        asked.append((reference, image.size))
        return [seen("green", 0.9, hole(48, 64, (30, 40, 40, 56))),
                seen("red", 0.8, hole(48, 64, (8, 16, 8, 16)))]

    candidates = photo_candidates(detect, tmp_path / "removed", dilation=5, root=tmp_path)
    found = candidates({"id": "1", "image": "a.png"})
    assert candidates({"id": "2", "image": "a.png"}) == found and asked == [("a.png", (64, 48))]
    assert [label for label, _ in found] == ["green", "red"]
    (_, green), (_, red) = [(label, np.array(open_image(ref, tmp_path))) for label, ref in found]
    assert (green[20:] == 102).all() and (green[8:16, 8:16] == [255, 0, 0]).all()
    assert (red[:24] == 102).all() and (red[30:40, 40:56] == [0, 255, 0]).all()


def test_filled_scenes_resemble_the_scenes_that_never_had_the_object(tmp_path):
    """The true counterfactual is known: filling must come much closer to it than the original does."""
    errors = []
    candidates = photo_candidates(scene_objects, tmp_path, dilation=3, root=tmp_path)
    for seed in range(scenes.DEV, scenes.DEV + 6):
        before = to_pixels(scenes.open_scene(f"scene:{seed}"))
        for label, reference in candidates({"id": "x", "image": f"scene:{seed}"}):
            truth = to_pixels(scenes.open_scene(scenes.reference(seed, [label])))
            after = to_pixels(open_image(reference, tmp_path))
            errors.append([float((picture - truth).square().sum()) for picture in (before, after)])
    before, after = np.array(errors).T
    assert len(errors) > 12 and after.sum() < 0.15 * before.sum() and np.median(after / before) < 0.1


ANNOTATION = {"id": 5, "image_id": 7, "category_id": 3, "bbox": [2, 3, 3, 4]}
IMAGE = {"id": 7, "file_name": "a.png", "width": 12, "height": 10}


@pytest.mark.parametrize("given", [{}, {"segmentation": []}, {"segmentation": None}])
def test_a_box_is_the_mask_where_there_is_no_other(tmp_path, given):
    (found,) = coco_file(tmp_path, annotations=[{**ANNOTATION, **given}])("a.png", Image.new("RGB", (12, 10)))
    assert found[:3] == ("car", 1.0, (2, 3, 5, 7)) and found.mask.equal(hole(10, 12, (3, 7, 2, 5)))
    with pytest.raises(ValueError, match="annotation 5: no segmentation"):
        coco_instances(tmp_path / "instances.json", box_masks=False)


@pytest.mark.parametrize(("wrong", "reason"), [
    ({"segmentation": [], "bbox": [2, 3, 0, 4]}, "annotation 5: no segmentation, bbox [2, 3, 0, 4]"),
    ({"segmentation": [], "bbox": None}, "annotation 5: no segmentation, bbox None"),
    ({"segmentation": [[2, 3, 5, 7]]}, "annotation 5: polygon of 4 numbers"),
    ({"segmentation": [[2, 3, 5, 7, 5]]}, "annotation 5: polygon of 5 numbers"),
    ({"segmentation": [2, 3, 5, 3, 5, 7]}, "annotation 5: segmentation [2, 3, 5, 3, 5, 7]"),
    ({"segmentation": [["2", 3, 5, 3, 5, 7]]}, "annotation 5: segmentation [['2', 3"),
    ({"segmentation": [[1e300, 3, 5, 3, 5, 7]]}, "annotation 5: segmentation [[1e+300"),
    ({"segmentation": "x"}, "annotation 5: segmentation 'x'"),
    ({"segmentation": {"size": [10, 12]}}, "annotation 5: counts None: no run lengths"),
    ({"segmentation": {"size": [10, 12], "counts": [60.0, 60.0]}}, "annotation 5: counts [60.0, 60.0]"),
    ({"segmentation": {"size": [10, 12], "counts": [130, -10]}}, "annotation 5: counts [130, -10]"),
    ({"segmentation": {"size": [10, 12], "counts": "b'01'"}}, "annotation 5: counts"),
    ({"segmentation": {"size": [10, 12], "counts": "o" * 40 + "0"}}, "annotation 5: counts"),
    ({"segmentation": {"size": [10, 12], "counts": "h"}}, "annotation 5: counts 'h'"),
    ({"segmentation": {"size": ["10", "12"], "counts": [120]}}, "annotation 5: run lengths ['10', '12']"),
    ({"category_id": 99}, "annotation 5: category_id 99 is none of the categories"),
    ({"image_id": 8}, "annotation 5: image_id 8 is none of the images"),
    ({"image_id": True}, "annotation 5: image_id True is none of the images"),
])  # fmt: skip
def test_bad_annotations_are_named_when_the_file_is_read(tmp_path, wrong, reason):
    with pytest.raises(ValueError) as error:
        coco_file(tmp_path, annotations=[{**ANNOTATION, **wrong}])
    assert str(error.value).startswith(f"{tmp_path}/instances.json: {reason}")


@pytest.mark.parametrize(("images", "reason"), [
    ([{**IMAGE, "width": "12"}], "image '7': width '12', height 10: numbers of pixels are wanted"),
    ([{**IMAGE, "height": 0.5}], "image '7': width 12, height 0.5: numbers"),
    ([{"id": 7, "file_name": "a.png"}], "image '7': width None, height None: numbers"),
    ([IMAGE, IMAGE], "image id 7 is given twice"),
    ([IMAGE, {**IMAGE, "id": None}], "image id None is no number or text"),
    ([IMAGE, {**IMAGE, "id": 8}], "file_name 'a.png' is given 2 times"),
    ([{**IMAGE, "file_name": "\ud800"}], "holds half a character, the lone surrogate '\\ud800'"),
    ([7], "not an instances file of COCO: 'images' must be a list of objects"),
])  # fmt: skip
def test_bad_pictures_are_named_when_the_file_is_read(tmp_path, images, reason):
    with pytest.raises(ValueError) as error:
        coco_file(tmp_path, images=images)
    assert str(error.value).startswith(f"{tmp_path}/instances.json: {reason}")


def test_problems_are_counted_and_the_first_are_named(tmp_path):
    with pytest.raises(ValueError) as error:
        coco_file(tmp_path, annotations=[{**ANNOTATION, "category_id": 99}] * 1500)
    assert len(lines := str(error.value).split("\n")) == 21 and lines[-1] == "... and 1,480 more problems"


def test_ids_and_sizes_may_be_other_numbers_of_the_same_value(tmp_path):
    detect = coco_file(tmp_path, images=[{"id": "7", "file_name": "a.png", "width": 12.0, "height": 10.0}],
                       annotations=[{**ANNOTATION, "image_id": 7.0, "category_id": "3"}])
    assert [found.label for found in detect("a.png", Image.new("RGB", (12, 10)))] == ["car"]


def test_pictures_are_found_by_name_apart_from_folders(tmp_path):
    """train/a.png and val/a.png are told apart by their folders, or refused."""
    sizes = {"train/a.png": (12, 10), "val/a.png": (6, 5), "val/b.png": (3, 3)}
    detect = coco_file(tmp_path, annotations=[], images=[
        {"id": i, "file_name": name, "width": w, "height": h} for i, (name, (w, h)) in enumerate(sizes.items())])
    for reference, name in (("train/a.png",) * 2, ("/data/val/a.png", "val/a.png"), ("x/b.png", "val/b.png")):
        assert detect(reference, Image.new("RGB", sizes[name])) == []
    with pytest.raises(ValueError, match="instances.json: 'x/a.png' may be 'train/a.png' or 'val/a.png'"):
        detect("x/a.png", Image.new("RGB", (12, 10)))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("segmentation", [
    [[5, 5, 15, 5, 15, 15, 5, 15]], [[-5, -5, 60, -5, 60, 15, -5, 15]], [[35, 25, 60, 25, 60, 50, 35, 50]],
    [[5, 5, 15, 5, 15, 15], [20, 2, 30, 2, 30, 9]],
    {"size": [30, 40], "counts": [0, 1200]}, {"size": [30, 40], "counts": [7, 9, 1184]},
])  # fmt: skip
def test_segmentations_equal_pycocotools(segmentation):
    """Beyond the edge, of several parts, run lengths that begin with an object: the same pixels but for slopes."""
    coco = pytest.importorskip("pycocotools.mask")
    encoded = coco.frPyObjects(segmentation, 30, 40)
    theirs = coco.decode(coco.merge(encoded) if isinstance(encoded, list) else encoded).astype(bool)
    ours = decode_mask(segmentation, 30, 40).numpy()
    assert (ours != theirs).sum() <= (10 if len(segmentation) == 2 and isinstance(segmentation, list) else 0)
