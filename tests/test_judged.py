"""MM-Vet, LLaVA-Bench and MMHal-Bench: official reviews to the digit, hand arithmetic, the released ways to read a reply,
strict files."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import judged, llavabench, mmhal, mmvet
from metrics.answers import join

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="official reviews are not here")


def write(path: Path, value) -> Path:
    """A JSON file, or JSONL of a list where the name says so."""
    rows = [json.dumps(row) for row in value] if path.suffix == ".jsonl" else [json.dumps(value)]
    path.write_text("\n".join(rows) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ official figures


@needs_fixtures
def test_mmvet_official_grades():
    rows = mmvet.questions(FIXTURES / "mmvet")
    scores = mmvet.score(rows, {}, mmvet.read_replies(FIXTURES / "mmvet" / "grades_llava-v1.5-13b.json", rows))
    assert scores["n"] == 218 and scores["unparsed"] == [0] and scores["runs"] == 1
    found = scores["rounded"]["mean"]
    assert {name: found[name] for name in ("total", *mmvet.CAPABILITIES)} == {
        "total": 36.1, "rec": 40.6, "ocr": 28.0, "know": 23.5, "gen": 24.4, "spat": 34.7, "math": 7.7}
    combinations = {name: n for name, n in scores["counts"].items() if "+" in name or "only" in name}
    assert len(combinations) == 16 and sum(combinations.values()) == 218
    assert combinations["rec+know+gen"] == 62 and combinations["rec only"] == 37
    assert mmvet.table(scores)[1] == ("total", "218", "36.1")


@needs_fixtures
def test_llavabench_official_reviews():
    """detail is 52.65: only with means of three decimals it prints as 52.6."""
    path = FIXTURES / "llavabench" / "reviews_llava-v1.5-13b.jsonl"
    rows = llavabench.questions(path)
    scores = llavabench.score(rows, {}, llavabench.read_replies(path, rows))
    assert scores["rounded"]["mean"] == {"all": 72.8, "complex": 82.8, "conv": 74.7, "detail": 52.6}
    assert scores["counts"] == {"all": 60, "complex": 28, "conv": 17, "detail": 15} and scores["unparsed"] == [0]


# ----------------------------------------------------------------------------------------------------------- MM-Vet

VET = {
    "v1_0": {"imagename": "a.png", "question": "x?", "answer": "1<AND>2<OR>3", "capability": ["math", "ocr"]},
    "v1_1": {"imagename": "b.png", "question": "y?", "answer": "cat", "capability": ["rec"]},
    "v1_2": {"imagename": "b.png", "question": "z?", "answer": "dog", "capability": ["rec", "know"]},
}


@pytest.fixture
def vet(tmp_path):
    write(tmp_path / "mm-vet.json", VET)
    return mmvet.questions(tmp_path)


@pytest.mark.parametrize(("reply", "grade"), [
    ("0.5", 0.5), ("1", 1), ("0.7 because", 0.7), ("0.0\n", 0), (" 0.5", None), ("1.1", None), ("-0.1", None),
    ("nan", None), ("inf", None), ("Score: 1", None), ("", None), ("½", None)])  # fmt: skip
def test_mmvet_grade(reply, grade):
    assert mmvet.read_grade(reply) == grade


def test_mmvet_by_hand(vet):
    """Runs 1: .5 1 -, 2: .5 .4 .9. rec: (1 + 0) / 2 and (.4 + .9) / 2; total 50 and 60."""
    runs = [{"v1_0": "0.5", "v1_1": "1.0", "v1_2": "?"}, {"v1_0": "0.5", "v1_1": "0.4", "v1_2": "0.9"}]
    scores = mmvet.score(vet, {}, runs)
    assert scores["mean"] == pytest.approx({"total": 55, "ocr": 50, "math": 50, "ocr+math": 50, "rec": 57.5, "know": 45,
                                            "rec only": 70, "rec+know": 45})
    assert scores["totals"] == pytest.approx([50, 60]) and scores["unparsed"] == [1, 0]
    assert scores["rounded"]["deviation"]["total"] == 5.0 and scores["rounded"]["deviation"]["rec"] == 7.5
    assert ("total", "3", "55.0 ± 5.0") in mmvet.table(scores)
    shuffled = random.Random(1).sample(vet, 3)
    assert mmvet.score(shuffled, {}, runs)["mean"] == pytest.approx(scores["mean"])
    with pytest.raises(BadInput, match="run 2 .* 1 ids: 'v1_2'"):
        mmvet.score(vet, {}, [runs[0], {"v1_0": "1", "v1_1": "1"}])
    with pytest.raises(BadInput, match="no replies"):
        mmvet.score(vet, {}, [])


def test_mmvet_request(vet):
    image, text = mmvet.requests(vet, dict.fromkeys(VET, "{question} | 1"))["v1_0"]
    assert image is None and text.endswith("\nx? | 1 <AND> 2 <OR> 3 | {question} | 1 | ")


def test_mmvet_grade_files(vet, tmp_path):
    """The score counts, also where the judge's last word was not it; runs are split."""
    entry = {"model": ["m"] * 2, "content": ["0.5", "Sorry"], "score": [0.5, 0.0]}
    table = {**dict.fromkeys(VET, entry), "v1_1": {"content": ["0.2", "1.0"], "score": [0.2, 0]}}
    runs = mmvet.read_replies(write(tmp_path / "g.json", table), vet)
    assert runs == [{"v1_0": "0.5", "v1_1": "0.2", "v1_2": "0.5"}, {"v1_0": "Sorry", "v1_1": "0", "v1_2": "Sorry"}]
    wrong = {"v1_0": {"content": ["1"], "score": ["1"]}, "v1_1": {"content": [1], "score": [1.0]},
             "v1_2": {"content": ["1"], "score": [True]}, "v2": entry, "v3": [], "v4": {"score": [1, 1], "content": ["1"]}}
    with pytest.raises(BadInput) as error:
        mmvet.read_replies(write(tmp_path / "g.json", wrong), vet)
    assert str(error.value).count("g.json:'v") == 6
    del table["v1_2"]
    with pytest.raises(BadInput, match="1 of 3 ids are missing: 'v1_2'"):
        mmvet.read_replies(write(tmp_path / "g.json", table), vet)
    table["v1_2"] = {"content": ["1"], "score": [1]}
    with pytest.raises(BadInput, match="equally many grades, found 1 and 2"):
        mmvet.read_replies(write(tmp_path / "g.json", table), vet)


