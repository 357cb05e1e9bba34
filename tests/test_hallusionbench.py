"""HallusionBench: groups by hand, the expected counts over the official questions, and what is refused."""

import json
import random
from pathlib import Path

import pytest

from common import BadInput
from metrics import hallusionbench

OFFICIAL = Path(__file__).resolve().parents[1].parent / "shared" / "fixtures" / "hallusionbench"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official questions are not here")


def entry(place: str, visual: str, label: str) -> dict:
    keys = dict(zip(hallusionbench.PLACE, place.split("/")))
    file = None if visual == "0" else f"./{'/'.join(place.split('/')[:2])}/{keys['set_id']}_{keys['figure_id']}.png"
    return {**keys, "visual_input": visual, "question": f"Is é {place}?", "gt_answer": label, "sample_note": "",
            "gt_answer_details": f"It is {place}.", "filename": file}  # fmt: skip


ENTRIES = [entry("VS/chart/0/0/0", "0", "1"), entry("VS/chart/0/0/1", "0", "0"), entry("VS/chart/0/1/0", "1", "1"),
           entry("VS/chart/0/2/0", "2", "0"), entry("VD/map/0/0/0", "1", "1"), entry("VD/map/0/0/1", "1", "0")]  # fmt: skip
IDS = ["/".join(row[key] for key in hallusionbench.PLACE) for row in ENTRIES]


