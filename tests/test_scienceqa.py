"""ScienceQA: LLaVA's letters, total and IMG, the official groups, and what is refused."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import scienceqa
from metrics.choices import LETTER_SUFFIX

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"


def problem(**other) -> dict:
    return {"question": "Which?", "choices": ["é", "b", "c"], "answer": 1, "hint": "", "image": None, "grade": "grade2",
            "subject": "natural science", "split": "test", **other}  # fmt: skip


PROBLEMS = {
    "4": problem(),
    "5": problem(hint="Look  at it.", image="image.png", grade="grade7", subject="social science"),
    "8": problem(image="image.png", grade="grade6", answer=0),
    "9": problem(hint="A text.", grade="grade12", subject="language science", answer=2),
    "1": problem(split="train"),
}


def write(folder: Path, **files) -> Path:
    names = {"problems": "problems.json", "splits": "pid_splits.json", "llava": scienceqa.LLAVA}
    for name, value in files.items():
        (folder / names[name]).write_text(json.dumps(value), encoding="utf-8")
    return folder


def conversation(row: dict) -> dict:
    """A row as an entry of LLaVA's file."""
    text = row["prompt"].removesuffix(f"\n{LETTER_SUFFIX}")
    asked = {"from": "human", "value": f"<image>\n{text}" if row["image"] else text}
    entry = {"id": row["id"], "conversations": [asked, {"from": "gpt", "value": row["label"]}]}
    return entry | ({"image": row["image"]} if row["image"] else {})


@pytest.mark.parametrize(("text", "letter"), [
    ("B", "B"), ("E", "E"), ("F", None), ("b", None), ("B. b", "B"), ("B.", None), ("B.b", None), ("BC", None),
    (" B", None), ("", None), ("The answer is C.", "C"), ("So: The answer is C because", "C"), ("ABC", None),
    ("The answer is C", None), ("The answer is A. The answer is B.", None), ("The answer is Z.", "Z"), ("A. ", "A"),
    ("A. The answer is B.", "A"), ("F. The answer is B.", "B"),
])  # fmt: skip
def test_letters(text, letter):
    assert scienceqa.read_answer(text) == letter


def test_official_files(tmp_path):
    """Groups by hand: 4 NAT NO G1-6, 5 SOC TXT IMG G7-12, 8 NAT IMG G1-6, 9 LAN TXT G7-12. Right: 4, 8, 9."""
    rows = scienceqa.questions(write(tmp_path, problems=PROBLEMS, splits={"test": ["4", "5", "8", "9"]}), None)
    assert [row["label"] for row in rows] == ["B", "B", "A", "C"]
    assert rows[1]["prompt"] == f"Context: Look at it.\nWhich?\nA. é\nB. b\nC. c\n{LETTER_SUFFIX}"
    assert [row["image"] for row in rows] == [None, "5/image.png", "8/image.png", None]
    said = {"4": "B. b", "5": "b", "8": "A", "9": "The answer is C."}
    scores = scienceqa.score(rows, said)
    assert {name: (group["right"], group["n"]) for name, group in scores["groups"].items()} == {
        "total": (3, 4), "NAT": (2, 2), "SOC": (0, 1), "LAN": (1, 1), "TXT": (1, 2), "IMG": (1, 2), "NO": (1, 1),
        "G1-6": (2, 2), "G7-12": (1, 2)}
    assert (scores["failed"], scores["headline"], scores["accuracy"]) == (1, "IMG", 0.5)
    assert scienceqa.score(rows, said, headline="total")["accuracy"] == 0.75
    assert ("IMG *", "2", "1", "50.00") in scienceqa.table(scores)
    random.Random(0).shuffle(rows)
    assert scienceqa.score(rows, said) == scores
    for text, right in (("B", 2), ("", 0), ("D", 0)):
        assert scienceqa.score(rows, dict.fromkeys(said, text))["right"] == right
    assert scienceqa.score(rows, dict.fromkeys(said, ""))["failed"] == 4
    assert scienceqa.score([], {})["groups"]["total"]["accuracy"] == 0


