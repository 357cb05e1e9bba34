"""evaluate.py: questions, joining files by id, the command line, and the way to a model."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import evaluate
from common import BadInput, run_script
from data import scenes
from judges.ask import Model, Reply
from judges.known import KnownObjects
from metrics import chair, pope
from metrics.benchmark import Benchmark
from metrics.files import read_jsonl
from metrics.objects import read_objects
from metrics.pope import label_questions, read_asked
from model.checkpoint import DEFAULT_MODEL

HOME = Path(__file__).resolve().parents[1]
FIXTURES = HOME.parent / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="official predictions are not here")
needs_model = pytest.mark.skipif(not (DEFAULT_MODEL / "config.json").is_file(), reason="no embedded model")
SEEDS = range(scenes.TEST, scenes.TEST + 12)


class Run:
    """evaluate.py in this process; `shell` is the same in one of its own."""

    def __init__(self, *args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_script(lambda: evaluate.main([str(arg) for arg in args]), "evaluate.py", evaluate.HINT)
            except SystemExit as end:
                self.returncode = end.code or 0
        self.stdout, self.stderr = out.getvalue(), err.getvalue()


def shell(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HOME / "evaluate.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HOME)


def chair_photographs(path: Path, images: Path | None, number: int | None = None, seed: int = 0) -> list[dict]:
    return chair.questions(None, images, annotations=(path,), num=number, seed=seed)


def pope_photographs(paths: list[Path], images: Path | None) -> list[dict]:
    return pope.questions(None, images, annotations=tuple(paths))


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------------------------- questions


def test_pope_scenes_are_balanced_true_and_unique():
    rows = pope.scene_questions(SEEDS)
    assert len({row["id"] for row in rows}) == len(rows)
    for name in ("random", "popular", "adversarial", "other_picture"):
        labels = [row["label"] for row in rows if row["split"] == name]
        assert labels.count("yes") == labels.count("no") > 0
    for row in rows:
        scene, without = scenes.parse_reference(row["image"])
        category = next(c for c in scenes.CATEGORIES if row["prompt"] == scenes.exist_question(c))
        if row["split"] != "other_picture":  # there the labels belong to another picture
            shown = scenes.objects_present(scene, without)
            assert row["label"] == ("yes" if category in shown else "no")
        if row["split"] == "removed":
            assert without == (category,) and category in scenes.objects_present(scene)


def test_other_picture_is_another_one_of_the_same_place():
    rows = {row["id"]: row for row in pope.scene_questions(SEEDS)}
    others = [row for row in rows.values() if row["split"] == "other_picture"]
    assert len(others) == sum(row["split"] in ("random", "popular", "adversarial") for row in rows.values())
    for row in others:
        original = rows[row["id"].removeprefix("other_picture-")]
        here, there = (scenes.parse_reference(r["image"])[0] for r in (original, row))
        assert here.seed != there.seed and here.place == there.place
        assert (row["prompt"], row["label"]) == (original["prompt"], original["label"])


def test_prompts_may_hold_braces():
    rows = pope.scene_questions(SEEDS, "{question}\nAnswer {yes} or {no}.")
    assert all(row["prompt"].endswith("in the image?\nAnswer {yes} or {no}.") for row in rows)


def test_instances_of_coco_say_what_photographs_show(tmp_path):
    """Classes once each, pictures without objects too; a photograph is known by name, by stem and by number."""
    path = tmp_path / "instances.json"
    coco = {"images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 8, "file_name": "b.jpg"}],
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cup"}],
            "annotations": [{"image_id": 7, "category_id": 2}, {"image_id": 7, "category_id": 1},
                            {"image_id": 7, "category_id": 2}]}
    path.write_text(json.dumps(coco))
    assert read_objects(path) == [
        {"id": "COCO_val2014_000000000007.jpg", "image_id": "7", "objects": ["cup", "dog"]},
        {"id": "b.jpg", "image_id": "8", "objects": []},
    ]
    known = KnownObjects(path)
    assert known("/somewhere/b.jpg") == (set(), {"dog", "cup"}) and known("c.jpg") is None
    path.write_text('{"7": ["dog"], "c": ["cup"]}')
    known = KnownObjects(path)
    assert known("x/COCO_val2014_000000000007.jpg")[0] == {"dog"} and known("c.png")[0] == {"cup"}
    scene = scenes.sample_scene(5)
    assert KnownObjects()(scenes.reference(5)) == (scenes.objects_present(scene), set(scenes.CATEGORIES))
    coco["annotations"].append({"image_id": 9, "category_id": 1})
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match="instances.json: annotation without id: image_id 9 is none of the images"):
        read_objects(path)
    path.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match="not an instances file of COCO: 'categories' must be a list of objects"):
        read_objects(path)


def test_photographs_are_found_by_name_stem_and_coco_number(tmp_path):
    folder = tmp_path / "val2014"
    folder.mkdir()
    for name in ("COCO_val2014_000000040468.jpg", "kitchen.png", "b.jpeg"):
        (folder / name).touch()
    table = tmp_path / "objects.json"
    table.write_text(json.dumps({"40468": ["dog"], "kitchen": [], "b.jpeg": ["cup"]}))
    rows = chair_photographs(table, folder)
    assert [row["image"] for row in rows] == ["COCO_val2014_000000040468.jpg", "kitchen.png", "b.jpeg"]
    table.write_text(json.dumps({"40468": ["dog"], "7": [], "8": []}))
    with pytest.raises(ValueError, match=r"val2014/7: no such image\n.*val2014/8: no such image"):
        chair_photographs(table, folder)
    (folder / "kitchen.txt").touch()  # is no picture
    table.write_text(json.dumps({"kitchen": []}))
    assert chair_photographs(table, folder)[0]["image"] == "kitchen.png"
    (folder / "kitchen.jpg").touch()
    with pytest.raises(ValueError, match="val2014: 'kitchen' may be 'kitchen.jpg' or 'kitchen.png'"):
        chair_photographs(table, folder)
    labels = jsonl(tmp_path / "pope.json", [{"question_id": 1, "image": "a", "text": "Q", "label": "yes"}])
    for read, source in ((chair_photographs, table), (pope_photographs, [labels])):
        with pytest.raises(ValueError, match="no: no such folder"):
            read(source, tmp_path / "no")


def test_objects_of_cocos_own_files(tmp_path):
    """Instances and what the reference captions name count as shown; an image without either shows nothing."""
    instances = {"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
                 "categories": [{"id": 1, "name": "dog"}], "annotations": [{"image_id": 7, "category_id": 1}]}
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    with pytest.raises(BadInput, match="has no captions_val2014.json; published at cocodataset.org"):
        chair.questions(tmp_path)
    captions = {"annotations": [{"image_id": 7, "caption": "Two cats."}, {"image_id": 7, "caption": "A cup, a dog."}]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(captions))
    assert [row["objects"] for row in chair.questions(tmp_path)] == [["cat", "cup", "dog"], []]
    (tmp_path / "captions_val2014.json").write_text('{"annotations": [{"image_id": 7}]}')
    with pytest.raises(BadInput, match="captions_val2014.json:1: has no 'caption'"):
        chair.questions(tmp_path)


def test_scenes_are_those_of_the_split():
    for split, first in (("test", scenes.TEST), ("dev", scenes.DEV)):
        rows = chair.questions(split=split, scenes=3)
        assert [row["image"] for row in rows] == [scenes.reference(first + i) for i in range(3)]
        asked = {row["image"] for row in pope.questions(split=split, num=2) if row["split"] == "random"}
        assert asked == {scenes.reference(first), scenes.reference(first + 1)}


def test_the_parsers_of_pope():
    """Yes | no | Maybe | Yes, it is, where yes, no, yes and no are right: official TP 2, FP 1, TN 1; lmms reads the
    first two alone: TP 1, TN 1, accuracy 1/2, recall 1."""
    said = {"1": "Yes", "2": " no", "3": "Maybe", "4": "Yes, it is"}
    rows = [{"id": key, "split": "random", "label": label} for key, label in zip(said, ("yes", "no", "yes", "no"))]
    official, lmms = (pope.score(rows, said, parser=parser)["splits"]["random"] for parser in ("official", "lmms"))
    assert [official[key] for key in ("TP", "FP", "TN", "FN", "other", "accuracy")] == [2, 1, 1, 0, 1, 0.75]
    assert [lmms[key] for key in ("TP", "FP", "TN", "FN", "other", "accuracy", "recall")] == [1, 0, 1, 0, 2, 0.5, 1]


def test_samples_are_reproducible(tmp_path):
    table = tmp_path / "objects.json"
    table.write_text(json.dumps({str(i): ["dog"] for i in range(100)}))
    one, same, two = (chair_photographs(table, None, 20, seed) for seed in (1, 1, 2))
    assert one == same != two
    assert len({row["id"] for row in one}) == 20
    with pytest.raises(ValueError, match="has 100 entries, 101 are asked for"):
        chair_photographs(table, None, 101)


def test_bad_annotations_are_all_named(tmp_path):
    table = tmp_path / "objects.json"
    table.write_text('{"1": ["dog"], "1": ["cat"], "2": "dog"}')
    with pytest.raises(ValueError, match="objects.json: not valid JSON .holds the key '1' twice"):
        chair_photographs(table, None)
    table.write_text('{"1": ["dog"], "2": "dog", "3": [4]}')
    with pytest.raises(ValueError, match=r"json:'2': '2' must be a list.*\n.*json:'3': '3' must hold strings"):
        chair_photographs(table, None)
    table.write_text('{"1": ["dog"], "2": ["dgo"]}')
    with pytest.raises(ValueError, match="objects.json: class 'dgo' is none of the 80 that CHAIR knows"):
        chair_photographs(table, None)
    row = {"question_id": 1, "image": "a", "text": "Q", "label": "yes"}
    bad = jsonl(tmp_path / "bad_random.json", [row, {**row, "question_id": 2, "label": "Yes"}])
    with pytest.raises(ValueError, match="bad_random.json:2: label 'Yes': want 'yes' or 'no'"):
        pope_photographs([bad], None)
    with pytest.raises(ValueError, match="removed.json: 'removed' is the name of a control row"):
        pope_photographs([jsonl(tmp_path / "removed.json", [row])], None)
    labels = jsonl(tmp_path / "labels_random.json", [row, row])
    with pytest.raises(ValueError, match="question_id '1' is given 2 times"):
        pope_photographs([labels], None)


# ------------------------------------------------------------------------------------- answers in a file

QUESTIONS = [{"id": "1", "text": "Is there a dog?"}, {"id": "2", "text": "Is there a cat?"}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question_id": 2, "text": "No"}, {"question_id": 1, "text": "Yes"}],
        [{"id": "1", "answer": "Yes"}, {"id": "2", "response": "No"}],
        [{"question": "Is there a dog?", "answer": "Yes"}, {"question": "Is there a cat?", "answer": "No"}],
    ],
)
def test_answers_are_joined_by_id_or_by_the_question_in_place(tmp_path, rows):
    assert pope.read_answers(jsonl(tmp_path / "a.jsonl", rows), QUESTIONS) == {"1": "Yes", "2": "No"}


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        ([{"id": 1, "text": "a"}],
         ["a.jsonl: 1 of 2 ids are missing: '2'; --subset scores the answered ones alone"]),
        ([{"id": i, "text": "a"} for i in (1, 2, 3, 4)],
         ["a.jsonl:3: unknown id '3' (known: '1', '2')", "a.jsonl:4: unknown id '4' (known: '1', '2')"]),
        ([{"id": i, "text": "a"} for i in (1, 2, 1, 1.0)],
         ["a.jsonl:3: id '1' was already given at a.jsonl:1",
          "a.jsonl:4: id '1' was already given at a.jsonl:1"]),
        ([{"id": True, "text": "a"}, {"id": 1.5, "text": "a"}, {"id": [1], "text": "a"}],
         ["a.jsonl:1: True is no id", "a.jsonl:2: 1.5 is no id", "a.jsonl:3: [1] is no id"]),
        (['{"id": 1, "text": "\\ud83d"}', '{"id": 1, "id": 2, "text": "a"}', '{"id": 1, "text": NaN}',
          '{"id": 1, "text": "\\ud83d\\ude00"}'],
         ["a.jsonl:1: holds half a character, the lone surrogate '\\ud83d'", "a.jsonl:2: not valid JSON (holds the key 'id' twice)",
          "a.jsonl:3: not valid JSON (holds NaN)"]),
        (["[", '{"id": 1}'], ["a.jsonl: not valid JSON (Expecting ',' delimiter at line 3, column 1)"]),
        (["["] + ["1,"] * 30 + ["1]"],
         [f"a.jsonl:{n}: want a JSON object, found int" for n in range(1, 21)] + ["... and 11 more problems"]),
        (["{", "[]", {"id": 1, "text": "a"}],
         ["a.jsonl:1: not valid JSON (Expecting property name enclosed in double quotes at column 2)",
          "a.jsonl:2: want a JSON object, found list"]),
        ([{"id": 1}, {"text": "a"}, {"id": 2, "text": "Is there a dog?", "answer": "No"}],
         ["a.jsonl:1: want one text (text, answer, response, caption, model_prediction, prediction, model_answer), found 0",
          "a.jsonl:2: no id (id, question_id, questionId, image_id)",
          "a.jsonl:3: want one text (text, answer, response, caption, model_prediction, prediction, model_answer), found 2"]),
        ([{"question": "Is there a cat?", "answer": "No"}, {"question": "Is there a cat?", "answer": "No"}],
         ["a.jsonl:1: no id, and not the question in the same place"]),
        ([], ["a.jsonl: has no lines"]),
    ],
)  # fmt: skip
def test_every_problem_of_an_answer_file_is_named(tmp_path, rows, problems):
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError) as error:
        pope.read_answers(path, QUESTIONS)
    assert str(error.value).replace(f"{tmp_path}/", "").split("\n") == problems


NAMED = [139, "139", 139.0, "000000000139", "COCO_val2014_000000000139", "COCO_val2014_000000000139.jpg",
         "val2014/COCO_val2014_000000000139.jpg"]  # fmt: skip


@pytest.mark.parametrize("known", NAMED[1::2])
@pytest.mark.parametrize("said", NAMED)
def test_captions_name_their_picture_in_many_ways(tmp_path, said, known):
    """As OPERA (a number), LLaVA (a file) and others write it; a list is read like lines."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"image_id": said, "caption": "a"}]))
    assert chair.read_answers(path, [{"id": known}]) == {known: "a"}