def write(folder: Path, entries: object = ENTRIES) -> Path:
    (folder / "HallusionBench.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def counts(scores: dict) -> list[int]:
    return [right for right, _ in scores["runs"][0]["groups"].values()]


def test_by_hand(tmp_path):
    """Right: 0/0/0 (unclear, without an image), 0/1/0, VD 0. Questions: VS 0 (wrong about figure 2), VS 1, VD 0 and 1.
    Figures: VS 1 and 2, VD 0 (its question 1 is wrong)."""
    rows = hallusionbench.questions(write(tmp_path), None)
    replies = dict(zip(IDS, ["Unclear.", "INCORRECT", "correct", "unclear", "It is Correct!", "not correct: incorrect"]))
    scores = hallusionbench.score(rows, {}, [replies])
    run = scores["runs"][0]
    assert run["groups"] == {"aAcc": (3, 6), "qAcc": (1, 4), "fAcc": (1, 3), "easy": (2, 4), "hard": (0, 1)}
    assert (run["correct"], run["incorrect"], run["unclear"], scores["n"]) == (2, 2, 2, 6)
    assert scores["rounded"] == {"aAcc": 50, "qAcc": 25, "fAcc": 33.3333, "easy": 50, "hard": 0}
    both = hallusionbench.score(rows, {}, [replies, dict.fromkeys(IDS, "correct")])
    assert (both["aAcc"], both["unclear"], len(both["runs"])) == (0.75, 1, 2)
    assert hallusionbench.table(both)[1:] == [("run 1", "3/6", "1/4", "1/3", "2/4", "0/1", "2"),
                                              ("run 2", "6/6", "4/4", "3/3", "4/4", "1/1", "0"),
                                              ("mean", "75.00", "62.50", "66.67", "75.00", "50.00", "1")]
    random.Random(0).shuffle(rows)
    assert hallusionbench.score(rows, {}, [replies]) == scores
    assert hallusionbench.score([], {})["aAcc"] == 0


@pytest.mark.parametrize(("text", "label", "verdict"), [
    ("Yes", "1", "correct"), ("yes, it is", "0", "incorrect"), ("No.", "0", "correct"), ("NO", "1", "incorrect"),
    ("yes and no", "1", "unclear"), ("I know", "0", "unclear"), ("", "0", "unclear"), ("nothing, yes!", "1", "correct"),
])  # fmt: skip
def test_yes_no(text, label, verdict):
    assert hallusionbench.read_yes_no(text, label) == verdict


def test_what_the_judge_is_asked(tmp_path):
    rows = hallusionbench.questions(write(tmp_path), None)
    said = dict.fromkeys(IDS, "It {is} \u00e9")
    asked = hallusionbench.requests(rows, said)
    image, text = asked[IDS[2]]
    assert list(asked) == IDS and image is None
    assert all(part in text for part in (ENTRIES[2]["question"], ENTRIES[2]["gt_answer_details"], said[IDS[2]]))
    rows = hallusionbench.questions(tmp_path, None, by="yes_no")
    assert hallusionbench.requests(rows, said) == {}
    assert hallusionbench.score(rows, dict.fromkeys(IDS, "yes"))["runs"][0]["correct"] == 3


def test_images(tmp_path):
    data = write(tmp_path)
    assert [row["image"] for row in hallusionbench.questions(data, None)][:3] == [None, None, "VS/chart/0_1.png"]
    for name in ("VS/chart/0_1.png", "hallusion_bench/VS/chart/0_2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(BadInput, match=r"^\S+VD/map/0_0.png: no such image$"):
        hallusionbench.questions(data, tmp_path)
    (tmp_path / "VD" / "map").mkdir(parents=True)
    (tmp_path / "VD" / "map" / "0_0.png").write_bytes(b"")
    images = [row["image"] for row in hallusionbench.questions(data, tmp_path)]
    assert images == [None, None, "VS/chart/0_1.png", "hallusion_bench/VS/chart/0_2.png", *["VD/map/0_0.png"] * 2]


def test_answers(tmp_path):
    """The official list, in any order, or by id; those without an image do not count where only images are."""
    rows = hallusionbench.questions(write(tmp_path), None)
    told = [{**row, "model_prediction": f"é {i}"} for i, row in enumerate(ENTRIES)]
    file = tmp_path / "answers.json"

    def read(lines, rows=rows, **options):
        file.write_bytes(b"\xef\xbb\xbf" + json.dumps(lines, indent=1).replace("\n", "\r\n").encode())
        return hallusionbench.read_answers(file, rows, **options)

    said = {name: f"é {i}" for i, name in enumerate(IDS)}
    assert read(told[::-1]) == said
    assert read([{"id": name, "text": text} for name, text in said.items()]) == said
    assert read([{**row, "text": said[row["id"]]} for row in rows]) == said
    seen = hallusionbench.questions(tmp_path, None, items="image")
    assert list(read(told, seen)) == IDS[2:] and list(read(told[2:], seen)) == IDS[2:]
    assert read(told[:1], subset=True) == {IDS[0]: "é 0"}
    with pytest.raises(BadInput, match="2 of 6 ids are missing: 'VS/chart/0/0/0', 'VS/chart/0/0/1'"):
        read(told[2:])
    odd = [told[1], {**told[0], "category": "XX"}, {"text": "x"}, {**told[0], "model_prediction": 3}]
    with pytest.raises(BadInput, match=r"(?s):6: id 'VS.*already.*:7: id 'VS.*already.*:8: unknown id 'XX.*:9: no id.*:10: want one text"):
        read([*told[1:], told[1], *odd])


def test_verdicts_of_the_released_script(tmp_path):
    """Two files in a folder, or one list; a verdict is 0, 1 or 2."""
    rows = hallusionbench.questions(write(tmp_path), None)
    told = [{**row, "model_prediction": "x", "gpt4v_output_gpt_check": check} for row, check in zip(ENTRIES, "210121")]
    for kind in ("VD", "VS"):
        lines = [line for line in told if line["category"] == kind]
        (tmp_path / f"hallusion_output_{kind.lower()}_model.json").write_text(json.dumps(lines))
    run = dict(zip(IDS, ["unclear", "correct", "incorrect", "correct", "unclear", "correct"]))
    assert hallusionbench.read_replies(tmp_path, rows) == [run]
    file = tmp_path / "all.json"
    file.write_text(json.dumps(told))
    assert hallusionbench.read_replies(file, hallusionbench.questions(tmp_path, None, items="image")) == [
        {key: run[key] for key in IDS[2:]}]
    file.write_text(json.dumps([told[0], {**told[1], "gpt4v_output_gpt_check": "correct"}, ENTRIES[2]]))
    with pytest.raises(BadInput, match=r"(?s)json:2: gpt4v_output_gpt_check 'correct': want.*json:3: .*None: want"):
        hallusionbench.read_replies(file, rows)
    file.write_text(json.dumps(told[:4]))
    with pytest.raises(BadInput, match="2 of 6 ids are missing"):
        hallusionbench.read_replies(file, rows)


@pytest.mark.parametrize("bad", [
    3, {"gt_answer": 1}, {"gt_answer": "2"}, {"visual_input": "3"}, {"filename": None}, {"filename": 3}, {"set_id": None},
])  # fmt: skip
def test_refused_questions(tmp_path, bad):
    odd = {**ENTRIES[2], **bad} if isinstance(bad, dict) else bad
    with pytest.raises(BadInput, match=r"HallusionBench.json:2: "):
        hallusionbench.questions(write(tmp_path, [ENTRIES[0], odd]), None)


def test_refused_files(tmp_path):
    with pytest.raises(BadInput, match=r"has no HallusionBench.json; published at"):
        hallusionbench.questions(tmp_path, None)
    for value in ({}, [], 3):
        with pytest.raises(BadInput, match="want a filled JSON list"):
            hallusionbench.questions(write(tmp_path, value), None)
    with pytest.raises(BadInput, match="'VS/chart/0/0/0' is given 2 times"):
        hallusionbench.questions(write(tmp_path, [ENTRIES[0], ENTRIES[0]]), None)


@official
@pytest.mark.parametrize(("text", "expected"), [
    ("Yes.", [484, 18, 25, 211, 147]), ("No", [645, 88, 42, 242, 250]), ("unclear", [178, 0, 0, 8, 0]),
    (None, [1129, 455, 346, 455, 430]),
])  # fmt: skip
def test_expected_counts(text, expected):
    """Over the official questions, of the judge's verdicts and of the answers' own yes and no."""
    for by in ("judge", "yes_no"):
        rows = hallusionbench.questions(OFFICIAL, None, by=by)
        said = {row["id"]: text or ("yes" if row["gt_answer"] == "1" else "no") for row in rows}
        verdict = {row["id"]: hallusionbench.read_yes_no(said[row["id"]], row["gt_answer"]) for row in rows}
        scores = hallusionbench.score(rows, said, [verdict] if by == "judge" else ())
        assert counts(scores) == expected
        assert [n for _, n in scores["runs"][0]["groups"].values()] == [1129, 455, 346, 455, 430]
    assert scores["rounded"]["aAcc"] == round(100 * expected[0] / 1129, 4)


@official
def test_questions_with_an_image():
    rows = hallusionbench.questions(OFFICIAL, None, items="image", by="yes_no")
    scores = hallusionbench.score(rows, dict.fromkeys((row["id"] for row in rows), "?"))
    assert [n for _, n in scores["runs"][0]["groups"].values()][:3] == [951, 455, 346]