def test_mmvet_answers(vet, tmp_path):
    said = {key: f"é {key}" for key in VET}
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(said, indent=1, ensure_ascii=False).replace("\n", "\r\n").encode())
    assert mmvet.read_answers(path, vet) == said
    rows = [{"question_id": key, "prompt": "x?", "text": text, "metadata": {}} for key, text in said.items()]
    assert mmvet.read_answers(write(tmp_path / "a.jsonl", rows), vet) == said
    assert mmvet.read_answers(write(tmp_path / "list.json", rows), vet) == said
    assert mmvet.read_answers(write(path, {"v1_1": ""}), vet, subset=True) == {"v1_1": ""}
    with pytest.raises(BadInput, match="2 of 3 ids are missing"):
        mmvet.read_answers(path, vet)
    with pytest.raises(BadInput, match="2 of 2 ids are missing"):
        join(path, [{"id": "a"}, {"id": "b"}], entries=[], subset=True)
    with pytest.raises(BadInput) as error:
        mmvet.read_answers(write(path, {"v1_0": 1, "v9": "a", "v1_1": "b", "v1_2": "c"}), vet)
    assert str(error.value).count("\n") == 1 and "want one text" in str(error.value) and "unknown id" in str(error.value)


def test_mmvet_questions_are_checked(tmp_path):
    write(tmp_path / "mm-vet.json", {"a": {**VET["v1_0"], "capability": ["sing"]}, "b": {"question": 3}, "c": VET["v1_1"]})
    with pytest.raises(BadInput) as error:
        mmvet.questions(tmp_path)
    assert str(error.value).count("mm-vet.json:'") == 2
    write(tmp_path / "mm-vet.json", VET)
    (tmp_path / "b.png").touch()
    with pytest.raises(BadInput, match=r"a.png: no such image$"):
        mmvet.questions(tmp_path, tmp_path)
    with pytest.raises(BadInput, match="mm-vet.zip"):
        mmvet.questions(FIXTURES / "chair" if FIXTURES.is_dir() else Path(__file__).parent)


# ------------------------------------------------------------------------------------------------------- LLaVA-Bench


@pytest.mark.parametrize(("reply", "ratings"), [
    ("8 9\nwhy", (8, 9)), ("8,9", (8, 9)), ("8, 9\n", None), ("9 6.5", (9, 6.5)), ("8", None), ("8 9 ", None),
    ("\n8 9", None), ("8 9 10", None), ("eight 9", None), ("", None), ("nan 1", None)])  # fmt: skip
def test_llavabench_ratings(reply, ratings):
    assert llavabench.read_ratings(reply) == ratings