def test_what_only_looks_like_a_name_is_not_joined(tmp_path):
    """The id of an instances file counts, not the number in a file name; an ambiguous name is refused."""
    questions = [{"id": "img_1.jpg", "image_id": "0"}, {"id": "img_2.jpg", "image_id": "1"},
                 {"id": "a/x.jpg", "image_id": "5"}, {"id": "b/x.jpg", "image_id": "6"}]  # fmt: skip

    def join(name):
        said = jsonl(tmp_path / "a", [{"id": name, "text": "-"}])
        return list(chair.read_answers(said, questions, subset=True))

    assert join(1) == ["img_2.jpg"] and join("img_1") == ["img_1.jpg"] and join("/data/b/x.jpg") == ["b/x.jpg"]
    for name in ("img_1.png", "photo_1.jpg", 2):
        with pytest.raises(ValueError, match="a:1: unknown id"):
            join(name)
    with pytest.raises(ValueError, match="a:1: questions: 'x.jpg' may be 'a/x.jpg' or 'b/x.jpg'"):
        join("x.jpg")


# ------------------------------------------------------------------------------------- command line


def test_scoring_a_file_by_hand(tmp_path):
    """1: dog right, cat wrong; 2: cup right, bed missed. CHAIRs 1/2, CHAIRi 1/3, Recall 2/3; first sentences
    only: 0, 0, 2/3."""
    table = tmp_path / "objects.json"
    table.write_text(json.dumps({"1": ["dog"], "2": ["cup", "bed"]}))
    said = jsonl(tmp_path / "said.jsonl", [{"image_id": 2, "caption": "A cup."},
                                           {"image_id": 1, "caption": "A dog! A cat."}])  # fmt: skip
    out = tmp_path / "out.json"
    common = ("--benchmark", "chair", "--answers", said, "--annotations", table, "--out", out)
    done = shell(*common)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    figures = [result["scores"][name] for name in ("chair_s", "chair_i", "recall")]
    assert figures == pytest.approx([1 / 2, 1 / 3, 2 / 3])
    assert "50.0" in done.stdout and "33.3" in done.stdout and "66.7" in done.stdout
    assert Run(*common, "--max-sentences", 1).returncode == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [result["scores"][name] for name in ("chair_s", "chair_i", "recall")] == pytest.approx(
        [0, 0, 2 / 3]
    )
    assert result["protocol"]["options"]["max_sentences"] == 1


