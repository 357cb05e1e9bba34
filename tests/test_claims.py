"""Claims about scenes: what the reader finds, that it agrees with the world, that it sees errors; and the questions."""

import random
import re
from collections import Counter

import pytest

from data import scene_text
from data.places import CATEGORIES
from data.scenes import DEV, TEST, Object, caption, objects_present, parse_reference, reference, sample_scene
from metrics import claims, claims_questions
from metrics.chair import chair
from metrics.claims import Claim, Record, is_true, read, score
from pairs.corrupt import scene_corrupt

SEEDS = range(DEV, DEV + 400)


def rows_of(seeds) -> list[dict]:
    return [{"id": reference(seed), "image": reference(seed)} for seed in seeds]


def said_of(seeds, noise: float) -> dict[str, str]:
    return {reference(seed): caption(sample_scene(seed), random.Random(seed), noise) for seed in seeds}


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(("text", "expected"), [
    ("Two large dogs are on the left of the image.",
     [("existence", "dog", None, 1), ("count", "dog", 2, 2), ("size", "dog", "large", 2), ("position", "dog", "left", 2)]),
    ("At the top there is a kite.", [("existence", "kite", None, 1), ("count", "kite", 1, 1), ("position", "kite", "top", 1)]),
    ("There is a cat. Next to it there is an apple.",
     [("existence", "cat", None, 1), ("count", "cat", 1, 1), ("existence", "apple", None, 1), ("count", "apple", 1, 1),
      ("pair", "apple", ("next to", "cat"), 1)]),
    ("A cat is on the right and a wine glass in the middle.",
     [("existence", "cat", None, 1), ("count", "cat", 1, 1), ("existence", "wine glass", None, 1),
      ("count", "wine glass", 1, 1), ("position", "cat", "right", 1), ("position", "wine glass", "middle", 1)]),
    ("The image shows a living room.", [("place", None, "living room", 1)]),
    ("Dogs and mice.", [("existence", "dog", None, 1), ("existence", "mouse", None, 1)]),
    ("The sea is calm.", [("place", None, "beach", 1)]),
    ("A dog is to the left of it.", [("existence", "dog", None, 1), ("count", "dog", 1, 1)]),  # of what?
])  # fmt: skip
def test_claims_of_a_text(text, expected):
    found, unread = read(text)
    assert [tuple(claim) for claim in found] == expected and unread == 0


@pytest.mark.parametrize(("text", "unread"), [
    ("", 0), ("The weather is nice. A dog.", 1), ("on the left. Ça va? 犬", 3), ("a " * 2000, 1), ("It is next to it.", 1)])  # fmt: skip
def test_what_cannot_be_read_is_counted(text, unread):
    assert read(text)[1] == unread


def test_it_is_the_object_named_last():
    assert read("A cat and a dog. The sea is calm. Above it there is a bird.")[0][-1] == Claim("pair", "bird", ("above", "dog"), 1)


# ------------------------------------------------------------------------------------------------ truth

RECORD = Record("farm", {
    "dog": [Object("dog", 0, 0, 0, 3), Object("dog", 0, 0, 5, 3)],  # left; large; top and bottom
    "cat": [Object("cat", 0, 7, 0, 1)],  # right, top, small
    "cow": [Object("cow", 0, 3, 0, 2)],  # middle; next to the upper dog
})  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "truth"), [
    ("a dog", "existence", True), ("a bird", "existence", False), ("a bird", "count", None),
    ("two dogs", "count", True), ("a dog", "count", False), ("three dogs", "count", False),
    ("two large dogs", "size", True), ("a small dog", "size", False), ("a large cow", "size", False),
    ("three large dogs", "size", True),  # as many as there are
    ("two dogs on the left", "position", True), ("two dogs at the top", "position", False),
    ("a dog at the top", "position", True), ("a cat on the left", "position", False),
    ("a bird on the left", "position", None),
    ("A dog. A cow is next to it.", "pair", True), ("A dog. A cat is to the right of it.", "pair", True),
    ("A cat. A dog is to the right of it.", "pair", False), ("A dog. A cow is to the right of it.", "pair", False),
    ("A cat. A cow is to the left of it.", "pair", True), ("A bird. A cow is next to it.", "pair", None),
    ("A dog. A dog is below it.", "pair", True), ("A cat. A cat is next to it.", "pair", False),
    ("a farm", "place", True), ("a beach", "place", False), ("The sea is calm.", "place", False),
])  # fmt: skip
def test_truth(text, kind, truth):
    (claim,) = [claim for claim in read(text)[0] if claim.kind == kind][-1:]
    assert is_true(claim, RECORD) is truth


