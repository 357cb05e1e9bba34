"""AMBER: hand arithmetic, the nouns of its vocabulary, the official files and their known scores."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import amber
from metrics.amber import questions, read_answer, score, table
from metrics.amber_nouns import forms, mentions, tokenize
from metrics.answers import read_answers

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="official files are not here")

RELATION = {"forest": ["tree", "bush"], "tree": ["forest"], "dog": [], "person": ["man", "woman", "people"], "cat": [],
            "sky": [], "watch": [], "orange": [], "can": [], "vase": [], "board": []}  # fmt: skip
NOTES = [
    {"id": 1, "type": "generative", "truth": ["tree", "forest", "dog"], "hallu": ["cat", "person"]},
    {"id": 2, "type": "generative", "truth": ["sky", "sky"], "hallu": ["dog"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-attribute-state", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-number", "truth": "no"},
    {"id": 6, "type": "discriminative-attribute-action", "truth": "no"},
    {"id": 7, "type": "discriminative-relation", "truth": "yes"},
    {"id": 8, "type": "relation", "truth": "no"},
]


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "query").mkdir()
    write(tmp_path / "annotations.json", NOTES)
    write(tmp_path / "relation.json", RELATION)
    (tmp_path / "safe_words.txt").write_text("orange\n")
    asked = [{"id": note["id"], "image": f"AMBER_{note['id'] % 2}.jpg", "query": f"Question {note['id']}?"} for note in NOTES]
    write(tmp_path / "query" / "query_all.json", asked)
    write(tmp_path / "query" / "query_generative.json", asked[:2])
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


SAID = {"1": "A tree, a bush and a cat. A man, an orange and a vase.", "2": "The sky.",
        "3": "No", "4": "No", "5": "No", "6": "Yes", "7": "Yes", "8": "no"}  # fmt: skip


def test_descriptions_by_hand(data):
    """The tree counts for the forest, whose association it is, so the tree itself is not covered; nor is the second
    of two skies. An orange is safe, but a mention. Cat and man are the likely hallucinations, the vase is another."""
    scores = score(questions(data, None), SAID)["generative"]
    assert (scores["mentions"], scores["hallucinated"]) == (7, 3)
    assert (scores["covered"], scores["objects"]) == (2, 5)
    assert (scores["cognitive"], scores["likely"]) == (2, 3)
    assert (scores["hallucinating"], scores["n"]) == (1, 2)
    assert scores["chair"] == 3 / 7 and scores["cover"] == 2 / 5 and scores["cog"] == 2 / 3 and scores["hal"] == 1 / 2
    assert scores["rounded"] == {"chair": 42.9, "cover": 40.0, "hal": 50.0, "cog": 66.6}  # 2 / 3.001


def test_answers_by_hand(data):
    """No is the positive class; lower case is no answer, and wrong. F1 is that of the rounded figures."""
    scores = score(questions(data, None), SAID)
    whole = scores["discriminative"]
    assert {key: whole[key] for key in ("n", "no", "said_no", "right_no", "right", "other")} == {
        "n": 6, "no": 4, "said_no": 3, "right_no": 2, "right": 3, "other": 1}  # fmt: skip
    assert whole["f1"] == 4 / 7
    assert whole["rounded"] == {"accuracy": 50.0, "precision": 66.6, "recall": 50.0, "f1": 57.1}
    assert scores["existence"]["rounded"] == {"accuracy": 99.9, "precision": 99.9, "recall": 99.9, "f1": 99.9}
    assert scores["attribute"]["rounded"] == {"accuracy": 33.3, "precision": 50.0, "recall": 50.0, "f1": 50.0}
    assert scores["relation"]["n"] == 2 and scores["relation"]["right"] == 1
    assert scores["amber"]["rounded"] == {"amber": 57.1}  # (100 - 42.9 + 57.1) / 2
    assert scores["amber"]["amber"] == pytest.approx((1 - 3 / 7 + 4 / 7) / 2)


def test_the_denominators_of_the_released_code():
    """Every count starts at 0.001; F1 of existence has 0.001 more below, not 0.0001 as the others."""
    for kind, f1 in (("existence", 66.6), ("state", 66.7)):
        rows = [{"id": str(i), "kind": kind, "label": "no"} for i in range(1000)]
        scores = score(rows, {row["id"]: "No" if int(row["id"]) % 2 else "Yes" for row in rows})
        assert scores[kind]["rounded"] == {"accuracy": 50.0, "precision": 100.0, "recall": 50.0, "f1": f1}
    row = {"id": "1", "kind": "generative", "truth": [["dog"]], "hallu": [], "words": ["cat"], "safe": [], "similar": None}
    assert score([row], {"1": "a cat"})["generative"]["rounded"] == {"chair": 99.9, "cover": 0.0, "hal": 100.0, "cog": 0.0}


def test_amber_score_is_rounded_half_up(data):
    rows = questions(data, None)
    said = {**SAID, "8": "No"}  # F1 = 2 * .75 * .75 / (1.5 + .0001) = 75.0; 1 - 42.9 -> 66.05
    assert score(rows, said)["amber"]["rounded"] == {"amber": 66.1}


def test_a_lenient_reading_is_named(data):
    rows = questions(data, None)
    said = {**SAID, "3": "No, there is none.", "4": "yes."}
    assert score(rows, said)["discriminative"]["other"] == 3
    assert score(rows, said, reading="lenient")["discriminative"]["other"] == 0
    assert score(rows, said, reading="lenient")["reading"] == "lenient"


@pytest.mark.parametrize(("text", "exact", "lenient"), [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("no", "", "no"), ("Yes.", "", "yes"), ("NO, it is", "", "no"),
    ("No\r\n", "", "no"), ("Nope", "", ""), ("", "", ""), (" \n", "", ""), ("Not yes", "", ""), ("Да", "", "")])  # fmt: skip
def test_reading_of_answers(text, exact, lenient):
    assert (read_answer(text, "exact"), read_answer(text, "lenient")) == (exact, lenient)


def test_similar_words_excuse_and_cover(data, tmp_path):
    """In place of the word vectors: a vase like a dog is no hallucination but the dog; one like a cat is a cat."""
    said = {"1": "A vase.", "2": "A vase."}
    exact = score(questions(data, None, queries="generative"), said)
    assert (exact["generative"]["hallucinated"], exact["words"]) == (2, "exact")
    pairs = tmp_path / "similar.tsv"
    pairs.write_text("vase\tdog\ncat\tvase\n")
    scores = score(questions(data, None, queries="generative", similar=pairs), said)
    assert "table" in scores["words"]
    assert (scores["generative"]["hallucinated"], scores["generative"]["covered"]) == (1, 1)  # image 2 shows no dog
    assert scores["generative"]["cognitive"] == 2  # the cat of image 1, the likely dog of image 2


def test_order_does_not_matter(data):
    rows = questions(data, None)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert score(shuffled, SAID) == score(rows, SAID)


def test_nothing_said(data):
    """No division by zero; a response that says nothing hallucinates nothing."""
    scores = score(questions(data, None), dict.fromkeys(SAID, ""))
    assert scores["generative"]["rounded"] == {"chair": 0.0, "cover": 0.0, "hal": 0.0, "cog": 0.0}
    assert scores["discriminative"]["rounded"] == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert scores["amber"]["rounded"] == {"amber": 50.0}


def test_a_table_of_strings(data):
    heading, *lines = table(score(questions(data, None), SAID))
    assert [line[0] for line in lines] == ["generative", *amber.POOLS, "amber"]
    assert {len(line) for line in lines} == {len(heading)} and all(isinstance(cell, str) for line in lines for cell in line)


# ------------------------------------------------------------------------------------------------ files


def test_rows_for_a_model(data, tmp_path):
    images = tmp_path / "image"
    images.mkdir()
    with pytest.raises(BadInput, match=r"(?s)AMBER_1.jpg: no such image.*AMBER_0.jpg: no such image"):
        questions(data, images)
    for i in (0, 1):
        (images / f"AMBER_{i}.jpg").touch()
    rows = questions(data, images)
    assert [row["prompt"] for row in rows[:3]] == ["Question 1?", "Question 2?", "Question 3? Please answer Yes or No."]
    assert questions(data, images, instruction="none")[2]["prompt"] == "Question 3?"
    assert [row["image"] for row in rows[:2]] == ["AMBER_1.jpg", "AMBER_0.jpg"]
    assert [row["id"] for row in questions(data, images, queries="generative")] == ["1", "2"]
    with pytest.raises(BadInput, match="has no query_discriminative.json; published at github.com/junyangwang0410"):
        questions(data, images, queries="discriminative")


def test_answers_file(data, tmp_path):
    """The official answers, a list of id and response, are read as any other's, a subset too."""
    rows, path = questions(data, None, queries="discriminative"), tmp_path / "answers.json"
    write(path, [{"id": int(key), "response": text} for key, text in SAID.items() if int(key) > 2])
    assert read_answers(path, rows) == {key: text for key, text in SAID.items() if int(key) > 2}