def test_bad_input_ends_with_one_line_a_problem_and_no_file(tmp_path):
    table, out, again = tmp_path / "objects.json", tmp_path / "out.json", tmp_path / "again.jsonl"
    table.write_text(json.dumps({"1": ["dog"], "2": []}))
    for call, rows, expected in (
        (shell, [{"id": "1", "text": "x"}],
         ["{}: 1 of 2 ids are missing: '2'; --subset scores the answered ones alone"]),
        (Run, [{"id": "1", "text": "x"}, {"id": "2", "text": "x"}, {"id": "2", "text": "x"}, "nonsense"],
         ["{}:4: not valid JSON (Expecting value at column 1)"]),
        (Run, [{"id": "1", "text": "x"}, {"id": "2", "text": "x"}, {"id": "2", "text": "x"}, {"id": "1"}],
         ["{}:3: id '2' was already given at {}:2", "{}:4: id '1' was already given at {}:1"]),
    ):  # fmt: skip
        said = jsonl(tmp_path / "said.jsonl", rows)
        done = call("--benchmark", "chair", "--answers", said, "--annotations", table, "--out", out,
                    "--save-answers", again)  # fmt: skip
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr == "evaluate.py: " + "".join(f"{line.replace('{}', str(said))}\n" for line in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["objects.json", "said.jsonl"]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--benchmark", "pope", "--prompt", "Is it?"), "--prompt lacks {question}"),
        (("--benchmark", "pope", "--max-sentences", "1"), "unrecognized arguments: --max-sentences"),
        (("--benchmark", "chair", "--annotations", "OBJECTS"), "chair: --images DIR with the image files, or --answers"),
        (("--benchmark", "chair", "--annotations", "a", "b"), "chair takes one --annotations file"),
        (("--benchmark", "chair", "--num", "0"), "--num must be in [1, 1e9], not 0"),
        (("--benchmark", "chair", "--scenes", "1000001"), "--scenes 1000001: a split has 1 to 1,000,000 scenes"),
        (("--benchmark", "chair", "--num", "two"), "invalid int value: 'two'"),
        (("--benchmark", "chair", "chair"), "--benchmark names one twice"),
        (("--benchmark", "chair", "pope", "--answers", "x"), "are for one benchmark at a time"),
        (("--benchmark", "mme"), "mme needs --data, a folder with"),
        (("--benchmark", "mmvet", "--data", "x", "--judge", "http://x"), "--judge URL --judge-model NAME"),
        (("--benchmark", "chair", "--subset"), "--subset is for --answers"),
        (("--benchmark", "chair", "--out", "/dev/null/x.json"), "cannot write /dev/null/x.json: Not a directory"),
        (("--benchmark", "chair", "--out", "/dev/null"), "cannot write /dev/null: it is no regular file"),
        (("--benchmark", "chair", "--out", "x" * 300), "File name too long"),
        (("--benchmark", "chair", "--out", "same", "--save-answers", "./same"), "another argument names it"),
        (("--benchmark", "chair", "--annotations", "o", "--answers", "a", "--out", "./a"),
         "another argument names it"),
    ],
)
def test_arguments_that_do_not_go_together(args, reason, tmp_path):
    objects = tmp_path / "objects.json"
    objects.write_text('{"1": ["dog"]}')
    done = Run(*(str(objects) if arg == "OBJECTS" else arg for arg in args))
    assert done.returncode == 2 and reason in done.stderr


