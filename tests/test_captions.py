"""COCO captions: tokens, BLEU, ROUGE-L, CIDEr-D and METEOR by hand, properties, the files, parity where it can be had."""

import json
import os
import random
from math import exp, log, sqrt
from pathlib import Path

import pytest

from common import BadInput
from metrics import coco_captions
from metrics.meteor import meteor
from metrics.ngrams import bleu, cider_d, longest_common, rouge_l
from metrics.ptb import AMERICAN, tokenize

CAPTIONS = [text.split() for text in ("a cat sat", "a dog", "the the the")]
REFERENCES = [[text.split() for text in texts] for texts in (["a cat sat down", "the cat"], ["a dog"], ["the cat"])]
close = lambda value: pytest.approx(value, rel=1e-9)


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog can't see the kids' toys.", "a man 's dog ca n't see the kids toys"),
        ("They’re here, he'll CAN'T we've cannot", "they 're here he 'll ca n't we 've can not"),
        ("(Black-and-white) photo [old]", "-lrb- black-and-white -rrb- photo -lsb- old -rsb-"),
        ('A sign: "STOP!" and ‘go’ -- now... wow!!', "a sign stop and go now wow !!"),
        ("It is 7:30 p.m. or 1,000 miles; 3.5-inch, 50%", "it is 7:30 p.m. or 1,000 miles 3.5-inch 50 %"),
        ("One on St. Mary Ave. in a car.", "one on st. mary ave. in a car"),
        ("red/white and 1/2 x*y", "red\\/white and 1\\/2 x \\* y"),
        ("a grey theatre, coloured neighbours', Grey contour", "a gray theater colored neighbors grey contour"),
        ("light-grey o'clock ma'am y'all rock 'n' roll", "light-grey o'clock ma'am y' all rock 'n' roll"),
        ("AT&T #1 $5 @home café 747", "at&t # 1 $ 5 @home café 747"),
        ("a 😀 smile🤷", "a smile"),
        ("one\ntwo\r\n three\u00a0four", "one two three four"),
        (" . ,", ""),
        ("", ""),
    ],
)
def test_tokens(text, expected):
    assert tokenize(text) == expected.split()


def test_american_spellings():
    assert [AMERICAN[word] for word in ("realising", "capitalisation", "analyse", "travelled", "neighbourhoods")] == [
        "realizing", "capitalization", "analyze", "traveled", "neighborhoods"]  # fmt: skip
    assert not any(word == american for word, american in AMERICAN.items())