@pytest.mark.parametrize(("change", "message"), [
    ({"id": 2}, "annotations.json:1: want id 1, found 2"),
    ({"type": "other"}, "annotations.json:1: want a type of AMBER, found 'other'"),
    ({"truth": "yes"}, "annotations.json:1: 'truth' must be a list"),
    ({"hallu": [1]}, "annotations.json:1: 'hallu' must hold strings"),
    ({"truth": ["cow"]}, "relation.json: has no 'cow', which annotation 1 names"),
])  # fmt: skip
def test_bad_annotations_are_named(data, change, message):
    write(data / "annotations.json", [{**NOTES[0], **change}, *NOTES[1:]])
    with pytest.raises(BadInput, match=message):
        questions(data, None)


def test_bad_files_are_named(data, tmp_path):
    similar = tmp_path / "similar.tsv"
    similar.write_text("dog\tcat\ndog cat\ndog\tcow\n")
    with pytest.raises(BadInput, match=r"(?s)similar.tsv:2: want two words.*similar.tsv:3: want two words"):
        questions(data, None, similar=similar)
    similar.write_bytes(b"\xff\xfe")
    with pytest.raises(BadInput, match="similar.tsv: not UTF-8"):
        questions(data, None, similar=similar)
    similar.write_bytes(b"\xef\xbb\xbfdog\tcat\r\n")  # BOM, CRLF
    assert questions(data, None, similar=similar)[0]["similar"] == {"dog": ["cat"], "cat": ["dog"]}
    write(data / "relation.json", {**RELATION, "sky": "blue"})
    with pytest.raises(BadInput, match="relation.json:'sky': 'sky' must be a list, found 'blue'"):
        questions(data, None)
    (data / "safe_words.txt").unlink()
    with pytest.raises(BadInput, match="has no safe_words.txt|relation.json"):
        questions(data, None)


