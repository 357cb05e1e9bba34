"""MME: arithmetic by hand, the three forms of answers, and what is refused."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import mme

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
TASKS = ("count", "landmark", "code_reasoning")


def release(root: Path) -> Path:
    """Two images in each of three tasks; landmark has folders of its own for images and questions."""
    for task in TASKS:
        texts = root / "MME_Benchmark_release_version" / task
        images = texts
        if task == "landmark":
            texts, images = texts / "questions_answers_YN", texts / "images"
        texts.mkdir(parents=True)
        images.mkdir(exist_ok=True)
        for stem in ("0001", "0002"):
            (images / f"{stem}.png").write_bytes(b"")
            (texts / f"{stem}.txt").write_bytes(
                f"\ufeffIs é in {task} {stem}? Please answer yes or no.\tYes\r\n"
                f"Is b in {task} {stem}?  Please answer yes or no.\tNo\r\n".encode()
            )
    return root


def llava(rows: list[dict], texts: dict[str, str]) -> list[dict]:
    """Answers as LLaVA writes them."""
    return [{"question_id": f"{row['task']}/{row['image'].rpartition('/')[2]}", "text": texts[row["id"]],
             "prompt": f"{row['question'].replace(' Please answer yes or no.', '')}\n{mme.WORD_SUFFIX}"}
            for row in rows]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_questions(tmp_path):
    """Ids are unique, images relative to the folder that is given, the label is the file's."""
    data = release(tmp_path)
    rows = mme.questions(data, data)
    assert len(rows) == len({row["id"] for row in rows}) == 12
    assert [row["label"] for row in rows[:2]] == ["yes", "no"]
    assert rows[0]["prompt"] == "Is é in count 0001?\nAnswer the question using a single word or phrase."
    assert mme.questions(data, None, suffix="official")[1]["prompt"] == rows[1]["question"]
    assert rows[1]["question"] == "Is b in count 0001?  Please answer yes or no."
    assert all((data / row["image"]).is_file() for row in rows)
    assert [row["image"] for row in mme.questions(data, data / "MME_Benchmark_release_version")][4] == (
        "landmark/images/0001.png")


@pytest.mark.parametrize(("text", "read"), [
    ("Yes", "yes"), ("no", "no"), ("YES, it is", "yes"), (" yes", "yes"), ("I say yes", "other"), ("know", "no"),
    ("Not", "no"), ("none", "no"), ("It is not", "other"), ("", "other"), ("  \n", "other"), ("noyes", "no"),
    ("n\u00f6", "other"), ("x" * 10**6, "other"),
])  # fmt: skip
def test_first_four_characters(text, read):
    assert mme.read_answer(text) == read


def test_by_hand(tmp_path):
    """count: 3 of 4 right, one image of two whole -> 100 (.75 + .5) = 125. landmark: 2 of 4 and none -> 50.
    code_reasoning: everything right -> 200, the one task of cognition that is here, so there is no sum."""
    rows = mme.questions(release(tmp_path), None)
    said = {row["id"]: row["label"] for row in rows} | {row["id"]: "Yes." for row in rows if row["task"] == "landmark"}
    said["count/0001#1"] = "perhaps"
    scores = mme.score(rows, said)
    assert scores["tasks"]["count"] == {
        "n": 4, "images": 2, "right": 3, "both": 1, "other": 1, "acc": 0.75, "acc_plus": 0.5, "score": 125.0}
    assert [scores["tasks"][task]["score"] for task in TASKS] == [125, 50, 200]
    assert (scores["perception"], scores["cognition"], scores["n"], scores["other"]) == (None, None, 12, 1)
    assert mme.table(scores)[-2:] == [("perception", "", "", "", "", "-"), ("cognition", "", "", "", "", "-")]
    random.Random(0).shuffle(rows)
    assert mme.score(rows, said) == scores


def test_sums():
    """Ten and four tasks: perfect is 2000 and 800, always yes is half right and no image whole."""
    rows = [{"id": f"{task}/{image}#{k}", "task": task, "pair": f"{task}/{image}", "label": label}
            for task in mme.TASKS for image in range(3) for k, label in ((1, "yes"), (2, "no"))]  # fmt: skip

    def sums(text):
        scores = mme.score(rows, {row["id"]: text or row["label"] for row in rows})
        return scores["perception"], scores["cognition"]

    assert sums(None) == (2000, 800)
    assert sums("Yes") == sums("No") == (500, 200)
    assert sums(" ") == (0, 0)
    assert mme.score([], {})["tasks"] == {}