def test_a_subset_is_scored_when_asked(tmp_path):
    """COCO's instances of 4 pictures, captions of 3 as OPERA writes them: person chair bottle cat | dog | stop sign
    car truck, of which cat and truck are wrong. Two subsets have the same protocol only if they are the same."""
    shown = {139: ["person", "chair", "bottle"], 285: ["dog"], 724: ["car", "stop sign"], 776: ["person"]}
    classes = sorted({name for names in shown.values() for name in names})
    table, out = tmp_path / "instances_val2014.json", tmp_path / "out.json"
    table.write_text(json.dumps({
        "images": [{"id": key, "file_name": f"COCO_val2014_{key:012d}.jpg"} for key in shown],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes)],
        "annotations": [{"image_id": key, "category_id": classes.index(name)}
                        for key, names in shown.items() for name in names],
    }))
    texts = {139: "A person sits on a chair next to a bottle and a cat.", 285: "Two dogs on the grass.",
             724: "A stop sign, a car and a truck."}
    said = jsonl(tmp_path / "opera.jsonl", [{"image_id": key, "caption": text} for key, text in texts.items()])
    common = ("--benchmark", "chair", "--annotations", table, "--answers", said, "--out", out)
    done = Run(*common)
    assert done.returncode == 2
    assert done.stderr == (f"evaluate.py: {said}: 1 of 4 ids are missing: 'COCO_val2014_000000000776.jpg'; "
                           "--subset scores the answered ones alone\n")
    assert Run(*common, "--subset", "--save-answers", tmp_path / "again.jsonl").returncode == 0
    first = json.loads(out.read_text())
    assert first["scores"]["percent"] == {"chair_s": 66.7, "chair_i": 25.0, "recall": 100.0}
    assert (first["protocol"]["subset"], first["protocol"]["questions"]) == (True, 3)
    common = (*common[:5], tmp_path / "again.jsonl", *common[6:])
    assert Run(*common, "--subset").returncode == 0
    second = json.loads(out.read_text())
    assert second["scores"] == first["scores"]
    assert second["protocol"]["questions_sha256"] == first["protocol"]["questions_sha256"]
    jsonl(tmp_path / "again.jsonl", [{"question_id": f"COCO_val2014_{key:012d}.jpg", "text": ""} for key in shown])
    assert Run(*common).returncode == 0
    whole = json.loads(out.read_text())["protocol"]
    assert whole["questions_sha256"] != first["protocol"]["questions_sha256"] and whole["subset"] is False