def test_tokens_are_those_of_the_released_program():
    """Where pycocoevalcap and Java are."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = ["A man's grey cat can't see (two) black-and-white dogs.", 'The sign says "STOP!!" at 7:30 p.m. on Main St.',
             "A red/white bus - no. 7 - at the theatre, isn't it?", "Half-eaten 12 inch pizza & fries"]  # fmt: skip
    released = ptb.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert [tokenize(text) for text in texts] == [released[n][0].split() for n in range(len(texts))]


# ------------------------------------------------------------------------------------------------ scores


def test_bleu_by_hand():
    """Of the last caption one "the" counts; lengths 8 and 2 + 2 + 2, for of 4 and 2 the shorter is as near to 3."""
    first, second, third = 6 / 8, 3 / 5, 1 / 2
    smooth = 1e-15 / 1e-9
    assert bleu(CAPTIONS, REFERENCES) == close(
        [first, sqrt(first * second), (first * second * third) ** (1 / 3), (first * second * third * smooth) ** 0.25])


def test_bleu_brevity_takes_the_closest_reference():
    refs = [["a cat sat on it".split(), "a cat sat on the mat again".split()]]
    assert bleu([["a", "cat"]], refs)[:2] == pytest.approx([exp(1 - 5 / 2)] * 2, rel=1e-8)
    assert bleu([["a", "cat", "sat", "on", "it"]], refs) == close([1.0] * 4)
    assert bleu([["the", "the"]], [[["the"], ["the", "x"]]])[0] == close(1 / 2)  # as often as in one reference
    assert bleu([[]], refs) == [0.0] * 4 == bleu([], [])


def test_rouge_by_hand():
    """Of the first caption precision 3/3 and recall 3/4 (of "the cat" 1/2)."""
    f = lambda p, r: 2.44 * p * r / (r + 1.44 * p)
    assert rouge_l(CAPTIONS, REFERENCES) == close((f(1, 3 / 4) + 1 + f(1 / 3, 1 / 2)) / 3)
    assert rouge_l([["b"]], [[["a"]]]) == rouge_l([[]], [[["a"]]]) == rouge_l([], []) == 0.0
    apart = [[["a", "x", "x", "x"], ["a", "b"], ["q", "a", "b", "c", "q", "q", "q"]]]
    assert rouge_l([["a", "b", "c"]], apart) == close(f(3 / 3, 2 / 2))  # precision of the third, recall of the second
    assert longest_common("abcbdab", "bdcaba") == 4


def test_cider_by_hand():
    one, two = log(3), log(3) - log(2)  # weight of what one image shows, of what two show
    damped = exp(-1 / 72)  # one bigram more or less
    norm = sqrt(2 * two**2 + one**2)
    with_first = (2 * two**2 + one**2) / (norm * sqrt(2 * two**2 + 2 * one**2)) + 2 / sqrt(6) + 1 / sqrt(2)
    with_second = two**2 / (norm * two * sqrt(2))
    scores = [10 * damped * (with_first + with_second) / 4 / 2, 10 * 2 / 4, 10 * damped / (3 * sqrt(2)) / 4]
    assert cider_d(CAPTIONS, REFERENCES) == close(sum(scores) / 3)


def test_cider_edges():
    damped = exp(-1 / 72)
    assert cider_d([["a", "b"]], [[["a", "b"]]]) == 0.0  # one image: every n-gram is in all
    assert cider_d([], []) == 0.0 == cider_d([[], []], [[["a"]], [["b"]]])
    assert cider_d([["a", "new"], ["b"]], [[["a"]], [["b"]]]) == close(10 * (1 / sqrt(2) * damped + 1) / 4 / 2)
    words = "one two three four five".split()
    assert cider_d([words, words[::-1]], [[words], [["other"]]]) == close(5.0)


def test_scores_do_not_depend_on_order():
    rng = random.Random(0)
    sentence = lambda: rng.choices("a cat dog sat on the mat red big".split(), k=rng.randrange(0, 9))
    captions, refs = [sentence() for _ in range(30)], [[sentence() for _ in range(3)] for _ in range(30)]
    order = rng.sample(range(30), 30)
    for score in (bleu, rouge_l, cider_d):
        assert score([captions[i] for i in order], [refs[i][::-1] for i in order]) == close(score(captions, refs))


# ------------------------------------------------------------------------------------------------ METEOR


FAKE = """#!{python}
import sys
for line in sys.stdin:
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(parts[-1].split()), len(parts) - 1, flush=True)  # words of the caption, references
    else:
        for part in parts: print(0.1, flush=True)
        print(sum(int(part.split()[0]) * int(part.split()[1]) for part in parts) / 10, flush=True)
