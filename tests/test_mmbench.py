"""MMBench: letters, circular questions by hand, rounds, images inside the file, and what is refused."""

import base64
import csv
import io
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from common import BadInput
from metrics import mmbench

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
HEAD = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "image"]


def png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue() + b"\0" * 200000).decode()  # a cell longer than csv's own limit


def line(index: int, choices: list[str], answer: str, category: str = "ocr", **other) -> dict:
    cells = dict(zip("ABCD", [*choices, *[""] * 4]))
    return {"index": index, "question": f"Which {index % 10**6}?", "hint": "", **cells, "answer": answer,
            "category": category, "l2-category": "perception", "image": "", **other}  # fmt: skip


def write(folder: Path, lines: list[dict], head: list[str] = HEAD, name: str = "mmbench_dev_20230712.tsv",
          prefix: bytes = b"") -> Path:
    buffer = io.StringIO(newline="")
    out = csv.DictWriter(buffer, head, delimiter="\t", extrasaction="ignore")  # with CRLF
    out.writeheader()
    out.writerows(lines)
    (folder / name).write_bytes(prefix + buffer.getvalue().encode())
    return folder


LINES = [
    line(7, ["red", "blue"], "A"),
    line(1000007, ["blue", "red"], "B"),
    line(8, ["x", "y", "é"], "C", "logic", hint="One\nhint"),
    line(1000008, ["y", "é", "x"], "B", "logic", hint="nan"),
    line(2000008, ["é", "x", "y"], "A", "logic"),
]


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), (" B\n", "B"), ("b", None), ("B.", "B"), ("(B)", "B"), ("B)", "B"), (":B", "B"), ("(B).", "B"),
    ("It is B", "B"), ("A", "A"), ("It is A", "A"), ("A red dog runs", None), ("A dog, so it is B.", "B"),
    ("A or B", None), ("A. or B.", None), ("A. or (B)", "A"), ("E", "E"), ("F", None), ("AB", None), ("", None),
    ("the CAT", "A"), ("cat and mouse", None), ("mouse", "B"), ("Cat B", "B"), ("(A) cat, (B) mouse", None),
    ("B: mouse", "B"), ("B, I think", "B"), ("B;", None), ("I say A. definitely", "A"),
])  # fmt: skip
def test_letters(text, letter):
    assert mmbench.read_answer(text, ["Cat", "mouse"]) == letter


def test_circular_by_hand(tmp_path):
    """7 is right in both orders, 8 only in two of three: 1/2 of all, all of ocr, nothing of logic."""
    rows = mmbench.questions(write(tmp_path, LINES, prefix=b"\xef\xbb\xbf"), None)
    assert [row["id"] for row in rows] == ["7", "1000007", "8", "1000008", "2000008"]
    assert rows[2]["prompt"] == f"One\nhint\nWhich 8?\nA. x\nB. y\nC. é\n{mmbench.LETTER_SUFFIX}"
    assert rows[3]["prompt"].startswith("Which 8?\nA. y\n")
    said = {"7": "A", "1000007": "(B)", "8": "the É", "1000008": "B.", "2000008": "B"}
    scores = mmbench.score(rows, said)
    one, nothing = {"n": 1, "right": 1, "accuracy": 1.0}, {"n": 1, "right": 0, "accuracy": 0.0}
    assert scores == {
        "n": 2, "right": 1, "accuracy": 0.5, "rows": 5, "rows_right": 4, "unmatched": 0,
        "category": {"logic": nothing, "ocr": one}, "l2-category": {"perception": {"n": 2, "right": 1, "accuracy": 0.5}},
        "rounded": {"accuracy": 50.0, "category": {"logic": 0.0, "ocr": 100.0}, "l2-category": {"perception": 50.0}}}
    assert mmbench.table(scores)[1:3] == [("all", "2", "1", "50.0"), ("perception", "2", "1", "50.0")]
    random.Random(0).shuffle(rows)
    assert mmbench.score(rows, said) == scores
    assert mmbench.score(rows, {row["id"]: row["label"] for row in rows})["accuracy"] == 1
    for letter in "ABCDE":  # always the same letter is never right in all orders
        assert mmbench.score(rows, dict.fromkeys(said, letter))["right"] == 0
    assert mmbench.score([], {})["accuracy"] == 0


def test_unmatched_answers_are_counted(tmp_path):
    """Wrong unless drawn; a draw depends on seed and id alone, and hits one letter in five."""
    lines = [line(i, ["red", "blue"], "A") for i in range(1000)]
    rows = mmbench.questions(write(tmp_path, lines), None)
    said = dict.fromkeys((row["id"] for row in rows), "neither")
    assert mmbench.score(rows, said)["right"] == 0 and mmbench.score(rows, said)["unmatched"] == 1000
    drawn = mmbench.score(rows, said, unmatched="random")
    assert 150 < drawn["right"] < 250 and drawn["unmatched"] == 1000
    assert mmbench.score(rows[::-1], said, unmatched="random") == drawn
    assert mmbench.score(rows, said, unmatched="random", seed=1)["right"] != drawn["right"]


def test_all_rounds(tmp_path):
    """Without copies in the file, every rotation is asked; the label turns with the choices."""
    rows = mmbench.questions(write(tmp_path, LINES[::2]), None, rounds="all")
    assert [(row["id"], row["label"], "".join(row["choices"][0])) for row in rows] == [
        ("7", "A", "red"), ("7-1", "B", "blue"), ("8", "C", "x"), ("8-1", "B", "y"), ("8-2", "A", "é"),
        ("2000008", "A", "é"), ("2000008-1", "C", "x"), ("2000008-2", "B", "y")]
    assert mmbench.score(rows, {row["id"]: row["label"] for row in rows})["n"] == 2