def test_a_subset_without_the_first_question(tmp_path):
    (tmp_path / "objects.json").write_text(json.dumps({"1": ["dog"], "2": ["cup"]}))
    said = jsonl(tmp_path / "a", [{"image_id": 2, "caption": "A cup."}])
    done = Run("--benchmark", "chair", "--annotations", tmp_path / "objects.json", "--answers", said, "--subset",
               "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "o").read_text())["scores"]
    assert (scores["n"], scores["chair_s"], scores["recall"]) == (1, 0, 1)


def test_llavas_questions_with_the_labels_of_one_split(tmp_path):
    """Answers to that split or to all are scored alike; a question of it without label, or a label without
    question, is named, and so is a file whose name tells no split."""
    rows = [{"image": f"{i}.jpg", "text": f"Is there a {name}?"} for i in range(2) for name in ("dog", "cup")]
    asked = [{**row, "text": row["text"] + "\nAnswer.", "question_id": f"{split}{n}", "category": split}
             for split in ("random", "popular") for n, row in enumerate(rows)]
    texts = {"random": "Yes", "popular": "No"}
    said = [{"question_id": row["question_id"], "text": texts[row["category"]]} for row in asked]
    questions = jsonl(tmp_path / "llava_pope_test.jsonl", asked)
    labels = jsonl(tmp_path / "coco_pope_random.json", [
        {**row, "question_id": n, "label": "no" if n else "yes"} for n, row in enumerate(rows)])
    for answers in (said, said[:4]):
        done = Run("--benchmark", "pope", "--questions", questions, "--annotations", labels, "--answers",
                   jsonl(tmp_path / "a.jsonl", answers), "--out", tmp_path / "out.json")
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / "out.json").read_text())["scores"]["splits"]
        assert list(scores) == ["random"] and (scores["random"]["TP"], scores["random"]["FP"]) == (1, 3)
    asked = read_asked(questions)
    sample = label_questions([labels], 2, asked=asked)
    assert len(sample) == 2 and all(row["id"] in {"random0", "random1", "random2", "random3"} for row in sample)
    del asked["random", "0.jpg", rows[0]["text"]]
    with pytest.raises(ValueError, match="random.json: '0.jpg / Is there a dog.': 1 labels, asked 0 times"):
        label_questions([labels], asked=asked)
    jsonl(labels, [{**rows[n], "question_id": n, "label": "no"} for n in (1, 2, 3)])
    with pytest.raises(ValueError, match="random.json: '0.jpg / Is there a dog.': 0 labels, asked 1 times"):
        label_questions([labels], asked=read_asked(questions))
    with pytest.raises(ValueError, match="x.json: split 'x' by its name, the question file has 'popular', 'r"):
        label_questions([labels.rename(tmp_path / "x.json")], asked=asked)