def test_llavabench_by_hand(tmp_path):
    """conv: means (8 + 6) / 2 and (4 + 6) / 2. detail: a failed reply is -1 and -1. Second run: the same to both."""
    path = write(tmp_path / "r.jsonl", [
        {"question_id": 0, "category": "llava_bench_conv", "content": "8 4\n", "tuple": [8, 4]},
        {"question_id": 1, "category": "llava_bench_conv", "content": "6 6\n", "tuple": [6, 6]},
        {"question_id": 2, "category": "llava_bench_detail", "content": "no", "tuple": [-1, -1]}])
    rows = llavabench.questions(path)
    runs = llavabench.read_replies(path, rows) + [{"0": "5 5", "1": "5 5", "2": "5 5"}]
    first = llavabench.score(rows, {}, runs[:1])
    assert first["ratings"] == [{"all": pytest.approx((13 / 3, 3)), "conv": (7, 5), "detail": (-1, -1)}]
    assert first["rounded"]["mean"] == {"all": 69.2, "conv": 71.4, "detail": 100} and first["unparsed"] == [1]
    both = llavabench.score(rows[::-1], {}, runs)
    assert both["mean"]["conv"] == pytest.approx((500 / 7 + 100) / 2) and both["unparsed"] == [1, 0]
    assert llavabench.table(both)[1][2] == "85.7 ± 14.3"
    assert llavabench.score(rows[:1], {}, [{"0": "0 3"}])["mean"]["all"] == 0
    with pytest.raises(BadInput, match="official files"):
        llavabench.requests(rows, dict.fromkeys("012", ""))


def test_llavabench_tuple_counts(tmp_path):
    """A review whose ratings were corrected by hand; wrong ones are listed."""
    row = {"question_id": 0, "category": "llava_bench_conv", "content": "8 and 4", "tuple": [8, 4.5]}
    path = write(tmp_path / "r.jsonl", [row])
    rows = llavabench.questions(path)
    assert llavabench.read_replies(path, rows) == [{"0": "8 4.5"}]
    write(path, [{**row, "tuple": [8]}, {**row, "tuple": ["8", "4"]}, {**row, "category": "llava_bench_detail"},
                 {**row, "category": 1}, {**row, "content": None}, {**row, "question_id": 7}])
    with pytest.raises(BadInput) as error:
        llavabench.read_replies(path, rows)
    assert [line.split("r.jsonl:")[1][0] for line in str(error.value).splitlines()] == list("123456")
    with pytest.raises(BadInput, match="r.jsonl: id '0' is given 2 times"):
        llavabench.questions(write(path, [row, row]))


def test_llavabench_questions(tmp_path):
    asked = [{"question_id": 3, "image": "1.jpg", "category": "conv", "text": "Who?"}]
    write(tmp_path / "questions.jsonl", asked)
    write(tmp_path / "context.jsonl", [{"id": "1", "image": "1.jpg", "caption": "A {question}."}])
    write(tmp_path / "answers_gpt4.jsonl", [{"question_id": 3, "text": "Nobody."}])
    (row,) = llavabench.questions(tmp_path)
    assert row == {"id": "3", "category": "conv", "image": "1.jpg", "prompt": "Who?", "context": "A {question}.",
                   "reference": "Nobody."}
    image, text = llavabench.requests([row], {"3": "She."})["3"]
    assert image is None and [text.index(part) for part in ("A {question}.", "Who?", "Nobody.", "She.")] == sorted(
        text.index(part) for part in ("A {question}.", "Who?", "Nobody.", "She."))
    write(tmp_path / "context.jsonl", [{"image": "1.jpg", "caption": ["One.", "Two."]}])
    assert llavabench.questions(tmp_path)[0]["context"] == "One.\nTwo."
    write(tmp_path / "context.jsonl", [{"image": "2.jpg", "caption": ""}])
    with pytest.raises(BadInput, match="questions.jsonl:1: context.jsonl has nothing for '1.jpg'"):
        llavabench.questions(tmp_path)


# --------------------------------------------------------------------------------------------------------- MMHal-Bench


@pytest.fixture
def hal(tmp_path):
    write(tmp_path / "response_template.json", [
        {"question_type": kind, "image_id": f"i{n}", "image_src": f"https://x/{n}_o.jpg", "image_content": ["Cat", "Sofa"],
         "question": f"q{n}?", "gt_answer": f"g{n}", "model_answer": ""}
        for n, kind in enumerate(mmhal.TYPES)])  # fmt: skip
    return mmhal.questions(tmp_path)