def test_all_that_true_captions_say_is_read_and_true(monkeypatch):
    """Every noun, size, position, relation that the generator wrote is one claim, and none is false."""
    written = Counter()
    noun = scene_text._noun

    def counting(group, rng):
        text = noun(group, rng)
        written.update({"existence": 1, "count": 1, "size": "small " in text or "large " in text})
        return text

    monkeypatch.setattr(scene_text, "_noun", counting)
    said = said_of(SEEDS, noise=0)
    for text in said.values():
        written["position"] += len(re.findall(r"\b[oia][nt] the (?:left|middle|right|top|bottom)\b", text, re.I))
        written["pair"] += len(re.findall(r"\bit\b", text))
    scores = score(rows_of(SEEDS), said)
    assert {kind: scores[kind]["claims"] for kind in written} == dict(written)
    assert scores["all"]["false"] == 0 and scores["captions"]["unread_sentences"] == 0
    assert scores["captions"]["hallucinating"] == 0
    assert scores["place"]["coverage"] == 1 and scores["existence"]["coverage"] > 0.9 and scores["size"]["coverage"] > 0.6


def test_absent_objects_are_seen_as_chair_sees_them():
    said = said_of(SEEDS, noise=1)
    scores = score(rows_of(SEEDS), said)
    objects = {reference(seed): objects_present(sample_scene(seed)) for seed in SEEDS}
    expected = chair(said, objects)
    assert scores["existence"]["false"] == expected["hallucinated"] == len(SEEDS)
    assert scores["existence"]["claims"] == expected["mentions"]
    assert scores["existence"]["coverage"] == expected["recall"]
    assert scores["all"]["false"] == len(SEEDS)  # an absent object is one false claim, not several


def test_every_error_that_is_written_is_seen():
    """pairs/corrupt.py: absent objects, wrong numbers, wrong positions."""
    records = [{"id": key, "image": key, "prompt": "", "chosen": text} for key, text in said_of(SEEDS, noise=0).items()]
    kinds = {"object": "existence", "count": "count", "position": "position"}
    seen = Counter()
    for record, (text, how) in zip(records, scene_corrupt()(records)):
        if text:
            scores = score([record], {record["id"]: text})
            assert scores[kinds[how]]["false"] == 1, (record["chosen"], text)
            seen[how] += 1
    assert min(seen[how] for how in kinds) > 20


def test_wrong_sizes_are_seen():
    said = {key: re.sub("small|large", lambda m: {"small": "large", "large": "small"}[m[0]], text)
            for key, text in said_of(SEEDS, noise=0).items()}  # fmt: skip
    scores = score(rows_of(SEEDS), said)
    assert scores["size"]["false"] == scores["size"]["claims"] > 100 and scores["size"]["covered"] == 0


def test_removed_objects_are_not_in_the_record():
    image = reference(DEV + 1, ("horse",))
    scores = score([{"id": "a", "image": image}], {"a": "Three horses on a farm."})
    assert (scores["existence"]["false"], scores["count"]["claims"], scores["place"]["false"]) == (1, 0, 0)


def test_repetition_by_hand():
    row = {"id": "a", "image": reference(DEV)}
    assert score([row], {"a": "a dog a dog a dog"}, n=2)["captions"]["repetition"] == 3 / 5
    assert score([row], {"a": "a dog a dog a dog"}, n=4)["captions"]["repetition"] == 1 / 3
    assert score([row], {"a": "a dog"}, n=4)["captions"]["repetition"] == 0


def test_silence_and_order():
    rows, said = rows_of(SEEDS[:20]), said_of(SEEDS[:20], noise=1)
    assert score(rows[::-1], said) == score(rows, said)
    silent = score(rows, dict.fromkeys(said, ""))
    assert silent["all"]["claims"] == silent["all"]["hallucinated"] == silent["all"]["coverage"] == 0
    heading, *lines = claims.table(silent)
    assert all(len(line) == len(heading) and all(isinstance(cell, str) for cell in line) for line in lines)