# ------------------------------------------------------------------------------------------------ nouns

VOCABULARY = """board can chair child chopsticks drawing dog drink glass goose individual knife leave light man orange people
    person potato scarf shelf ski sunglasses TV vase watch water woman e-book building beach berry""".split()


@pytest.mark.parametrize(("text", "expected"), [
    ("Two women, three men and the children.", "woman child"),  # WordNet has the lemma men
    ("Knives, shelves; scarves potatoes geese", "shelf scarf potato goose"),  # no lemma begins with a capital
    ("Dogs. A dog. dogs", "dog dog"),
    ("some vases, a vase and leaves", "vase"),  # lemmas vas and leaf
    ("sunglasses and chopsticks near two glasses", "glass"),
    ("a TV, two TVs and a tv", "TV"),
    ("The e-book's dog-house, dog/man and 'dog' 'dogs", "e-book"),
    ("people can see a trash can", "people"),  # always a modal
    ("A person's dog isn't here.", "person dog"),
    ("waiting to board the train, on a board", "board"),
    ("The dog is next to water; they drink water.", "dog water water"),
    ("Spectators watch the man, who wears a watch.", "man watch"),
    ("relax and watch the dog", "dog"),
    ("People expectantly watch for the dog.", "dog"),
    ("A woman watches him; two watches.", "woman watch"),
    ("people ski down, on a ski slope, with skis", "people ski ski"),
    ("A man wears ski boots; skiers ski.", "man ski"),
    ("in the chair, drawing attention; a drawing.", "chair drawing"),
    ("a tall building; they are building it; the city's building", "building building"),
    ("an orange cat, an orange, orange juice, and two oranges", "orange orange orange"),
    ("a light blue wall under a light.", "light"),
    ("their individual styles, an individual is", "individual"),
    ("dog\nman\r\n\r\nwater…beach—beaches", "dog man water beach beach"),
    ("собака 犬 🐶", ""),
    ("", ""),
])  # fmt: skip
def test_nouns(text, expected):
    assert mentions(text, forms(VOCABULARY)) == expected.split()


