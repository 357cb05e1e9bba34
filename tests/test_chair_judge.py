"""judges/chair.py: what a detector finds against what a response mentions."""

import torch
from PIL import Image

from data import scenes
from data.detect import Detection, scene_objects
from data.records import read_pairs, write_jsonl
from generate_pairs import read_arguments, run
from judges.chair import chair_judge
from judges.scene import judge_scene
from judges.scores import Judgement, order

MASK = torch.ones(1, 1, dtype=torch.bool)


def test_mentions_are_compared_with_what_is_found(tmp_path):
    """Synonyms on both sides; a repeated mention of an absent object counts twice, of a present one once."""
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    seen = []

    def detect(reference, image):
        seen.append((reference, image.size))
        return [Detection(label, 0.9, (0, 0, 1, 1), MASK) for label in ("puppy", "sofa", "teapot")]

    judge = chair_judge(detect, tmp_path)
    answers = ["A dog, a dog and a cat.", "A dog on a couch.", "A cat and a kitten.", ""]
    (found,) = judge([{"id": "a", "image": "a.png"}], [answers])
    assert found == [Judgement(1, 1), Judgement(0, 2), Judgement(2, 0), Judgement(0, 0)]
    assert order(answers, found) == [1, 0, 2] and seen == [("a.png", (6, 4))]


def test_on_scenes_it_is_the_scenes_judge():
    records = [{"id": str(i), "image": scenes.reference(i)} for i in range(6)]
    answers = [["There is a dog and a cup.", "A cat sits on a chair next to a dog."]] * 6
    assert chair_judge(scene_objects)(records, answers) == [judge_scene(r, a) for r, a in zip(records, answers)]


def test_pairs_of_photographs_without_annotations(tmp_path, monkeypatch):
    """The command: photographs ranked by what the detector finds; the pairs say which one it was."""
    rows = []
    for i in range(6):
        scenes.open_scene(scenes.reference(i)).save(tmp_path / f"{i}.png")
        rows.append({"id": str(i), "image": f"{i}.png", "prompt": scenes.CAPTION_PROMPT})
    write_jsonl(tmp_path / "images.jsonl", rows)
    monkeypatch.setattr("pairs.tools.mask_rcnn", lambda weights, device: lambda reference, image: scene_objects(
        scenes.reference(int(reference.rpartition("/")[2].removesuffix(".png"))), image))
    out = tmp_path / "pairs.jsonl"
    run(read_arguments(["--method", "rank", "--data", str(tmp_path / "images.jsonl"), "--judge", "chair", "--detector",
                        "maskrcnn", "--samples", "4", "--out", str(out)]))
    pairs = read_pairs(out)
    assert pairs and all(p["source"]["judge"] == "chair" and p["source"]["detector"] == "maskrcnn" for p in pairs)
    for pair in pairs:
        scene = {"id": "x", "image": scenes.reference(int(pair["id"]))}
        better, worse = judge_scene(scene, [pair["chosen"], pair["rejected"]])
        assert better.key < worse.key