def test_answers_of_llava(tmp_path):
    rows = mmbench.questions(write(tmp_path, LINES[:1]), None, rounds="all")
    told = [{"question_id": 7, "round_id": turn, "prompt": "?", "text": text, "options": [], "option_char": order}
            for turn, text, order in ((1, "B", ["B", "A"]), (0, "A", ["A", "B"]))]  # fmt: skip
    file = tmp_path / "answers.jsonl"
    file.write_text("\r\n".join(map(json.dumps, told)))
    said = mmbench.read_answers(file, rows)
    assert said == {"7": "A", "7-1": "B"} and mmbench.score(rows, said)["right"] == 1
    file.write_text(json.dumps([{"id": "7", "text": ""}, {"id": "7-1", "text": "x"}]))
    assert mmbench.read_answers(file, rows) == {"7": "", "7-1": "x"}
    told[0]["option_char"] = ["A", "B"]
    file.write_text("\n".join(map(json.dumps, [*told, {**told[1], "round_id": 2}, {**told[1], "round_id": "9" * 5000}, told[1]])))
    with pytest.raises(BadInput) as error:
        mmbench.read_answers(file, rows)
    assert [text.split(": ", 1)[1] for text in str(error.value).splitlines()] == [
        "option_char ['A', 'B'] is not the order of round 1", "unknown id '7-2' (known: '7', '7-1')",
        f"'{'9' * 37}...{'9' * 38}' is no round_id", f"id '7' was already given at {file}:2"]
    file.write_text(json.dumps(told[1]))
    with pytest.raises(BadInput, match="1 of 2 ids are missing: '7-1'"):
        mmbench.read_answers(file, rows)
    assert mmbench.read_answers(file, rows, subset=True) == {"7": "A"}


def test_images_are_written_once(tmp_path):
    """Also where a row names the row that has the image; nothing is written when no model is asked."""
    lines = [{**LINES[0], "image": "1000007"}, {**LINES[1], "image": png("red")}, {**LINES[2], "image": png("blue")}]
    folder = write(tmp_path, lines)
    assert [row["image"] for row in mmbench.questions(folder, None)] == [None] * 3
    assert len(list(tmp_path.iterdir())) == 1
    images = [row["image"] for row in mmbench.questions(folder, tmp_path)]
    assert images[0] == images[1] != images[2]
    assert Image.open(tmp_path / images[2]).getpixel((0, 0)) == (0, 0, 255)
    assert len(list((tmp_path / "mmbench_dev_20230712-images").iterdir())) == 2
    lines = [{**LINES[0], "image": "999"}, {**LINES[2], "image": "!" * 100}, {**LINES[3], "image": "AAAA" * 100}]
    with pytest.raises(BadInput, match=r"(?s):2: its image is missing.*:3: its image is missing.*:5: .*not readable"):
        mmbench.questions(write(tmp_path, lines), tmp_path)


def test_refused(tmp_path):
    with pytest.raises(BadInput, match="has no MMBench_DEV_EN.tsv; published at"):
        mmbench.questions(tmp_path, None, edition="MMBench_DEV_EN")
    with pytest.raises(BadInput, match="has no column answer: the answers of the test split"):
        mmbench.questions(write(tmp_path, LINES, [key for key in HEAD if key != "answer"]), None)
    with pytest.raises(BadInput, match="has no rows"):
        mmbench.questions(write(tmp_path, []), None)
    bad = [{**LINES[0], "index": "9" * 5000}, {**LINES[2], "answer": "D"}, {**LINES[4], "answer": "AB"}, {**LINES[4], "answer": ""}]
    with pytest.raises(BadInput, match=r"(?s):2: index.*:3: answer 'D' is none of the 3.*:5: answer 'AB'.*:6: answer ''"):
        mmbench.questions(write(tmp_path, bad), None)
    with pytest.raises(BadInput, match="index '7' is given 2 times"):
        mmbench.questions(write(tmp_path, [LINES[0], LINES[0]]), None)
    file = tmp_path / "mmbench_dev_20230712.tsv"
    file.write_bytes(b"index\tquestion\tA\tB\tanswer\n1\tq\ta\tb\n2\tq\ta\tb\tA\tmore\n")
    with pytest.raises(BadInput, match=r"(?s)tsv:2: 4 cells, the head has 5.*tsv:3: 6 cells"):
        mmbench.questions(tmp_path, None)
    file.write_bytes(b"index\tquestion\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        mmbench.questions(tmp_path, None)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
def test_llavas_answers(tmp_path):
    """First answers of LLaVA's file; the prompt of the rows is that of the file, before the request for a letter."""
    file = FIXTURES / "formats" / "mmbench_answers_head.jsonl"
    told = [json.loads(text) for text in file.read_text().splitlines()]
    lines = [line(row["question_id"], row["options"], row["text"], question=row["prompt"].rsplit("\nA. ", 1)[0])
             for row in told]  # fmt: skip
    rows = mmbench.questions(write(tmp_path, lines), None)
    assert [row["prompt"] for row in rows] == [f"{row['prompt']}\n{mmbench.LETTER_SUFFIX}" for row in told]
    scores = mmbench.score(rows, mmbench.read_answers(file, rows))
    assert (scores["n"], scores["right"], scores["unmatched"]) == (40, 40, 0)