def test_llavas_file_says_the_same(tmp_path):
    """Alone: total and IMG; with the official files the groups as well, and the two must agree."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    official = {"problems": PROBLEMS, "splits": {"test": ["4", "5", "8", "9"]}}
    rows = scienceqa.questions(write(tmp_path / "a", **official), None)
    told = [conversation(row) for row in rows]
    alone = scienceqa.questions(write(tmp_path / "b", llava=told), None)
    assert [{**row, "groups": []} for row in alone] == [{**row, "groups": []} for row in rows]
    said = {row["id"]: "B" for row in rows}
    assert set(scienceqa.score(alone, said)["groups"]) == {"total", "IMG"}
    write(tmp_path / "b", **official)
    assert scienceqa.questions(tmp_path / "b", None) == rows
    told[0]["conversations"][1]["value"] = "C"
    write(tmp_path / "b", llava=[*told[:3], {**told[3], "id": "77"}])
    with pytest.raises(BadInput, match=r"(?s)'77' is in .*'9' of the test split is not.*'4'.*differ"):
        scienceqa.questions(tmp_path / "b", None)


def test_images(tmp_path):
    data = write(tmp_path, problems=PROBLEMS, splits={"test": ["4", "5", "8", "9"]})
    (tmp_path / "test" / "5").mkdir(parents=True)
    (tmp_path / "test" / "5" / "image.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"^\S+8/image.png: no such image$"):
        scienceqa.questions(data, tmp_path)
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "image.png").write_bytes(b"")
    images = [row["image"] for row in scienceqa.questions(data, tmp_path)]
    assert images == [None, "test/5/image.png", "8/image.png", None]


def test_refused(tmp_path):
    with pytest.raises(BadInput, match="has no problems.json; published at"):
        scienceqa.questions(tmp_path, None)
    bad = {"1": problem(answer=3), "2": problem(answer=True), "3": problem(choices="ab"), "4": 5, "5": problem(hint=None),
           "6": problem(image=3)}  # fmt: skip
    data = write(tmp_path, problems=bad, splits={"test": [*bad, "7"]})
    with pytest.raises(BadInput) as error:
        scienceqa.questions(data, None)
    assert len(str(error.value).splitlines()) == 7 and "'7': missing" in str(error.value)
    for splits in ([], {"test": "4"}, {"test": [4]}, {"test": []}):
        with pytest.raises(BadInput, match="pid_splits.json:"):
            scienceqa.questions(write(tmp_path, splits=splits), None)
    (tmp_path / "x").mkdir()
    for llava in ({}, [3], [{"id": "1"}], [{"id": 1, "conversations": [{"value": "a"}, {"value": "A"}]}],
                  [{"id": "1", "conversations": [{"value": "a"}, {"value": "yes"}]}],
                  [{"id": "1", "conversations": [{"value": 3}, {"value": "A"}]}]):  # fmt: skip
        with pytest.raises(BadInput, match=r"CQM-A.json"):
            scienceqa.questions(write(tmp_path / "x", llava=llava), None)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
def test_llavas_own_questions(tmp_path):
    """First questions of LLaVA's file: the prompt is that of its answers file."""
    source = FIXTURES / "formats" / "scienceqa_questions_head.json"
    (tmp_path / scienceqa.LLAVA).write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    rows = scienceqa.questions(tmp_path, None)
    answer = json.loads((FIXTURES / "formats" / "scienceqa_answers_head.jsonl").read_text())
    assert len(rows) == 40 and rows[0]["prompt"] == answer["prompt"] and rows[0]["id"] == answer["question_id"]
    scores = scienceqa.score(rows, {row["id"]: row["label"] for row in rows})
    assert scores["rounded"] == {"total": 100, "IMG": 100} and scores["groups"]["IMG"]["n"] == 20
