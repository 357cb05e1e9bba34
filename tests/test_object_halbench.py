"""Object HalBench: words to classes, replies of the judge, hand arithmetic, files, official captions against CHAIR."""

import json
from pathlib import Path

import pytest

from common import BadInput
from metrics import object_halbench as bench
from metrics.chair import load_synonyms
from metrics.object_halbench import caption_mentions, lemma, name_mentions, read_objects

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "chair"
LONG = "This is an image."


def write(path: Path, value) -> Path:
    rows = [json.dumps(row) for row in value] if path.suffix == ".jsonl" else [json.dumps(value)]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_refined_synonyms():
    """Every word is CHAIR's but four, and no blank is left; COCO's 80 classes."""
    refined = bench.refined_synonyms()
    assert set(refined) - {word.strip() for word in load_synonyms()} == {
        "brother", "pedestrian", "coffee table", "remote control"}
    assert refined["cheesecake"] == "cake" and refined["coffee table"] == "dining table"
    assert len(set(refined.values())) == 80 and all(word == word.strip() for word in refined)
    assert bench.two_words()["coffee table"] == "coffee table" and bench.two_words()["bow tie"] == "tie"


@pytest.mark.parametrize(("word", "expected"), [
    ("bus", "bus"), ("buses", "bus"), ("ties", "tie"), ("glasses", "glass"), ("knives", "knife"), ("women", "woman"),
    ("skis", "ski"), ("scissors", "scissors"), ("puppies", "puppy"), ("benches", "bench"), ("phones", "phone"),
    ("calves", "calf"), ("geese", "goose"), ("toothbrushes", "toothbrush"), ("tennis", "tennis"), ("xyz", "xyz")])  # fmt: skip
def test_lemma(word, expected):
    assert lemma(word) == expected


@pytest.mark.parametrize(("text", "classes"), [
    ("A bus and two buses.", ["bus", "bus"]),
    ("Two men and a woman.", ["person"]),  # WordNet knows "men"
    ("The coffee table has a remote control on it.", ["dining table", "remote"]),
    ("A baby elephant, a toilet and its seat.", ["elephant", "toilet"]),
    ("A train track at home plate.", []), ("", [])])  # fmt: skip
def test_caption_mentions(text, classes):
    assert [name for _, name in caption_mentions(text)] == classes


@pytest.mark.parametrize(("names", "words"), [
    (["men", "man", "people"], ["man", "people"]),  # each name once, though both are persons
    (["fire truck", "tennis player"], []),  # compounds are other names
    (["old red trucks"], ["truck"]),
    (["bottle of wine", "wine glasses"], ["bottle", "wine glass"]),
    (["wooden coffee table with a vase"], ["coffee table"]),  # a two-word name hides the rest
    (["Dog", "dogs"], ["dog"]), ([], []), ([""], [])])  # fmt: skip
def test_name_mentions(names, words):
    assert [word for word, _ in name_mentions(names)] == words


def test_words_that_are_no_nouns_are_an_option():
    assert name_mentions(["old truck"], other=()) == [] != name_mentions(["old truck"])
    assert name_mentions(["fire truck"], other={"fire"}) == [("truck", "truck")]


@pytest.mark.parametrize(("reply", "names"), [
    ('["cat", "dog"]', ["cat", "dog"]), ("[]", []), ('The objects:\n["cat"]', ["cat"]),
    ('```json\n["cat",\n "dog"]\n```\nDone.', ["cat", "dog"]), ('[\n"cat",\n"dog"\n]', ["cat", "dog"]),
    ('["cat"] is all', None), ('["cat"]\nThat is all.', None), ("()", None), ("cat, dog", None), ('["cat", 1]', None),
    ('{"a": ["cat"]}', None), ("", None), ("[" * 5000, None)])  # fmt: skip
def test_read_objects(reply, names):
    assert read_objects(reply) == names


ROWS = [{"id": str(n), "image": f"{n}.jpg", "prompt": "Describe.", "objects": shown}
        for n, shown in enumerate((["dog"], ["car", "person"], ["cup"], ["cat"]))]  # fmt: skip


def test_score_by_hand():
    """0: dog and cat, one wrong. 1: car, right. 2: nothing that COCO knows. 3: short, not judged. So 1 of 2 responses with
    objects, 1 of 3 mentions, 2 of 5 objects; words (4 + 4 + 5 + 3) / 4."""
    said = {"0": LONG, "1": LONG, "2": "An image  of sky", "3": " A brown dog. "}
    assert set(bench.requests(ROWS, said)) == {"0", "1", "2"}
    assert bench.requests(ROWS, said)["0"][0] is None and LONG in bench.requests(ROWS, said)["0"][1]
    replies = [{"0": '["dog", "cat", "Cat"]', "1": '["cars"]', "2": '["sky"]', "3": '["dog"]'}]
    scores = bench.score(ROWS, said, replies)
    assert scores["counts"] == [{"responses": 4, "with_objects": 2, "hallucinated_responses": 1, "mentions": 3,
                                 "hallucinated": 1, "found": 2, "shown": 5}]
    assert scores["mean"] == pytest.approx({
        "response_hallucination": 1 / 2, "mention_hallucination": 1 / 3, "non_rsp": 1 / 2, "non_men": 2 / 3,
        "chair_s": 1 / 4, "recall": 2 / 5, "words": 4})
    assert scores["unparsed"] == [0] and scores["rounded"]["mean"]["non_men"] == 66.67
    assert bench.table(scores)[1][:2] == ("50.00", "33.33")
    assert bench.score(ROWS[::-1], said, replies)["counts"] == scores["counts"]
    both = bench.score(ROWS, said, [*replies, {"0": "none", "1": "[]", "2": "[]"}])
    assert both["unparsed"] == [0, 1] and both["mean"]["mention_hallucination"] == pytest.approx(1 / 6)
    assert both["rounded"]["mean"]["words"] == 4
    with pytest.raises(BadInput, match="no reply for 1 ids: '2'"):
        bench.score(ROWS, said, [{"0": "[]", "1": "[]"}])