"""


@pytest.fixture()
def fake_java(tmp_path, monkeypatch) -> Path:
    import sys

    (tmp_path / "java").write_text(FAKE.format(python=sys.executable))
    (tmp_path / "java").chmod(0o755)
    (tmp_path / "meteor-1.5.jar").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "meteor-1.5.jar"


def test_meteor_asks_its_program(fake_java):
    assert meteor(fake_java, CAPTIONS, REFERENCES) == (3 * 2 + 2 * 1 + 3 * 1) / 10


def test_meteor_that_fails_is_said(fake_java, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="none.jar: not found"):
        meteor(tmp_path / "none.jar", CAPTIONS, REFERENCES)
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BadInput, match="METEOR failed"):
        meteor(fake_java, CAPTIONS, REFERENCES)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="METEOR needs Java"):
        meteor(fake_java, CAPTIONS, REFERENCES)


# --------------------------------------------------------------------------------------------- benchmark


def coco(folder: Path) -> Path:
    (folder / "captions_val2017.json").write_text(json.dumps({
        "images": [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 9, "file_name": "000000000009.jpg"}],
        "annotations": [{"id": 1, "image_id": 9, "caption": "A dog."}, {"id": 2, "image_id": 7, "caption": "A cat sat down."},
                        {"id": 3, "image_id": 7, "caption": "The cat!"}],
    }))  # fmt: skip
    return folder


def test_coco_rows_and_score(tmp_path, fake_java):
    rows = coco_captions.questions(coco(tmp_path), None)
    assert [row["id"] for row in rows] == ["7", "9"] and rows[0]["image"] == "000000000007.jpg"
    assert rows[0]["references"] == ["A cat sat down.", "The cat!"]
    scores = coco_captions.score(rows, {"7": "A cat sat down", "9": "A dog"})
    assert (scores["n"], scores["words"], scores["bleu_1"], scores["rouge_l"]) == (2, 3.0, close(1), 1.0)
    assert scores["cider"] == close(cider_d([["a", "cat", "sat", "down"], ["a", "dog"]],
                                            [[["a", "cat", "sat", "down"], ["the", "cat"]], [["a", "dog"]]]))  # fmt: skip
    assert scores["cap_val"] == close(100 * (scores["bleu_4"] + scores["rouge_l"] + scores["cider"]) / 3)
    scores = coco_captions.score(rows, {"7": "A cat", "9": "A dog"})
    assert scores["cap_val"] == close(100 * (scores["bleu_4"] + scores["rouge_l"] + scores["cider"]) / 3)
    four = coco_captions.score(rows, {"7": "A cat", "9": "A dog"}, cap_val="bleu1-4", meteor=fake_java)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")
    assert four["cap_val"] == close(100 * sum(four[name] for name in names) / 6)
    assert four["meteor"] == (2 * 2 + 2 * 1) / 10 and "meteor" not in scores
    assert coco_captions.table(four)[0][-3:] == ("meteor", "cap_val", "images")
    assert coco_captions.table(scores)[1][0] == f"{scores['bleu_1']:.3f}" and coco_captions.table(scores)[1][-1] == "2"
    empty = coco_captions.score(rows, {"7": "", "9": " "})
    assert empty["cider"] == empty["bleu_4"] == empty["rouge_l"] == 0.0
    assert coco_captions.score([], {})["cider"] == 0.0


def test_karpathy_split(tmp_path):
    image = lambda number, split: {"cocoid": number, "filename": f"{number}.jpg", "filepath": "val2014", "split": split,
                                   "sentences": [{"raw": "A cat."}, {"raw": "A dog."}]}  # fmt: skip
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [image(1, "train"), image(2, "test"), image(3, "val")]}))
    rows = coco_captions.questions(tmp_path, None, split="karpathy")
    assert [(row["id"], row["image"], row["references"]) for row in rows] == [("2", "2.jpg", ["A cat.", "A dog."])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "want a filled JSON list 'annotations'"),
        ({"images": []}, "want a filled JSON list 'annotations'"),
        ({"annotations": [{"image_id": "7", "caption": "x"}], "images": []}, "val2017.json:1: 'image_id' must be a whole number, found '7'"),
        ({"annotations": [{"image_id": 7, "caption": "x"}], "images": [{"id": 8, "file_name": "8.jpg"}]},
         "1 images have no caption, as 8.jpg"),
    ],
)  # fmt: skip
def test_bad_annotations(tmp_path, content, message):
    (tmp_path / "captions_val2017.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        coco_captions.questions(tmp_path, None)


def test_missing_images(tmp_path):
    with pytest.raises(BadInput, match="000000000007.jpg: no such image\n.*000000000009.jpg: no such image"):
        coco_captions.questions(coco(tmp_path), tmp_path)
