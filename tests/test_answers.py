"""Official files and images in one folder that holds the downloads of several benchmarks, and the one join."""

import json
from pathlib import Path

import pytest

import evaluate
from common import BadInput, meaning, options_of
from metrics import mme, mmvet, vizwiz
from metrics.answers import join, with_files
from metrics.benchmark import find


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_file_in_a_place_named_after_the_benchmark_is_found(tmp_path):
    touch(tmp_path / "AMBER/data/annotations.json", tmp_path / "Hallusion/annotations.json")
    files = {"annotations.json": "somewhere"}
    assert find(tmp_path, "annotations.json", "amber", files) == tmp_path / "AMBER/data/annotations.json"
    assert find(tmp_path / "Hallusion", "annotations.json", "amber", files) == tmp_path / "Hallusion/annotations.json"
    with pytest.raises(BadInput, match="AMBER/data/annotations.json or .*Hallusion/annotations.json. one annotations"):
        find(tmp_path, "annotations.json", "vizwiz", files)
    touch(tmp_path / "annotations.json")  # directly in the folder: meant, unless another place has the benchmark's name
    assert find(tmp_path, "annotations.json", "vizwiz", files) == tmp_path / "annotations.json"
    assert find(tmp_path, "annotations.json", "amber", files) == tmp_path / "AMBER/data/annotations.json"
    touch(tmp_path / "old/amber/annotations.json")
    with pytest.raises(BadInput, match="one annotations.json is wanted"):
        find(tmp_path, "annotations.json", "amber", files)
    with pytest.raises(BadInput, match="has no b.json; published at there"):
        find(tmp_path, "b.json", "amber", {"b.json": "there"})


def test_links_to_downloads_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere/images/v1_0.png")
    data = tmp_path / "data"
    data.mkdir()
    (data / "first").symlink_to(tmp_path / "elsewhere")
    (data / "second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(data)
    assert with_files([{"image": "v1_0.png"}], data, "mmvet") == [{"image": "first/images/v1_0.png"}]


def test_two_benchmarks_in_one_folder(tmp_path):
    """MM-Vet and VizWiz, whose images have the same name; one --data for both, and no --images."""
    item = {"imagename": "a.jpg", "question": "x?", "answer": "1", "capability": ["rec"]}
    touch(tmp_path / "mm-vet/images/a.jpg", tmp_path / "VizWiz/val/a.jpg", tmp_path / "other/val.json")
    (tmp_path / "mm-vet/mm-vet.json").write_text(json.dumps({"v1_0": item}))
    answers = [{"answer": "yes"}] * 10
    (tmp_path / "VizWiz/val.json").write_text(json.dumps([{"image": "a.jpg", "question": "q", "answers": answers}]))
    assert mmvet.questions(tmp_path, tmp_path)[0]["image"] == "mm-vet/images/a.jpg"
    (row,) = vizwiz.questions(tmp_path, tmp_path)
    assert (row["id"], row["image"]) == ("a.jpg", "VizWiz/val/a.jpg")
    assert vizwiz.questions(tmp_path, None)[0]["image"] == "a.jpg"


def test_tasks_of_mme_are_where_most_of_them_are(tmp_path):
    for task in ("count", "color"):
        folder = tmp_path / "release" / task
        touch(folder / "1.jpg")
        (folder / "1.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    touch(tmp_path / "places" / "scene" / "1.jpg")
    rows = mme.questions(tmp_path, tmp_path)
    assert len(rows) == 4 and rows[0]["image"] == "release/count/1.jpg"


def test_images_below_end_in_the_official_name(tmp_path):
    touch(tmp_path / "x/test/1/image.png", tmp_path / "x/test/11/image.png", tmp_path / "y/b.png")
    rows = [{"image": "1/image.png"}, {"image": None}, {"image": "b.png"}]
    assert [row["image"] for row in with_files(rows, tmp_path, "scienceqa")] == ["x/test/1/image.png", None, "y/b.png"]
    touch(tmp_path / "1/image.png")
    assert with_files(rows[:1], tmp_path, "scienceqa")[0]["image"] == "1/image.png"
    touch(tmp_path / "z/b.png")
    with pytest.raises(BadInput) as error:
        with_files([{"image": "2/image.png"}, *rows], tmp_path, "scienceqa")
    told = str(error.value).splitlines()
    assert len(told) == 2 and told[0].endswith("2/image.png: no such image")
    assert "'b.png' may be" in told[1] and "y/b.png" in told[1] and "z/b.png" in told[1]


def test_join_names_all_problems_and_leaves_out_what_does_not_count(tmp_path):
    rows = [{"id": "a"}, {"id": "b"}]
    entries = [("f:1", ("b", 2)), ("f:2", ("x", 3)), ("f:3", ("a", 1))]

    def key(entry):
        return None if entry[0] == "x" else entry[0]

    def number(entry):
        if entry[1] > 8:
            raise BadInput("too much")
        return entry[1]

    found = join(tmp_path, rows, key, number, entries=entries)
    assert list(found.items()) == [("a", 1), ("b", 2)]
    with pytest.raises(BadInput) as error:
        join(tmp_path, rows, key, number, entries=[("f:1", ("b", 9)), ("f:2", ("b", 1)), ("f:3", ("y", 1))])
    assert str(error.value).splitlines() == [
        "f:1: too much", "f:2: id 'b' was already given at f:1", "f:3: unknown id 'y' (known: 'a', 'b')"]
    for subset, hint in ((None, "'a'"), (False, "--subset scores the answered ones alone")):
        with pytest.raises(BadInput, match=f"1 of 2 ids are missing: .*{hint}$"):
            join(tmp_path, rows, key, number, entries=entries[:1], subset=subset)
    assert join(tmp_path, rows, key, number, entries=entries[:1], subset=True) == {"b": 2}


@pytest.mark.parametrize("name", evaluate.BENCHMARKS)
def test_every_option_has_a_meaning(name):
    functions = evaluate.functions_of(evaluate.BENCHMARKS[name])
    for option in options_of(*functions):
        assert len(meaning(option, *functions).split()) > 2, option