@needs_fixtures
@pytest.mark.parametrize("alone", [False, True])
def test_one_official_split_through_llavas_questions(tmp_path, alone):
    """LLaVA-1.5-13B on random: TP 1182, FP 31, from the file of all splits and from that of one."""
    folder = FIXTURES / "pope"
    asked = [row for _, row in read_jsonl(folder / "questions.jsonl")]
    split = {row["question_id"] for row in asked if row["category"] == "random"}
    said = [row for _, row in read_jsonl(folder / "answers_llava-v1.5-13b.jsonl")
            if not alone or row["question_id"] in split]  # fmt: skip
    common = ("--benchmark", "pope", "--questions", folder / "questions.jsonl", "--out", tmp_path / "o")
    answers = jsonl(tmp_path / "a.jsonl", said)
    done = Run(*common, "--annotations", folder / "labels_random.json", "--answers", answers)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "o").read_text())["scores"]
    assert [scores["splits"]["random"][key] for key in ("TP", "FP", "TN", "FN")] == [1182, 31, 1379, 318]


@needs_fixtures
def test_llava_layout_through_the_command_line(tmp_path):
    """LLaVA-1.5-13B: mean F1 85.95. A lost line is named by its id instead of shifting the rest."""
    folder, out = FIXTURES / "pope", tmp_path / "out.json"
    labels = [folder / f"labels_{split}.json" for split in ("random", "popular", "adversarial")]
    said = folder / "answers_llava-v1.5-13b.jsonl"
    common = ("--benchmark", "pope", "--annotations", *labels, "--questions", folder / "questions.jsonl")
    done = Run(*common, "--answers", said, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["scores"]["mean"]["percent"]["f1"] == 85.95
    rows = said.read_text().splitlines()
    lost = jsonl(tmp_path / "lost.jsonl", rows[:41] + rows[42:])
    done = Run(*common, "--answers", lost)
    assert done.returncode == 2
    assert f"{lost}: 1 of 8,910 ids are missing: '{json.loads(rows[41])['question_id']}';" in done.stderr


@needs_fixtures
def test_official_layout_without_ids(tmp_path):
    """The random split alone, answers in label order: F1 .87136. Two lines swapped are both refused."""
    folder = FIXTURES / "pope"
    asked = [row for _, row in read_jsonl(folder / "questions.jsonl")]
    said = [row["text"] for _, row in read_jsonl(folder / "answers_llava-v1.5-13b.jsonl")]
    rows = [{"question": row["text"].split("\n")[0], "answer": text}
            for row, text in zip(asked, said) if row["category"] == "random"]  # fmt: skip
    questions = pope_photographs([folder / "labels_random.json"], None)
    answers = pope.read_answers(jsonl(tmp_path / "a.jsonl", rows), questions)
    scores = pope.score(questions, answers)
    assert scores["mean"]["f1"] == pytest.approx(0.87136, abs=5e-6)
    rows[5], rows[6] = rows[6], rows[5]
    with pytest.raises(ValueError, match=r":6: no id, and not the question.*\n.*:7: no id, and not"):
        pope.read_answers(jsonl(tmp_path / "a.jsonl", rows), questions)


# ------------------------------------------------------------------------------------- models


def seeing(model, processor, images, prompts, **options):
    """A model that is always right about what the picture shows."""
    texts = []
    for ref, prompt in zip(images, prompts):
        shown = scenes.objects_present(*scenes.parse_reference(ref))
        asked = [name for name in scenes.CATEGORIES if prompt == scenes.exist_question(name)]
        caption = " ".join(f"A {name}." for name in sorted(shown))
        texts.append([caption if not asked else "Yes" if asked[0] in shown else "No"])
    return texts


def agreeing(model, processor, images, prompts, **options):
    return [["Yes."] for _ in images]


def test_a_model_that_sees_everything(monkeypatch):
    """CHAIR 0, 0, 1; POPE 1 in all splits; nothing found where the object was removed; and about another
    picture, whose labels are those of the first, it is wrong where the pictures differ."""
    monkeypatch.setattr(evaluate, "answers", seeing)
    chair = evaluate.measure(None, None, "chair", scenes=12)[0]
    assert (chair["n"], chair["chair_s"], chair["chair_i"], chair["recall"]) == (12, 0, 0, 1)
    scores = evaluate.measure(None, None, "pope", scenes=12, controls=True)[0]
    assert list(scores["splits"]) == ["random", "popular", "adversarial"]
    assert all(split["accuracy"] == 1 and split["yes_ratio"] == 0.5 for split in scores["splits"].values())
    assert scores["mean"]["f1"] == 1
    assert scores["controls"]["removed"]["yes_ratio"] == 0 and scores["controls"]["removed"]["n"] > 12
    assert 0.4 < scores["controls"]["other_picture"]["accuracy"] < 0.9


def test_a_model_that_always_says_yes(monkeypatch):
    """Balanced splits: accuracy 1/2, F1 2/3; it still finds what was removed."""
    monkeypatch.setattr(evaluate, "answers", agreeing)
    scores = evaluate.measure(None, None, "pope", scenes=12, controls=True)[0]
    assert scores["mean"]["accuracy"] == 0.5 and scores["mean"]["f1"] == pytest.approx(2 / 3)
    assert scores["controls"]["other_picture"]["accuracy"] == 0.5
    assert scores["controls"]["removed"]["yes_ratio"] == 1


def test_a_question_is_computed_once_and_those_of_a_picture_stand_together(monkeypatch):
    calls = []

    def record(model, processor, images, prompts, **options):
        calls.append(list(zip(images, prompts)))
        return [[prompt] for prompt in prompts]

    monkeypatch.setattr(evaluate, "answers", record)
    rows = pope.scene_questions(SEEDS)
    said = evaluate.ask(None, None, rows, 4)
    assert said == {row["id"]: row["prompt"] for row in rows}
    asked = sum(calls, [])
    assert len(asked) == len(set(asked)) < len(rows)
    images = [image for image, _ in asked]
    assert sum(a != b for a, b in zip(images, images[1:])) == len(set(images)) - 1


@pytest.fixture(scope="module")
def random_folder(llava_folder, tmp_path_factory) -> Path:
    """The small random LLaVA with a tokenizer of single words."""
    folder = tmp_path_factory.mktemp("words") / "model"
    shutil.copytree(llava_folder, folder)
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "Yes",
        "No",
        "a",
        "dog",
        "cat",
        "cup",
        "Is",
        "there",
        "in",
        "the",
        "image",
        "?",
    ]
    words += [f"w{i}" for i in range(small.VOCAB - len(words))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("benchmark", ["chair", "pope"])
@pytest.mark.parametrize("which", ["random", pytest.param("embedded", marks=needs_model)])
def test_model_through_the_command_line(tmp_path, random_folder, which, benchmark):
    """Answers saved from a model score the same when read back, and the protocol says how they were made."""
    model = {"random": ("--model", random_folder), "embedded": ()}[which]
    said, out, again = (tmp_path / name for name in ("said", "out", "again"))
    common = ("--benchmark", benchmark, "--split", "dev", "--num", 3)
    done = Run(*common, *model, "--max-new-tokens", 6, "--save-answers", said, "--out", out)
    assert done.returncode == 0, done.stderr
    assert Run(*common, "--answers", said, "--out", again).returncode == 0
    first, second = (json.loads(path.read_text()) for path in (out, again))
    assert first["scores"] == second["scores"]
    assert first["protocol"]["questions_sha256"] == second["protocol"]["questions_sha256"]
    name = str(random_folder) if which == "random" else "model/tiny"
    made = {"model": name, "decoding": "greedy", "max_new_tokens": 6}
    assert made.items() <= first["protocol"].items()
    assert {"split": "dev", "num": 3}.items() <= first["protocol"]["options"].items()
    rows = [row for _, row in read_jsonl(said)]
    expected = evaluate.BENCHMARKS[benchmark].questions(None, None, scenes=3, split="dev")
    assert [row["id"] for row in rows] == [row["id"] for row in expected]
    assert len({row["text"] for row in rows}) > 1 or which == "random"


def test_model_on_photographs(tmp_path, random_folder):
    """Pictures from a folder reach the model: the answers are those to the same scenes without the detour."""
    table = {}
    for seed in range(4):
        scene = scenes.sample_scene(seed)
        scenes.render(scene).save(tmp_path / f"COCO_val2014_{seed:012d}.png")
        table[str(seed)] = sorted(scenes.objects_present(scene))
    objects, said = tmp_path / "objects.json", tmp_path / "said"
    objects.write_text(json.dumps(table))
    pictures = ("--images", tmp_path, "--annotations", objects)
    common = ("--benchmark", "chair", "--model", random_folder, "--max-new-tokens", 8)
    done = Run(*common, *pictures, "--save-answers", said)
    assert done.returncode == 0, done.stderr
    model, processor = evaluate.load_llava(random_folder), evaluate.Processor(random_folder)
    direct = evaluate.ask(model, processor, [{"id": str(i), "image": f"scene:{i}", "prompt": scenes.CAPTION_PROMPT} for i in range(4)], 8)
    assert [row["text"] for _, row in read_jsonl(said)] == list(direct.values())
    assert len(set(direct.values())) > 1


def test_questions_beyond_the_window_are_named_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(evaluate, "load_llava", None)
    args = evaluate.read_arguments(["--benchmark", "chair", "--num", "2", "--max-new-tokens", "1000"])
    with pytest.raises(ValueError, match="chair: record '.*1000 new ones .--max-new-tokens., the decoder takes 1024"):
        evaluate.run(args)


# ------------------------------------------------------------------------------------- the one way of asking


def counted(texts: list[str], *, letter: str = "d") -> dict:
    return {"n": len(texts), "with": sum(letter in text for text in texts)}


LETTERS = Benchmark(
    rules="how many answers have a letter",
    questions=lambda data, images: [{"id": str(i), "image": f"scene:{i}", "prompt": "Is there a dog in the image?"}
                                    for i in range(5)],
    score=lambda rows, said, *, letter="d": counted([said[row["id"]] for row in rows], letter=letter),
    table=lambda scores: [("n", "with"), (str(scores["n"]), str(scores["with"]))], max_new_tokens=3)  # fmt: skip


def letters(rows, said, *, letter: str = "d") -> dict:
    return counted([said[row["id"]] for row in rows], letter=letter)


def scenes_of(data: Path | None = None, images: Path | None = None) -> list[dict]:
    return LETTERS.questions(data, images)


def test_a_new_benchmark_is_one_line(tmp_path, monkeypatch, random_folder):
    """Its options, questions, scores and table come from its functions; nothing else knows of it."""
    monkeypatch.setitem(evaluate.BENCHMARKS, "letters", LETTERS._replace(questions=scenes_of, score=letters))
    said, out = jsonl(tmp_path / "a", [{"id": i, "text": "odd" if i % 2 else "even"} for i in range(5)]), tmp_path / "o"
    done = Run("--benchmark", "letters", "--answers", said, "--letter", "v", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["n", "with", "5", "3"]
    result = json.loads(out.read_text())
    assert (result["scores"], result["protocol"]["options"]) == ({"n": 5, "with": 3}, {"letter": "v"})
    done = Run("--benchmark", "chair", "letters", "--model", random_folder, "--scenes", 2, "--out", out, "--seed", 1)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["benchmark"] for result in results] == ["chair", "letters"]
    assert results[1]["protocol"]["max_new_tokens"] == 3 and "versions" in results[1]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, random_folder):
    """Chunks that were answered are not asked again, the answers are those of a run in one go, and other settings do
    not go on with them."""
    asked, stop = [], [2]

    def breaking(model, processor, images, prompts, **options):
        if len(asked) == stop[0]:
            raise KeyboardInterrupt
        asked.append(len(images))
        return seeing(model, processor, images, prompts)

    monkeypatch.setattr(evaluate, "answers", breaking)
    out, said = tmp_path / "o", tmp_path / "said"
    common = ("--benchmark", "pope", "--model", random_folder, "--scenes", 3, "--batch-size", 8, "--save-answers", said)
    done = Run(*common, "--out", out)
    assert done.returncode == 1 and done.stderr == "evaluate.py: interrupted; with --out, the same command goes on\n"
    stop[0] = 10**6
    done = Run(*common[:-2], "--out", out, "--max-new-tokens", 5)
    assert done.returncode == 2 and "run with other settings" in done.stderr
    weights = (random_folder / "model.safetensors").read_bytes()
    (random_folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    done = Run(*common[:-2], "--out", out)
    (random_folder / "model.safetensors").write_bytes(weights)
    assert done.returncode == 2 and "run with other settings" in done.stderr
    assert Run(*common, "--out", out).returncode == 0 and not list(tmp_path.glob("o.pope.part*"))
    resumed, calls = said.read_bytes(), len(asked)
    assert Run(*common, "--out", tmp_path / "o2").returncode == 0
    assert said.read_bytes() == resumed and len(asked) - calls == calls


def test_two_processes_give_the_same_answers(tmp_path, random_folder):
    common = ("--benchmark", "chair", "--model", random_folder, "--scenes", 5, "--max-new-tokens", 6, "--batch-size", 2)
    assert shell(*common, "--out", tmp_path / "o1", "--save-answers", tmp_path / "a1").returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(HOME / "evaluate.py"), *map(str, common), "--out", str(tmp_path / "o2"), "--save-answers",
               str(tmp_path / "a2")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=HOME)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a1").read_bytes() == (tmp_path / "a2").read_bytes()
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("o1", "o2"))
    assert one["scores"] == two["scores"] and one["protocol"] == two["protocol"]