def test_tokens():
    assert tokenize("It isn't the dog's. \"1,000\" (cats),dogs:e-book, a.m.") == [
        "It", "is", "n't", "the", "dog", "'s", ".", '"', "1,000", '"', "(", "cats", ")", ",", "dogs", ":", "e-book", ",",
        "a.m", "."]  # fmt: skip


# ------------------------------------------------------------------------------------------------ official files


@needs_fixtures
@pytest.mark.parametrize(("answer", "expected"), [
    ("No", {"discriminative": (66.3, 66.3, 100, 79.7), "existence": (100, 100, 100, 100),
            "attribute": (50, 50, 100, 66.7), "relation": (41.4, 41.4, 100, 58.6)}),
    ("Yes", {"discriminative": (33.7, 0, 0, 0), "existence": (0, 0, 0, 0),
             "attribute": (50, 0, 0, 0), "relation": (58.6, 0, 0, 0)}),
    ("no", dict.fromkeys(amber.POOLS, (0, 0, 0, 0))),
])  # fmt: skip
def test_constant_answers_score_as_published(answer, expected):
    rows = questions(FIXTURES / "amber", None, queries="discriminative")
    scores = score(rows, {row["id"]: answer for row in rows})
    assert {name: tuple(scores[name]["rounded"].values()) for name in expected} == expected
    assert {name: scores[name]["n"] for name in amber.POOLS} == {
        "discriminative": 14216, "existence": 4924, "attribute": 7628, "state": 4764, "number": 2072, "action": 792,
        "relation": 1664}  # fmt: skip


@needs_fixtures
def test_perfect_responses_to_the_official_questions():
    """Descriptions that name every object hallucinate nothing; what no lemma or association reaches stays uncovered."""
    rows = questions(FIXTURES / "amber", None)
    said = {row["id"]: row["label"].capitalize() if "label" in row else
            ", ".join(f"the {word}" for word, *_ in row["truth"]) for row in rows}  # fmt: skip
    scores = score(rows, said)
    assert len(rows) == 15220 and len(rows[0]["words"]) == 418 and len(rows[0]["safe"]) == 9
    assert scores["generative"]["hallucinated"] == 0 and scores["generative"]["cover"] > 0.9
    assert scores["discriminative"]["accuracy"] == 1 and scores["amber"]["amber"] == 1
    assert scores["discriminative"]["rounded"]["f1"] == 100.0
    assert scores["existence"]["rounded"]["f1"] == 100.0


@needs_fixtures
def test_the_vocabulary_has_these_forms():
    """Counts agreed with NLTK's lemmatiser and WordNet 3.0 on every noun and plural of WordNet."""
    words = questions(FIXTURES / "amber", None, queries="generative")[0]["words"]
    known = forms(words)
    assert set(words) - set(known.values()) == {"chopsticks", "earrings", "slippers", "sunglasses"}
    lost = {word for word in words if list(known.values()).count(word) == 1}
    assert {"leave", "vase", "TV", "streetlamp"} <= lost and len(lost) == 26