def test_three_forms_of_answers_are_the_same(tmp_path):
    data = release(tmp_path / "data")
    rows = mme.questions(data, None)
    texts = {row["id"]: f"answer {i} é" for i, row in enumerate(rows)}
    lines = llava(rows, texts)
    random.Random(1).shuffle(lines)
    said = mme.read_answers(write(tmp_path / "llava.jsonl", lines), rows)
    assert said == texts and list(said) == list(texts)
    own = [{**row, "text": texts[row["id"]]} for row in rows]
    assert mme.read_answers(write(tmp_path / "own.jsonl", own), rows) == texts
    results = tmp_path / "results"
    results.mkdir()
    for task in TASKS:
        cells = [(row["image"].rpartition("/")[2], row["question"], row["label"].title(), texts[row["id"]])
                 for row in rows if row["task"] == task]  # fmt: skip
        (results / f"{task}.txt").write_bytes("\r\n".join("\t".join(cell) for cell in cells).encode())
    assert mme.read_answers(results, rows) == texts
    again = mme.questions(results, None)  # results hold the questions as well
    assert [(row["id"], row["label"]) for row in again] == [(row["id"], row["label"]) for row in rows]
    assert mme.read_answers(results, again) == texts


def test_refused_answers(tmp_path):
    rows = mme.questions(release(tmp_path / "data"), None)
    lines = llava(rows, {row["id"]: "Yes" for row in rows})
    short = write(tmp_path / "short.jsonl", lines[:-2])
    with pytest.raises(BadInput, match="2 of 12 ids are missing: 'code_reasoning/0002#1'"):
        mme.read_answers(short, rows)
    assert len(mme.read_answers(short, rows, subset=True)) == 10
    bad = [*lines, lines[0], {**lines[0], "question_id": "count/0009.png"}, {**lines[1], "prompt": "What?"},
           {"question_id": 3.5}]  # fmt: skip
    with pytest.raises(BadInput) as error:
        mme.read_answers(write(tmp_path / "bad.jsonl", bad), rows)
    told = str(error.value).splitlines()
    assert len(told) == 4 and "jsonl:13: id 'count/0001#1' was already given at" in told[0]
    assert "jsonl:14: no question 'Is é" in told[1] and "'count/0009.png'" in told[1] and "What?" in told[2]
    bad = [{**lines[0], "text": None}, {"id": rows[1]["id"], "text": "a", "answer": "b"}, *lines[2:]]
    with pytest.raises(BadInput, match=r"(?s):1: want one text.*found 0\n.*:2: want one text.*found 2$"):
        mme.read_answers(write(tmp_path / "bad.jsonl", bad), rows)
    (tmp_path / "count.txt").write_text("a.png\tIs it?\tYes\nb.png\tIs it?\tNo\tyes\tno\n")
    with pytest.raises(BadInput, match=r"(?s)count.txt:1: .*found 3 cells.*count.txt:2: .*found 5 cells"):
        mme.read_answers(tmp_path, rows)


def test_the_same_question_twice(tmp_path):
    """About one image: answers are taken in their order, a third one is refused."""
    (tmp_path / "count.txt").write_text("a.png\tIs it?\tYes\na.png\tIs it?\tNo\n")
    rows = mme.questions(tmp_path, None)
    lines = [{"question_id": "count/a.png", "prompt": "Is it?", "text": text} for text in ("x", "y", "z")]
    said = mme.read_answers(write(tmp_path / "answers.jsonl", lines[:2]), rows)
    assert said == {"count/a#1": "x", "count/a#2": "y"}
    with pytest.raises(BadInput, match="id 'count/a#2' was already given"):
        mme.read_answers(write(tmp_path / "answers.jsonl", lines), rows)


def test_refused_questions(tmp_path):
    with pytest.raises(BadInput, match="has no MME_Benchmark_release_version; published at https"):
        mme.questions(tmp_path, None)
    data = release(tmp_path)
    folder = data / "MME_Benchmark_release_version"
    (folder / "count" / "0001.png").unlink()
    with pytest.raises(BadInput, match="no image for 'count/0001'"):
        mme.questions(data, data)
    assert mme.questions(data, None)[0]["image"] == "count/0001"
    (folder / "count" / "0002.txt").write_text("Is it?\tYes\n")
    with pytest.raises(BadInput, match="count/0002: 1 questions, want two"):
        mme.questions(data, None)
    (folder / "count" / "0002.txt").write_text("Is it?\tYes\nIs it?\tMaybe\nIs it?")
    with pytest.raises(BadInput, match=r"(?s)0002.txt:2: want.*0002.txt:3: want"):
        mme.questions(data, None)
    (folder / "count" / "0002.txt").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"0002.txt: not UTF-8"):
        mme.questions(data, None)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
def test_llavas_answers(tmp_path):
    """First lines of LLaVA's file: questions made of them, in the official form, are found again."""
    file = FIXTURES / "formats" / "mme_answers_llava_head.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        task, _, image = line["question_id"].partition("/")
        with (tmp_path / f"{task}.txt").open("a") as out:
            out.write(f"{image}\t{line['prompt'].split(chr(10))[0]}  Please answer yes or no.\tYes\n")
    rows = mme.questions(tmp_path, None)
    said = mme.read_answers(file, rows)
    assert sorted(said.values()) == sorted(line["text"] for line in lines)
    assert {(row["question"].split("  Please")[0], said[row["id"]]) for row in rows} == {
        (line["prompt"].split("\n")[0], line["text"]) for line in lines}