def test_a_judge_is_asked_once_a_run(tmp_path, monkeypatch):
    """LLaVA-Bench with a judge that rates 8 against the run's number: the mean over runs, their names in the result."""
    for name, rows in (("questions", [{"question_id": 0, "image": "a.jpg", "category": "conv", "text": "Q"}]),
                       ("context", [{"image": "a.jpg", "caption": "C"}]),
                       ("answers_gpt4", [{"question_id": 0, "text": "R"}])):  # fmt: skip
        jsonl(tmp_path / f"{name}.jsonl", rows)
    asked = []

    def server(server, *, cache, root=None):
        def ask(requests):
            asked.append((server.seed, [request.image for request in requests]))
            return [Reply(f"8 {2 + 2 * server.seed}\nBecause.") for _ in requests]

        return Model(server.model, ask)

    monkeypatch.setattr(evaluate, "server_model", server)
    said = jsonl(tmp_path / "a", [{"question_id": 0, "text": "A"}])
    common = ("--benchmark", "llavabench", "--data", tmp_path, "--answers", said)
    assert "is judged: --judge URL" in Run(*common).stderr
    judge = ("--judge", "http://here", "--judge-model", "J", "--judge-runs", 2, "--out", tmp_path / "o")
    done = Run(*common, *judge)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "o").read_text())
    assert asked == [(0, [None]), (1, [None])]
    assert result["scores"]["mean"]["all"] == pytest.approx(100 * (2 / 8 + 4 / 8) / 2)
    assert (result["protocol"]["judge"], result["protocol"]["judge_runs"]) == ("J", 2)


@needs_fixtures
@pytest.mark.parametrize(("name", "data", "replies", "total", "expected"), [
    ("mmvet", "mmvet", "mmvet/grades_llava-v1.5-13b.json", "total", 36.1),
    ("llavabench", "llavabench/reviews_llava-v1.5-13b.jsonl", "llavabench/reviews_llava-v1.5-13b.jsonl", "all", 72.8),
])
def test_official_reviews_are_scored_without_answers(tmp_path, monkeypatch, name, data, replies, total, expected):
    """Neither a model nor a judge is asked."""
    monkeypatch.setattr(evaluate, "load_llava", None)
    done = Run("--benchmark", name, "--data", FIXTURES / data, "--replies", FIXTURES / replies, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "o").read_text())["scores"]["rounded"]["mean"][total] == expected