def test_rules_count_repeats():
    scores = bench.score_rules(ROWS[:1], {"0": "A cat, another cat and a dog."})
    assert scores["counts"][0]["mentions"] == 3 and scores["counts"][0]["hallucinated"] == 2
    nothing = bench.score_rules(ROWS[:1], {"0": ""})["mean"]
    assert nothing["response_hallucination"] == nothing["recall"] == 0 and nothing["non_men"] == 1


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="official captions are not here")
def test_rules_are_close_to_chair_on_official_captions():
    """CHAIR: 62.7, 18.8, 76.7. WordNet's lemmas are known to move them by at most 0.3, 0.3 and 1.7."""
    captions = [json.loads(line) for line in (FIXTURES / "captions_llava.jsonl").read_text().splitlines()]
    shown = json.loads((FIXTURES / "objects_in_images.json").read_text())
    rows = [{"id": str(row["image_id"]), "objects": shown[str(row["image_id"])]} for row in captions]
    found = bench.score_rules(rows, {str(row["image_id"]): row["caption"] for row in captions})["rounded"]["mean"]
    assert (found["chair_s"], found["mention_hallucination"], found["recall"]) == (62.9, 18.77, 77.45)


@pytest.fixture
def data(tmp_path):
    """Two questions; COCO's annotations of four files."""
    write(tmp_path / "obj_halbench_300_with_image.jsonl",
          [{"image_id": n, "question": "Describe.", "image": "aGk="} for n in (7, 12)])
    for split, image in (("train", 12), ("val", 7)):
        images = [{"id": image, "file_name": f"{image}.jpg"}]
        categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "bus"}]
        boxes = [{"image_id": image, "category_id": 1 if split == "val" else 2, "bbox": [0, 0, 1, 1]}]
        write(tmp_path / f"instances_{split}2014.json", {"images": images, "categories": categories, "annotations": boxes})
        captions = [{"image_id": image, "caption": "Two cats on sofas."}, {"image_id": 99, "caption": "A car."}]
        write(tmp_path / f"captions_{split}2014.json", {"annotations": captions})
    return tmp_path


def test_questions(data):
    first, second = bench.questions(data)
    assert first == {"id": "7", "image": "COCO_val2014_000000000007.jpg", "prompt": "Describe.",
                     "objects": ["cat", "couch", "dog"]}
    assert second["objects"] == ["bus", "cat", "couch"]
    images = data / "images"
    images.mkdir()
    (images / "COCO_train2014_000000000012.jpg").touch()
    with pytest.raises(BadInput, match=r"val2014_000000000007.jpg: no such image$"):
        bench.questions(data, images)
    (images / "7.png").touch()
    assert [row["image"] for row in bench.questions(data, images)] == ["7.png", "COCO_train2014_000000000012.jpg"]
    write(data / "captions_val2014.json", {"annotations": [3, {"image_id": 7, "caption": None}]})
    with pytest.raises(BadInput, match=r"2014.json:1: (?s:.*)2014.json:2: "):
        bench.questions(data)


def test_objects_in_place_of_annotations(data):
    write(data / "objects.json", {"7": ["dog"], "12": [], "99": ["nonsense"]})
    assert [row["objects"] for row in bench.questions(data)] == [["dog"], []]
    write(data / "objects.json", {"7": ["dogs"], "12": "cat"})
    with pytest.raises(BadInput, match=r"'7': class 'dogs' (?s:.*)'12': '12' must be a list"):
        bench.questions(data)
    write(data / "objects.json", {"7": ["dog"]})
    with pytest.raises(BadInput, match="1 of 2 ids are missing"):
        bench.questions(data)


def test_answers_and_reviews(data):
    """By number or COCO's file name; the script's own output, and JSONL of extract_objs."""
    rows = bench.questions(data)
    answers = write(data / "a.jsonl", [{"image_id": "COCO_val2014_000000000007.jpg", "question": "?", "answer": "Assistant: A."},
                                       {"image_id": 12, "prompt": "?", "text": "B."}])  # fmt: skip
    assert bench.read_answers(answers, rows) == {"7": "A.", "12": "B."}
    sentences = [{"image_id": 7, "caption": "A dog.", "words": ["dog", "red car"]}, {"image_id": 12, "caption": "", "words": []}]
    hall = write(data / "hall_x_-1.json", {"sentences": sentences, "overall_metrics": {}})
    assert bench.read_answers(hall, rows) == {"7": "A dog.", "12": ""}
    assert bench.read_replies(hall, rows) == [{"7": '["dog", "red car"]', "12": "[]"}]
    reviews = write(data / "r.jsonl", [{"image_id": 12, "extract_objs": ["cat"]}, {"image_id": 7, "extract_objs": []}])
    assert bench.read_replies(reviews, rows) == [{"7": "[]", "12": '["cat"]'}]
    with pytest.raises(BadInput, match=r"r.jsonl:1: 'extract_objs' must be a list"):
        bench.read_replies(write(data / "r.jsonl", [{"image_id": 12, "extract_objs": "-1\n<no_response>"}]), rows)
