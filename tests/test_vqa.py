"""VQA accuracy, TextVQA, VizWiz, GQA: hand-made cases, properties, and the form of official answer files."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import gqa, textvqa, vizwiz
from metrics.vqa import CONTRACTIONS, SUFFIX, accuracy, normalise

FORMATS = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "formats"
needs_formats = pytest.mark.skipif(not FORMATS.is_dir(), reason="official answers are not here")
TEN = ["a1"] * 10


def write(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FORMATS / name).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(("equal", "expected"), [*enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1])])
def test_accuracy_by_equal_annotators(equal, expected):
    assert accuracy("yes", ["yes"] * equal + ["no"] * (10 - equal)) == expected


def test_accuracy_is_the_mean_over_annotators_left_out():
    rng = random.Random(0)
    for n in (1, 2, 4, 10):
        for _ in range(20):
            answers = [rng.choice("xyz") for _ in range(n)]
            left_out = [min(1, (answers[:i] + answers[i + 1 :]).count("x") / 3) for i in range(n)]
            assert accuracy("x", answers) == pytest.approx(sum(left_out) / n, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "evalai", "classic"),
    [
        ("1,000", "1000", "1000"),
        ("a b, 1,5 c-d", "b 15 c d", "b 15 cd"),
        ("U.S.A.", "usa", "usa"),
        ("ten-four", "10 4", "10 4"),
        ("the dog's", "dog 's", "dog's"),
        ("a/b", "b", "b"),
        ("$5.00", "$5.00", "$5.00"),
        ("12:30pm", "12:30pm", "12:30pm"),
        ("DONT", "don't", "don't"),
        ("well -known - dash-ed", "well known dashed", "well known dashed"),
        ("x -y z-w", "x y zw", "x y zw"),
        ("x- y z-w", "x y zw", "x y zw"),
        ("what,who?", "whatwho", "what who"),
        ("none\nof\tThe  Two ", "0 of 2", "0 of 2"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("x" + "." * 40, "x" + "." * 8, "x" + "." * 8),
        ("3.5.", "3.5", "3.5"),
        ("a", "", ""),
        ("İstanbul, ÉTÉ", "i̇stanbul été", "i̇stanbul été"),
    ],
)
def test_normalisation(text, evalai, classic):
    assert (normalise(text), normalise(text, "classic")) == (evalai, classic)


def test_contractions():
    assert len(CONTRACTIONS) == 114  # the released 120 without 2 that change nothing and 4 in upper case, never met
    assert CONTRACTIONS["hed've"] == CONTRACTIONS["he'dve"] == "he'd've"
    assert CONTRACTIONS["'ow'sat"] == "'ow's'at" and CONTRACTIONS["twas"] == "'twas"


def test_classic_normalises_nothing_where_annotators_agree():
    assert accuracy("two", ["Two"] * 10, "classic") == 0.0
    assert accuracy(" Two\n", ["Two"] * 10, "classic") == 1.0
    assert accuracy("two", ["Two"] * 9 + ["2"], "classic") == 1.0
    assert accuracy("two", ["Two"] * 10, "evalai") == 1.0


# ----------------------------------------------------------------------------------------------- TextVQA


def textvqa_file(folder: Path, items: list[tuple]) -> Path:
    data = [{"question_id": number, "image_id": image, "question": question, "answers": answers}
            for number, image, question, answers in items]  # fmt: skip
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_name": "val", "data": data})
    return folder


@pytest.fixture()
def text_rows(tmp_path) -> list[dict]:
    items = [(7, "aa", "what is it?", TEN), (8, "aa", "Who is it?", ["b"] * 3 + ["c"] * 7), (9, "bb", "what is it?", TEN)]
    return textvqa.questions(textvqa_file(tmp_path, items), None)


def test_textvqa_rows(text_rows):
    assert [row["id"] for row in text_rows] == ["7", "8", "9"]
    assert text_rows[1]["image"] == "aa.jpg" and text_rows[1]["prompt"] == "Who is it?" + SUFFIX
    assert text_rows[0]["prompt"] == "What is it?" + SUFFIX


def test_textvqa_score(text_rows):
    scores = textvqa.score(text_rows, {"7": "A1.", "8": "b", "9": "nothing"})
    assert scores["accuracy"] == pytest.approx((1 + 0.9 + 0) / 3, abs=1e-15)
    assert scores["rounded"] == {"accuracy": 63.33} and scores["n"] == 3
    assert textvqa.table(scores)[1] == ("63.33", "3")
    assert textvqa.score(text_rows[::-1], {"9": "nothing", "8": "b", "7": "A1."}) == scores
    assert textvqa.score(text_rows, dict.fromkeys("789", ""))["accuracy"] == 0.0
    assert textvqa.score([], {})["accuracy"] == 0.0


def test_textvqa_joins_llava_answers_by_image_and_question(text_rows, tmp_path):
    tokens = "\nReference OCR token: A, B" + SUFFIX
    path = write_lines(tmp_path / "answers.jsonl", [
        {"question_id": "bb", "prompt": "What is it?" + SUFFIX, "text": "third"},
        {"question_id": "aa", "prompt": "Who is it?" + tokens, "text": "second"},
        {"question_id": "aa", "prompt": "Reference OCR token: A\nWHAT is it?" + SUFFIX, "text": "first"},
    ])  # fmt: skip
    assert textvqa.read_answers(path, text_rows) == {"7": "first", "8": "second", "9": "third"}
    ours = write_lines(tmp_path / "ours.jsonl", [{"id": "8", "text": "x"}, {"question_id": 7, "text": "y"}])
    assert textvqa.read_answers(ours, text_rows, subset=True) == {"7": "y", "8": "x"}
    with pytest.raises(BadInput, match=r"1 of 3 ids are missing: '9'"):
        textvqa.read_answers(ours, text_rows)


def test_textvqa_question_asked_twice(tmp_path):
    rows = textvqa.questions(textvqa_file(tmp_path, [(1, "aa", "what?", TEN), (2, "aa", "What?", ["b"] * 10)]), None)
    answers = [{"question_id": "aa", "prompt": "What?" + SUFFIX, "text": text} for text in ("a1", "b")]
    said = textvqa.read_answers(write_lines(tmp_path / "a.jsonl", answers), rows)
    assert said == {"1": "a1", "2": "b"}
    assert textvqa.score(rows, said)["accuracy"] == 1.0
    assert textvqa.score(rows, said, copies="last")["accuracy"] == 0.5
    with pytest.raises(BadInput, match="was already given at .*:2"):
        textvqa.read_answers(write_lines(tmp_path / "b.jsonl", [*answers, answers[0]]), rows)


def test_textvqa_bad_answers_are_all_named(text_rows, tmp_path):
    path = write_lines(tmp_path / "answers.jsonl", [
        {"question_id": "aa", "prompt": "Why?", "text": "x"}, {"question_id": "aa", "text": "x"},
        {"question_id": "zz", "text": "x"}, {"id": 7, "text": 1}, {"text": "x"}, {"id": 7.5, "text": "x"},
    ])  # fmt: skip
    with pytest.raises(BadInput) as error:
        textvqa.read_answers(path, text_rows)
    assert [line.removeprefix(f"{path}:").split(" (")[0] for line in str(error.value).splitlines()] == [
        "1: image aa has no question 'why?'", "2: has no prompt that tells which question about the image it answers",
        "3: unknown id 'zz'", "4: want one text", "5: no id", "6: 7.5 is no id"]  # fmt: skip


def test_textvqa_ocr_takes_llavas_prompts(tmp_path):
    folder = textvqa_file(tmp_path, [(7, "aa", "what is it?", TEN)])
    with pytest.raises(BadInput, match="llava_textvqa_val_v051_ocr.jsonl; published at"):
        textvqa.questions(folder, None, ocr=True)
    prompt = "What is it?\nReference OCR token: A, B" + SUFFIX
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "aa", "image": "aa.jpg", "text": prompt}])
    assert textvqa.questions(folder, None, ocr=True)[0]["prompt"] == prompt
    write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "ab", "text": prompt}])
    with pytest.raises(BadInput, match="has no question 7, 'what is it"):
        textvqa.questions(folder, None, ocr=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": []}, "want a filled JSON list 'data'"),
        ([], "want a filled JSON list 'data'"),
        ({"data": [{"question_id": 1, "image_id": "a", "question": "q"}]}, "val.json:1: has no 'answers'"),
        ({"data": [{"question_id": 1, "image_id": "a", "question": "q", "answers": TEN[:9]}]}, "val.json:1: has 9 answers, not ten"),
        ({"data": [{"question_id": 1, "image_id": "a", "question": "q", "answers": TEN}] * 2}, "'1' is given 2 times"),
    ],
)
def test_textvqa_bad_annotations(tmp_path, content, message):
    write(tmp_path / "TextVQA_0.5.1_val.json", content)
    with pytest.raises(BadInput, match=message):
        textvqa.questions(tmp_path, None)


def test_missing_images_are_all_named(tmp_path):
    folder = textvqa_file(tmp_path, [(1, "aa", "q", TEN), (2, "bb", "q", TEN), (3, "cc", "q", TEN)])
    (tmp_path / "bb.jpg").touch()
    with pytest.raises(BadInput) as error:
        textvqa.questions(folder, tmp_path)
    assert str(error.value) == f"{tmp_path / 'aa.jpg'}: no such image\n{tmp_path / 'cc.jpg'}: no such image"


@needs_formats
def test_official_textvqa_answers_join(tmp_path):
    answers = lines("textvqa_answers_head.jsonl")
    items = [(n, row["question_id"], row["prompt"].split("\n")[0].lower(), [row["text"]] * 10)
             for n, row in enumerate(answers)]  # fmt: skip
    rows = textvqa.questions(textvqa_file(tmp_path, items), None)
    random.Random(0).shuffle(rows)
    said = textvqa.read_answers(FORMATS / "textvqa_answers_head.jsonl", rows)
    assert {key: said[key] for key in map(str, range(40))} == {str(n): row["text"] for n, row in enumerate(answers)}
    assert textvqa.score(rows, said)["accuracy"] == 1.0


# ------------------------------------------------------------------------------------------------ VizWiz


def vizwiz_rows(folder: Path) -> list[dict]:
    write(folder / "val.json", [
        {"image": f"VizWiz_val_0000000{n}.jpg", "question": "What?", "answer_type": kind, "answerable": 1,
         "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers]}
        for n, (kind, answers) in enumerate([("other", TEN), ("unanswerable", ["unanswerable"] * 2 + TEN[:8])])
    ])  # fmt: skip
    return vizwiz.questions(folder, None)


def test_vizwiz_score(tmp_path):
    rows = vizwiz_rows(tmp_path)
    assert rows[0]["prompt"] == "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SUFFIX
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "Unanswerable."}, {"id": "VizWiz_val_00000000", "text": "A1"}])
    scores = vizwiz.score(rows, vizwiz.read_answers(path, rows))
    assert scores["accuracy"] == pytest.approx(0.8) and scores["rounded"] == {"accuracy": 80.0}
    assert scores["by_type"] == {"other": {"n": 1, "accuracy": 1.0}, "unanswerable": {"n": 1, "accuracy": 0.6}}
    assert vizwiz.table(scores)[1:] == [("other", "100.00", "1"), ("unanswerable", "60.00", "1"), ("all", "80.00", "2")]


def test_vizwiz_refuses(tmp_path):
    rows = vizwiz_rows(tmp_path)
    path = write_lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "a"}, {"image": "VizWiz_val_00000000.jpg", "text": "a"},
                                              {"question_id": 5, "text": "a"}])  # fmt: skip
    with pytest.raises(BadInput, match=r"(?s):2: id .* already given at .*:1.*:3: unknown id '5'"):
        vizwiz.read_answers(path, rows)
    write(tmp_path / "val.json", [{"image": "x.jpg", "question": "?", "answers": [{"answer": 1}]}])
    with pytest.raises(BadInput, match="val.json:1: 'answer' must be a string, found 1"):
        vizwiz.questions(tmp_path, None)


@needs_formats
def test_vizwiz_upload_is_llavas(tmp_path):
    expected = json.loads((FORMATS / "vizwiz_upload_head.json").read_text(encoding="utf-8"))
    write(tmp_path / "test.json", [{"image": row["image"], "question": "?"} for row in expected])
    rows = vizwiz.questions(tmp_path, None, split="test")
    said = vizwiz.read_answers(FORMATS / "vizwiz_answers_head.jsonl", rows)
    scores = vizwiz.score(rows, said)
    assert scores == {"n": 40, "upload": expected}
    assert vizwiz.upload(rows[:1], {rows[0]["id"]: "The Two."}) == [{"image": rows[0]["image"], "answer": "2"}]
    assert vizwiz.read_answers(write(tmp_path / "upload.json", expected), rows)["VizWiz_test_00000003.jpg"] == "laptop"
    assert vizwiz.table(scores)[1][1] == "40"


# --------------------------------------------------------------------------------------------------- GQA


def gqa_rows(folder: Path) -> list[dict]:
    write(folder / "testdev_balanced_questions.json", {
        "1": {"imageId": "n1", "question": "Is it?", "answer": "yes", "types": {"structural": "verify", "semantic": "attr"}},
        "2": {"imageId": "n1", "question": "What?", "answer": "dog", "types": {"structural": "query", "semantic": "obj"}},
        "3": {"imageId": "n2", "question": "Who?", "answer": "t-shirt", "types": {"structural": "query", "semantic": "obj"}},
    })  # fmt: skip
    return gqa.questions(folder, None)


def test_gqa_score(tmp_path):
    rows = gqa_rows(tmp_path)
    assert rows[0]["image"] == "n1.jpg" and rows[0]["prompt"] == "Is it?" + SUFFIX
    said = {"1": "Yes..", "2": " dog", "3": "T shirt"}
    scores = gqa.score(rows, said)
    assert (scores["n"], scores["right"], scores["accuracy"]) == (3, 1, pytest.approx(1 / 3))
    assert scores["by_kind"] == {"binary": {"n": 1, "accuracy": 1.0}, "open": {"n": 2, "accuracy": 0.0}}
    assert scores["by_semantic"]["obj"]["n"] == 2 and scores["rounded"] == {"accuracy": 33.33}
    assert gqa.score(rows[::-1], said) == scores
    assert gqa.table(scores)[-1] == ("all", "33.33", "3")
    assert gqa.score(rows, {"1": "Yes!", "2": "dog", "3": "Tshirt"}, rules="lmms")["right"] == 3
    assert gqa.score(rows, dict.fromkeys("123", "Yes"))["right"] == 1
    assert gqa.score(rows, dict.fromkeys("123", ""))["right"] == 0


def test_gqa_reads_both_forms(tmp_path):
    rows = gqa_rows(tmp_path)
    official = write(tmp_path / "p.json", [{"questionId": n, "prediction": f"p{n}"} for n in "321"])
    llava = write_lines(tmp_path / "a.jsonl", [{"question_id": n, "prompt": "Is it?", "text": f"p{n}"} for n in "132"])
    assert gqa.BENCHMARK.read_answers(official, rows) == gqa.BENCHMARK.read_answers(llava, rows) == {"1": "p1", "2": "p2", "3": "p3"}
    for data in (b"\xef\xbb\xbf" + llava.read_bytes(), llava.read_bytes().replace(b"\n", b"\r\n")):
        (tmp_path / "b.jsonl").write_bytes(data)
        assert gqa.BENCHMARK.read_answers(tmp_path / "b.jsonl", rows) == {"1": "p1", "2": "p2", "3": "p3"}


def test_gqa_without_types(tmp_path):
    write(tmp_path / "testdev_balanced_questions.json", {"1": {"imageId": "n1", "question": "Is it?", "answer": "yes"}})
    scores = gqa.score(gqa.questions(tmp_path, None), {"1": "yes"})
    assert scores["by_kind"] == {} and gqa.table(scores)[1:] == [("all", "100.00", "1")]


@needs_formats
def test_official_gqa_answers_join(tmp_path):
    answers = lines("gqa_answers_head.jsonl")
    write(tmp_path / "testdev_balanced_questions.json", {
        row["question_id"]: {"imageId": "n1", "question": "?", "answer": row["text"].lower()} for row in answers})  # fmt: skip
    rows = gqa.questions(tmp_path, None)
    assert gqa.score(rows, gqa.BENCHMARK.read_answers(FORMATS / "gqa_answers_head.jsonl", rows))["right"] == 40
