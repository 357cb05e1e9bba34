"""SEED-Bench: letters, kinds and dimensions by hand, the id that occurs twice, and what is refused."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import seedbench

FIXTURES = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures"
TYPES = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}


def entry(name: str, answer: str, number: int = 1, **other) -> dict:
    return {"question_id": name, "question": f"Is é {name}?", "choice_a": "one", "choice_b": "2", "choice_c": "c",
            "choice_d": 4, "answer": answer, "data_id": f"1_{name}", "question_type_id": number,
            "data_type": "video" if name[0] == "v" else "image", **other}  # fmt: skip


ENTRIES = [entry("1", "A"), entry("49914", "B"), entry("2", "C", 2), entry("49914", "D", 2), entry("v3", "D", 10)]


def write(folder: Path, entries: object = ENTRIES, types: object = TYPES) -> Path:
    (folder / "SEED-Bench.json").write_text(json.dumps({"questions": entries, "question_type": types}))
    return folder


def answers(folder: Path, lines: list[dict]) -> Path:
    (folder / "answers.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode())
    return folder / "answers.jsonl"


@pytest.mark.parametrize(("text", "exact", "first"), [
    ("A", "A", "A"), ("a", None, "A"), (" B", None, "B"), ("B.", None, "B"), ("D. four", None, "D"), ("E", None, None),
    ("", None, None), (" \n", None, None), ("An apple", None, "A"), ("é", None, None), ("AB", None, "A"),
])  # fmt: skip
def test_letters(text, exact, first):
    assert (seedbench.read_answer(text), seedbench.read_answer(text, "first")) == (exact, first)


def test_by_hand(tmp_path):
    rows = seedbench.questions(write(tmp_path), None)
    assert [row["id"] for row in rows] == ["1", "49914", "2", "49914-2", "v3"]
    assert rows[0]["prompt"] == f"Is é 1?\nA. one\nB. 2\nC. c\nD. 4\n{seedbench.LETTER_SUFFIX}"
    assert [row["image"] for row in rows[::4]] == ["SEED-Bench-image/1_1", "SEED-Bench-video-image/10_v3.png"]
    said = {"1": "A", "49914": "b", "2": "D", "49914-2": "D", "v3": "D"}
    scores = seedbench.score(rows, said)
    assert (scores["n"], scores["right"], scores["other"], scores["accuracy"]) == (5, 3, 1, 0.6)
    assert scores["kinds"] == {"image": {"n": 4, "right": 2, "accuracy": 0.5}, "video": {"n": 1, "right": 1, "accuracy": 1}}
    assert scores["rounded"] == {"all": 60, "image": 50, "video": 100, "Scene Understanding": 50, "Instance Identity": 50,
                                 "Action Recognition": 100}
    assert seedbench.score(rows, said, read="first")["right"] == 4
    assert seedbench.table(scores)[1:4] == [("all", "5", "3", "60.00"), ("image", "4", "2", "50.00"),
                                            ("video", "1", "1", "100.00")]
    random.Random(0).shuffle(rows)
    assert seedbench.score(rows, said) == scores
    for text, right in (("A", 1), ("", 0), ("D", 2)):
        assert seedbench.score(rows, dict.fromkeys(said, text))["right"] == right
    assert seedbench.score(rows, dict.fromkeys(said, ""))["other"] == 5
    assert seedbench.score([], {})["accuracy"] == 0


def test_the_id_that_occurs_twice(tmp_path):
    """Two answers in their order; one answers both; our own ids name each; a third is refused."""
    rows = seedbench.questions(write(tmp_path), None, kinds="image")
    others = [{"question_id": name, "text": "A"} for name in (1, "2")]

    def read(*lines):
        said = seedbench.read_answers(answers(tmp_path, [*others, *lines]), rows)
        return said["49914"], said["49914-2"]

    first, second = ({"question_id": 49914, "prediction": text} for text in "BD")
    assert read(first, second) == ("B", "D") and read(second, first) == ("D", "B")
    assert read(first) == ("B", "B")
    assert read({"id": "49914-2", "text": "y"}, {"id": "49914", "text": "x"}) == ("x", "y")
    with pytest.raises(BadInput, match="id '49914' was already given at"):
        read(first, first, first)
    alone = seedbench.questions(write(tmp_path, ENTRIES[:3]), None)
    assert seedbench.read_answers(answers(tmp_path, [*others, first, second]), alone)["49914"] == "B"


def test_answers_about_videos_do_not_count_where_images_are_asked_about(tmp_path):
    lines = [{"question_id": entry["question_id"], "prediction": "A"} for entry in ENTRIES]
    rows = seedbench.questions(write(tmp_path), None, kinds="image")
    assert len(seedbench.read_answers(answers(tmp_path, lines), rows)) == len(rows) == 4
    with pytest.raises(BadInput, match="4 of 4 ids are missing"):
        seedbench.read_answers(answers(tmp_path, lines[-1:]), rows, subset=True)
    rows = seedbench.questions(tmp_path, None)
    with pytest.raises(BadInput, match="unknown id 'v4'"):
        seedbench.read_answers(answers(tmp_path, [*lines, {"question_id": "v4", "text": "A"}]), rows)
    with pytest.raises(BadInput, match="1 of 5 ids are missing: 'v3'"):
        seedbench.read_answers(answers(tmp_path, lines[:-1]), rows)
    assert len(seedbench.read_answers(answers(tmp_path, lines[:-1]), rows, subset=True)) == 4


def test_missing_images_and_frames_are_listed(tmp_path):
    data = write(tmp_path)
    (tmp_path / "SEED-Bench-image").mkdir()
    for name in ("1_1", "1_49914"):
        (tmp_path / "SEED-Bench-image" / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"image/1_2: no such image\n.*SEED-Bench-video-image/10_v3.png: no such image$"):
        seedbench.questions(data, tmp_path)
    (tmp_path / "SEED-Bench-image" / "1_2").write_bytes(b"")
    assert seedbench.questions(data, tmp_path, kinds="image")[3]["image"] == "SEED-Bench-image/1_49914"


@pytest.mark.parametrize("bad", [
    3, {}, {"answer": "E"}, {"answer": 1}, {"question_id": None}, {"question_id": 1.5}, {"question_type_id": 3},
    {"data_type": "sound"}, {"choice_d": None}, {"question": []}, {"data_id": None},
])  # fmt: skip
def test_refused_questions(tmp_path, bad):
    data = write(tmp_path, [ENTRIES[0], {**entry("7", "A"), **bad} if bad and bad != 3 else bad])
    with pytest.raises(BadInput, match=r"SEED-Bench.json:2: "):
        seedbench.questions(data, None)


def test_refused_files(tmp_path):
    with pytest.raises(BadInput, match=r"has no SEED-Bench.json; published at https"):
        seedbench.questions(tmp_path, None)
    for entries, types in ((None, TYPES), ([], TYPES), (ENTRIES, None)):
        with pytest.raises(BadInput, match=r"SEED-Bench.json: (want a filled JSON list|'question_type' must be an object|has no|a JSON object)"):
            seedbench.questions(write(tmp_path, entries, types), None)
    with pytest.raises(BadInput, match="question_id '1' is given 2 times"):
        seedbench.questions(write(tmp_path, [ENTRIES[0], ENTRIES[0]]), None)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
def test_llavas_file_for_upload(tmp_path):
    file = FIXTURES / "formats" / "seedbench_answers_head.jsonl"
    told = [json.loads(text) for text in file.read_text().splitlines()]
    rows = seedbench.questions(write(tmp_path, [entry(row["question_id"], row["prediction"]) for row in told]), None)
    assert seedbench.score(rows, seedbench.read_answers(file, rows))["right"] == 40