def test_caption_rows():
    rows = claims.questions(None, None, scenes=2)
    assert [row["image"] for row in rows] == [f"scene:{TEST}", f"scene:{TEST + 1}"]
    assert claims.questions(None, None, scenes=1, split="dev")[0]["id"] == f"scene:{DEV}"


# ------------------------------------------------------------------------------------------------ questions

QUESTIONS = claims_questions.questions(None, None, scenes=120, split="dev")


def test_labels_are_balanced_and_right():
    for kind, labels in claims_questions.LABELS.items():
        rows = [row for row in QUESTIONS if row["part"] == kind]
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(labels) and len(set(counts.values())) == 1 and len(rows) <= 120
    for row in QUESTIONS:
        scene, without = parse_reference(row["image"])
        items = [item for item in scene.objects if item.category == row["category"] and item.category not in without]
        if row["part"] in ("existence", "removed"):
            assert row["label"] == ("yes" if items else "no")
        elif row["part"] == "count":
            assert ("one", "two", "three")[len(items) - 1] == row["label"]
        elif row["part"] == "position":
            (item,) = items
            assert row["label"] == ("left", "middle", "right")[int(3 * (item.column + item.size / 2) / 8)] == row["right"][0]
    assert len({row["id"] for row in QUESTIONS}) == len(QUESTIONS)


def test_questions_are_those_of_training():
    asked = {text for seed in range(3000) for text, *_ in scene_text.questions(sample_scene(seed), random.Random(seed))}
    assert {row["prompt"] for row in QUESTIONS if row["category"] in CATEGORIES[:30]} <= asked


def test_controls():
    for part, own in (("other_picture", set(claims_questions.LABELS)), ("removed", {"existence"})):
        rows = {row["id"].removeprefix(f"{part}-"): row for row in QUESTIONS if row["part"] == part}
        asked = {row["id"]: row for row in QUESTIONS if row["part"] in own and (part != "removed" or row["label"] == "yes")}
        assert rows.keys() == asked.keys() and rows
        for key, row in rows.items():
            assert row["prompt"] == asked[key]["prompt"] and row["image"] != asked[key]["image"]
            assert parse_reference(row["image"])[0].place == parse_reference(asked[key]["image"])[0].place
    assert {row["label"] for row in QUESTIONS if row["part"] == "removed"} == {"no"}


def test_sampling_depends_on_the_seed_alone():
    again = claims_questions.questions(None, None, scenes=120, split="dev")
    other = claims_questions.questions(None, None, scenes=120, split="dev", seed=1)
    assert again == QUESTIONS and other != QUESTIONS


@pytest.mark.parametrize(("text", "kind", "word"), [
    ("On the left.", "position", "left"), ("At the TOP of it", "position", "top"), ("Yes.", "existence", "yes"),
    ("Two.", "count", "two"), ("2", "count", ""), ("", "existence", ""), ("I know not", "existence", "")])  # fmt: skip
def test_reading_of_answers(text, kind, word):
    assert claims_questions.read_answer(text, kind) == word


def test_scores_of_questions():
    perfect = claims_questions.score(QUESTIONS, {row["id"]: row["right"][-1].capitalize() + "." for row in QUESTIONS})
    assert {part["accuracy"] for part in perfect.values()} == {1}
    always = claims_questions.score(QUESTIONS, {row["id"]: {"existence": "Yes", "count": "One", "position": "In the middle"}
                                                [row["kind"]] for row in QUESTIONS})  # fmt: skip
    for kind in claims_questions.LABELS:
        assert always[kind]["accuracy"] == pytest.approx(always[kind]["chance"])
    assert always["kinds"]["accuracy"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert always["removed"]["accuracy"] == 0
    silent = claims_questions.score(QUESTIONS, {row["id"]: "" for row in QUESTIONS})
    assert silent["count"]["other"] == silent["count"]["n"] and silent["kinds"]["accuracy"] == 0
    heading, *lines = claims_questions.table(silent)
    assert all(len(line) == len(heading) for line in lines) and len(lines) == 6
