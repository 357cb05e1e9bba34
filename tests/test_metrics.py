"""CHAIR and POPE: hand-made cases, properties, and the released rules on official predictions."""

import json
import random
from pathlib import Path

import pytest

from metrics.chair import TWO_WORDS, chair, load_synonyms, mentions, singularize, tokenize
from metrics.pope import SPLITS, is_other, mean_of, pope, read_answer

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
SYNONYMS = load_synonyms()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------ CHAIR


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men and three children walk their dogs.", ["person", "person", "dog"]),
        ("A hot dog, not a dog; the dog!", ["hot dog", "dog", "dog"]),
        ("A baby elephant beside an adult giraffe.", ["elephant", "giraffe"]),
        ("A baby holds a bear.", ["person", "bear"]),
        ("Wine glasses, a wine glass and a glass.", ["wine glass", "wine glass"]),
        ("The toilet seat is up.", ["toilet"]),
        ("A toilet, and a seat beside the toilet.", ["toilet", "toilet"]),
        ("An empty seat.", ["chair"]),
        ("A passenger train on a train track.", ["train"]),
        ("He wears a bow tie; his ties and bows.", ["tie", "tie"]),
        ("The bus passes two buses.", ["bus"]),
        ("A tennis racket and a sports ball.", ["tennis racket", "sports ball"]),
        ("A dining table beside the desk.", ["dining table", "dining table"]),
        ("The man's stove-top and the dog's bowl.", ["person", "dog", "bowl"]),
        ("traffic\nlights at the stop sign.", ["traffic light", "stop sign"]),
        ("traffic, lights", []),
        ("'Stop sign' \"Horses\" (sheep) cats...birds—cows",
         ["stop sign", "horse", "sheep", "cat", "bird", "cow"]),
        ("", []),
    ],
)  # fmt: skip
def test_mentions_follow_the_released_rules(text, expected):
    """Oddities included: singular "bus" and plural "ties" are lost; "ball" stands for the sports ball."""
    assert [name for _, name in mentions(text, SYNONYMS)] == expected


def test_tokens():
    assert tokenize("It isn't the dog's 1,000 3:30 p.m. walk.") == [
        "it", "is", "n't", "the", "dog", "'s", "1,000", "3:30", "p.m.", "walk", "."
    ]  # fmt: skip


def test_chair_by_hand():
    """a: dog dog cat, shown dog -> 3 mentions, 1 wrong, 1 of 1 found. b: car, shown car person -> 1, 0, 1 of
    2. c: nothing, shown cup -> 0, 0, 0 of 1. CHAIRs 1/3, CHAIRi 1/4, Recall 2/4, words (6 + 2 + 1) / 3."""
    captions = {"a": "A dog, a puppy, a cat.", "b": "A car.", "c": "Nothing."}
    result = chair(captions, {"a": ["dog"], "b": {"car", "person"}, "c": ("cup",), "unused": ["bed"]})
    assert result == {
        "n": 3, "hallucinated_captions": 1, "mentions": 4, "hallucinated": 1, "found": 2, "shown": 4,
        "chair_s": 1 / 3, "chair_i": 0.25, "recall": 0.5, "words": 3.0,
        "percent": {"chair_s": 33.3, "chair_i": 25.0, "recall": 50.0},
    }  # fmt: skip


def test_chair_extremes():
    """Naming exactly what is shown: 0, 0, 1. Something else: 1, 1, 0. Silence, and no captions: 0, 0, 0."""
    shown = {"1": ["dog", "cup"], "2": ["car"]}

    def figures(captions):
        result = chair(captions, shown)
        return result["chair_s"], result["chair_i"], result["recall"]

    assert figures({"1": "a cup, a dog", "2": "cars"}) == (0, 0, 1)
    assert figures({"1": "a bed", "2": "a kite"}) == (1, 1, 0)
    assert figures({"1": "", "2": ""}) == (0, 0, 0)
    assert figures({}) == (0, 0, 0)


def test_chair_does_not_depend_on_order_and_is_additive_in_counts():
    names = sorted(set(SYNONYMS.values()) - {"bus"})
    rng = random.Random(0)
    captions = {str(i): " ".join("a " + name + "." for name in rng.sample(names, 4)) for i in range(40)}
    objects = {key: rng.sample(names, 5) for key in captions}
    keys = list(captions)
    rng.shuffle(keys)
    whole = chair(captions, objects)
    assert chair({key: captions[key] for key in keys}, objects) == whole
    halves = [chair({key: captions[key] for key in part}, objects) for part in (keys[:13], keys[13:])]
    for count in ("n", "mentions", "hallucinated", "hallucinated_captions", "found", "shown"):
        assert whole[count] == sum(half[count] for half in halves)
    assert 0 < whole["hallucinated"] < whole["mentions"]


def test_synonym_file():
    """80 classes; every class name is one of its own synonyms."""
    assert len(set(SYNONYMS.values())) == 80
    assert all(SYNONYMS[name] == name for name in SYNONYMS.values())


def test_singular_agrees_with_pattern_on_every_word_that_can_matter():
    """Vocabulary = words of the synonym list and of the two-word names. Over all of it, over every way to
    swap an ending for a plural ending, and over the words of the official captions: where either result is
    in the vocabulary, both are the same. ("oxens", a plural of a plural, is the one exception.)"""
    oracle = pytest.importorskip("textblob.en.inflect").singularize
    vocabulary = {word for name in (*SYNONYMS, *TWO_WORDS, *TWO_WORDS.values()) for word in name.split()}
    endings = (
        "s es ies ves men people children geese oxen kine mice ae oes xes ches shes sses buses i a".split()
    )
    words = vocabulary | {w[: len(w) - k] + end for w in vocabulary for k in range(5) for end in endings}
    if FIXTURES.is_dir():
        for row in lines(FIXTURES / "chair" / "captions_llava.jsonl"):
            words.update(tokenize(row["caption"]))
    assert len(words) > 20_000
    pairs = ((word, oracle(word), singularize(word)) for word in words - {"oxens"})
    assert [p for p in pairs if p[1] != p[2] and {p[1], p[2]} & vocabulary] == []