@pytest.mark.parametrize(("reply", "rating"), [
    ("Fine.\nRating: 6, very informative", 6), ("RATING: 0", 0), ("Rating: 5 ... Rating: 5", 5),
    ("Rating: 5, not Rating: 6", None), ("Rating 4", None), ("Rating:4", None), ("Rating: 7", None), ("Rating: 10", 1),
    ("", None)])  # fmt: skip
def test_mmhal_rating(reply, rating):
    assert mmhal.read_rating(reply) == rating


def test_mmhal_by_hand(hal):
    """6 5 4 3 2 1 0 and one unreadable: score 21 / 8, 4 of 8 below 3, informativeness (3 + 2 + 1 + 0 + 2 + 1) / 24."""
    runs = [{f"i{n}": f"Rating: {6 - n}" if n < 7 else "?" for n in range(8)}, {f"i{n}": "Rating: 3" for n in range(8)}]
    scores = mmhal.score(hal, {}, runs[:1])
    mean = scores["mean"]
    assert (mean["score"], mean["hallucination_rate"], mean["informativeness"]) == (21 / 8, 0.5, pytest.approx(9 / 24))
    assert [mean[kind] for kind in mmhal.TYPES] == [6, 5, 4, 3, 2, 1, 0, 0]
    assert scores["hallucinated"] == [4] and scores["unparsed"] == [1]
    assert scores["rounded"]["mean"]["informativeness"] == 37.5 and scores["rounded"]["mean"]["score"] == 2.62
    both = mmhal.score(hal[::-1], {}, runs)
    assert both["mean"]["score"] == 2.8125 and both["deviation"]["score"] == 0.1875 and both["hallucinated"] == [4, 0]
    assert mmhal.table(both)[1][:2] == ("2.81 ± 0.19", "0.25 ± 0.25")


def test_mmhal_requests(hal):
    said = {f"i{n}": f"a{n}" for n in range(8)}
    image, text = mmhal.BENCHMARK.requests(hal, said)["i2"]
    assert image is None and text.endswith("contents: Cat, Sofa\nQuestion: q2?\nHuman answer: g2\nResponse: a2\n")
    assert mmhal.BENCHMARK_V.requests(hal, said)["i2"] == ("2_o.jpg", text)
    assert mmhal.BENCHMARK_V.requests(hal, said, prompt="{}|{}|{}|{}")["i2"] == ("2_o.jpg", "Cat, Sofa|q2?|g2|a2")
    for reply in (f"Rating: {n}" for n in range(7)):  # what the prompt offers can be read
        assert reply in mmhal.PROMPT


def test_mmhal_files(hal, tmp_path):
    """The filled-in template, reviews as completions or texts, images by id or by the name of their source."""
    template = json.loads((tmp_path / "response_template.json").read_text())
    answers = write(tmp_path / "a.json", [{**row, "model_answer": row["question"] + "!"} for row in template])
    assert mmhal.BENCHMARK.read_answers(answers, hal) == {f"i{n}": f"q{n}?!" for n in range(8)}
    completions = [{"choices": [{"message": {"content": f"Rating: {n % 7}"}}]} for n in range(8)]
    for reviews in (completions, [f"Rating: {n % 7}" for n in range(8)]):
        (run,) = mmhal.read_replies(write(tmp_path / "r.json", reviews), hal)
        assert run == {f"i{n}": f"Rating: {n % 7}" for n in range(8)}
    with pytest.raises(BadInput, match="7 reviews of 8 answers"):
        mmhal.read_replies(write(tmp_path / "r.json", completions[:7]), hal)
    for bad in ({"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": None}}]}, 3, {}, [1]):
        with pytest.raises(BadInput, match="r.json:1: "):
            mmhal.read_replies(write(tmp_path / "r.json", [bad, *completions[1:]]), hal)
    images = tmp_path / "images"
    images.mkdir()
    for n in range(8):
        (images / (f"i{n}.png" if n % 2 else f"{n}_o.jpg")).touch()
    assert [row["image"] for row in mmhal.questions(tmp_path, images)][:2] == ["0_o.jpg", "i1.png"]
    (images / "i3.png").unlink()
    with pytest.raises(BadInput, match="3_o.jpg: no such image"):
        mmhal.questions(tmp_path, images)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_fill_in_one_pass():
    assert judged.fill('{b}{"x": {other}}{a}', a="{b}", b="1") == '1{"x": {other}}{b}'
    assert judged.fill("{} and {}", a="1", b="2") == "1 and 2"
    with pytest.raises(BadInput, match=r"has no \{b\}, \{c\}"):
        judged.fill("{a}", a="1", b="2", c="3")