@needs_fixtures
def test_official_captions():
    """2000 LLaVA captions scored by the released code: CHAIRs 62.7, CHAIRi 18.8, Recall 76.7."""
    folder = FIXTURES / "chair"
    captions = {str(row["image_id"]): row["caption"] for row in lines(folder / "captions_llava.jsonl")}
    result = chair(captions, json.loads((folder / "objects_in_images.json").read_text()))
    assert result["n"] == 2000
    assert result["percent"] == {"chair_s": 62.7, "chair_i": 18.8, "recall": 76.7}


@needs_fixtures
def test_lists_equal_the_official_ones():
    official = FIXTURES / "chair"
    assert load_synonyms(official / "synonyms.txt") == SYNONYMS
    rules = json.loads((official / "double_words.json").read_text())
    pairs = {name: name for name in rules["double_words"]} | rules["overrides"]
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in rules["animals"]}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in rules["vehicles"]}
    never = {"sports ball", "tennis racket", "stove top oven"}
    assert {name: to for name, to in pairs.items() if name not in never} == TWO_WORDS


# ------------------------------------------------------------------------------------------------ POPE


@pytest.mark.parametrize(
    ("text", "answer", "other"),
    [
        ("Yes", "yes", False), ("yes, there is no doubt", "no", False), ("No", "no", False),
        ("no, there is not", "no", False), ("It is not", "no", False), ("Yes. No, wait.", "yes", False),
        ("NO", "yes", True), ("No!", "yes", True), ("\nNo", "yes", True), ("", "yes", True),
        ("dog", "yes", True), ("There is none", "yes", True), ("YES!", "yes", False),
        (". No", "yes", True), ("No.", "no", False),
    ],
)  # fmt: skip
def test_answers_are_read_by_the_released_rule(text, answer, other):
    assert (read_answer(text), is_other(text)) == (answer, other)


def test_pope_by_hand():
    """yes/yes TP, no/yes FP, yes/no FN, no/no TN twice, no/"dog" FP (other): accuracy 3/6, precision 1/3,
    recall 1/2, F1 = 2 / (2 + 2 + 1) = 0.4, yes ratio 3/6."""
    labels = dict(zip("abcdef", ("yes", "no", "yes", "no", "no", "no")))
    answers = dict(zip("abcdef", ("Yes", "Yes.", "No", "No", "not", "dog")))
    assert pope(answers, labels) == {
        "n": 6, "TP": 1, "FP": 2, "TN": 2, "FN": 1, "other": 1,
        "accuracy": 0.5, "precision": 1 / 3, "recall": 0.5, "f1": 0.4, "yes_ratio": 0.5,
        "percent": {"accuracy": 50.0, "precision": 33.33, "recall": 50.0, "f1": 40.0, "yes_ratio": 50.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("say", "accuracy", "f1", "yes_ratio"),
    [(lambda label: "Yes", 0.25, 0.4, 1.0), (lambda label: "No", 0.75, 0.0, 0.0),
     (lambda label: label, 1.0, 1.0, 0.25),
     (lambda label: {"yes": "no", "no": "yes"}[label], 0.0, 0.0, 0.75)],
)  # fmt: skip
def test_pope_extremes(say, accuracy, f1, yes_ratio):
    """10 yes, 30 no: always yes has precision 1/4, recall 1, F1 2/5; always no has nothing to divide by."""
    labels = {str(i): "yes" if i < 10 else "no" for i in range(40)}
    result = pope({key: say(label) for key, label in labels.items()}, labels)
    assert (result["accuracy"], result["f1"], result["yes_ratio"]) == (accuracy, f1, yes_ratio)


def test_pope_joins_by_id():
    rng = random.Random(1)
    labels = {i: rng.choice(("yes", "no")) for i in range(50)}
    answers = {i: rng.choice(("Yes", "No", "hm")) for i in labels}
    order = rng.sample(sorted(labels), 50)
    assert pope({i: answers[i] for i in order}, labels) == pope(answers, labels)


@needs_fixtures
def test_official_answers():
    """LLaVA-1.5-13B: the counts of each split, and mean F1 85.95 (published 85.9)."""
    folder = FIXTURES / "pope"
    said = {row["question_id"]: row["text"] for row in lines(folder / "answers_llava-v1.5-13b.jsonl")}
    asked = {split: [] for split in SPLITS}
    for row in lines(folder / "questions.jsonl"):
        asked[row["category"]].append(row)
    results = {}
    for split, questions in asked.items():
        truth = {(r["image"], r["text"]): r["label"] for r in lines(folder / f"labels_{split}.json")}
        labels = {r["question_id"]: truth[r["image"], r["text"].split("\n")[0]] for r in questions}
        results[split] = pope({key: said[key] for key in labels}, labels)
    counts = {
        split: tuple(result[key] for key in ("TP", "FP", "TN", "FN")) for split, result in results.items()
    }
    assert counts == {
        "adversarial": (1182, 117, 1383, 318),
        "random": (1182, 31, 1379, 318),
        "popular": (1182, 59, 1441, 318),
    }
    assert results["random"]["f1"] == pytest.approx(0.87136, abs=5e-6)
    assert mean_of(results.values())["percent"]["f1"] == 85.95
