"""evaluate.py --compare: runs next to each other, marked where they differ, with the papers' rows of the same variant."""

import copy
import json
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import pytest

import evaluate
from common import BadInput, options_of, run_script
from evaluate import BENCHMARKS
from metrics.compare import PUBLISHED, Run, at, compare, differences, picture, read_published, read_runs

PAPERS = Path(__file__).resolve().parents[1].parent / "shared" / "papers"


def chair(model: str = "a", s: float = 20.0, recall: float = 80.0, **changes) -> dict:
    """A result of chair; changes of its protocol, with `options` among them."""
    options = {"prompt": "Describe.", "num": 500} | changes.pop("options", {})
    protocol = {"rules": "CHAIR", "data": "coco", "options": options, "subset": False, "questions": 500,
                "questions_sha256": "0" * 64, "model": model, "max_new_tokens": 96} | changes
    scores = {"n": 500, "words": 30.123456, "percent": {"chair_s": s, "chair_i": 5.0, "recall": recall}}
    return {"benchmark": "chair", "protocol": protocol, "scores": scores, "versions": {}}


def write(path: Path, *results) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in results))
    return path


def shown(*results: dict, published=()) -> tuple[list[list[str]], list[str]]:
    runs = [Run(f"run{i}", result) for i, result in enumerate(results)]
    cells, notes = compare(runs, BENCHMARKS[results[0]["benchmark"]], published)
    return [[cell.strip() for cell in line] for line in cells], notes


def test_runs_of_one_protocol_are_not_marked():
    """Who answers, where the data lies and how the model is prompted are not the benchmark's protocol."""
    cells, notes = shown(chair(), chair("b", 3.4, 83.9, template="vicuna", aspect="pad", data="elsewhere"))
    assert cells == [["run", "model", "CHAIR_s", "CHAIR_i", "recall", "words"],
                     ["run0", "a", "20.0", "5.0", "80.0", "30.1"], ["run1", "b", "3.4", "5.0", "83.9", "30.1"]]
    assert notes == []


@pytest.mark.parametrize("change, note", [
    ({"rules": "others"}, "rules 'others' (first run: 'CHAIR')"),
    ({"max_new_tokens": 512}, "max_new_tokens 512 (first run: 96)"),
    ({"subset": True}, "subset True (first run: False)"),
    ({"questions_sha256": "1" * 64}, "questions 500 (11111111) (first run: 500 (00000000))"),
    ({"judge": "gpt-4"}, "judge 'gpt-4' (first run: not recorded)"),
    ({"options": {"prompt": "What?"}}, "--prompt 'What?' (first run: 'Describe.')"),
    ({"options": {"new_one": 3}}, "--new-one 3 (first run: not recorded)"),
])  # fmt: skip
def test_what_differs_is_marked_and_told(change, note):
    cells, notes = shown(chair(), chair("b"), chair("c", **change))
    assert [line[0] for line in cells] == ["run", "run0", "run1", "run2 *"]
    assert notes == [f"* run2: {note}"]


def test_answers_of_a_file_record_no_limit():
    result = chair(answers="answers.jsonl")
    for name in ("model", "max_new_tokens"):
        del result["protocol"][name]
    assert differences(result, chair()) == ["max_new_tokens not recorded (first run: 96)"]
    assert shown(result)[0][1][1] == "answers.jsonl"


def row(variant: dict, figures: dict, **more) -> dict:
    return {"paper": "P", "table": "Table 1", "method": "M", "model": "L", "benchmark": "chair", "variant": variant,
            "figures": figures, **more}


def test_published_rows_follow_if_their_variant_is_that_of_the_first_run():
    good = row({"scores.n": 500, "protocol.subset": False, "protocol.data": True}, {"CHAIR_s": 39.9}, note="why")
    cells, notes = shown(chair(), chair("b"), published=[good, {**good, "method": ""}])
    assert cells[3:] == [["P, Table 1", "L + M", "39.9", "-", "-", "-"], ["P, Table 1", "L", "39.9", "-", "-", "-"]]
    assert notes == ["P, Table 1: why"]
    for variant, note in (({"scores.n": 300}, "scores.n 300"), ({"protocol.data": False}, "protocol.data False"),
                          ({"protocol.subset": True, "scores.n": 500}, "protocol.subset True"),
                          ({"scores.nothing.n": 1}, "scores.nothing.n 1")):  # fmt: skip
        cells, notes = shown(chair(), published=[row(variant, {"CHAIR_s": 39.9})])
        assert len(cells) == 2 and notes == [f"P, Table 1: another variant, with {note}"]
    result = chair()
    result["scores"]["n"] = 300  # the second run fits, the first does not
    assert len(shown(result, chair(), published=[good])[0]) == 3


def test_columns_without_any_figure_are_left_out():
    result = chair()
    del result["scores"]["percent"]["recall"]
    result["scores"]["percent"]["chair_s"] = None
    assert shown(result)[0][0] == ["run", "model", "CHAIR_i", "words"]
    assert shown(result, chair())[0][1][2:] == ["-", "5.0", "-", "30.1"]


def test_files_are_read_by_benchmark_and_named_by_stem(tmp_path):
    claims = {**chair(), "benchmark": "claims", "scores": {}}
    (tmp_path / "x").mkdir()
    paths = [write(tmp_path / "a.jsonl", chair(), claims), write(tmp_path / "b.jsonl", chair()),
             write(tmp_path / "x" / "b.jsonl", chair("c"))]
    runs = read_runs([*paths, paths[0]], BENCHMARKS)
    assert [(run.name, run.result["benchmark"]) for run in runs] == [
        ("a", "chair"), ("a", "claims"), (str(paths[1]), "chair"), (str(paths[2]), "chair")]


def broken(path: str, value: object) -> dict:
    result = copy.deepcopy(chair())
    *parents, last = path.split(".")
    at(result, ".".join(parents))[last] = value if parents else None
    return result


def test_a_file_that_is_no_result_is_refused_by_line(tmp_path):
    wrong = [{"id": 1}, {**chair(), "benchmark": ["chair"]}, {**chair(), "protocol": []}, broken("protocol.options", None),
             {**chair(), "scores": 1}, broken("scores.percent.recall", "80"), broken("scores.percent.recall", True)]
    path = write(tmp_path / "r.jsonl", chair(), *wrong, chair())
    with pytest.raises(BadInput) as error:
        read_runs([path], BENCHMARKS)
    lines = str(error.value).splitlines()
    assert [line.partition(" no result of evaluate.py: ")[2] for line in lines[:-1]] == [
        "benchmark None is unknown", "benchmark ['chair'] is unknown", "protocol must be an object",
        "protocol.options must be an object", "scores must be an object",
        "scores.percent.recall must be a number, not '80'", "scores.percent.recall must be a number, not True"]
    assert [line.split(" ")[0] for line in lines] == [f"{path}:{number}:" for number in range(2, 10)]
    assert lines[-1].endswith("chair is there twice")
    with pytest.raises(BadInput, match="r.jsonl:2: "):
        read_runs([write(path, chair(), "{")], BENCHMARKS)


def test_command_line(tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", chair()), write(tmp_path / "b.jsonl", chair("b", 3.4, 83.9, subset=True))
    evaluate.main(["--compare", str(a), str(b), "--plot", str(tmp_path / "new" / "p.svg")])
    out = capsys.readouterr().out
    assert out.startswith("chair\n") and "* b: subset True (first run: False)" in out and " + FiSAO " in out
    texts = [e.text for e in ET.parse(tmp_path / "new" / "p.svg").getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"chair", "a", "b *"} <= set(texts)
    for words, message in ((["--compare", str(tmp_path / "none")], "none: "),
                           (["--compare=" + str(a), "--model", "x"], "--model")):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            run_script(partial(evaluate.main, words), "evaluate.py")
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_picture(tmp_path):
    """Coverage to the right, hallucination upwards; a panel for each benchmark with both; runs without both are left
    out."""
    amber = {**chair(), "benchmark": "amber", "scores": {"generative": {"rounded": {"cover": 50.0, "chair": 7.0}}}}
    half = chair()
    half["scores"]["percent"].pop("recall")
    other = chair(s=3.0, recall=90.0, max_new_tokens=512)
    runs = [Run("a", chair(s=20.0, recall=80.0)), Run("b", other), Run("c", half), Run("a", amber)]
    root = ET.fromstring(picture(runs, BENCHMARKS))
    (ax, ay), (bx, by), _ = [(float(e.get("cx")), float(e.get("cy")))
                             for e in root.iter("{http://www.w3.org/2000/svg}circle")]
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert ax < bx and ay < by and "c" not in texts and {"chair", "amber", "a", "b *"} <= set(texts)
    assert "recall, percent (right is better)" in texts and "CHAIR_s, percent (down is better)" in texts
    with pytest.raises(BadInput, match="--plot: no result has .*: chair, claims, amber"):
        picture([Run("c", half)], BENCHMARKS)


@pytest.mark.parametrize("name", ["chair", "pope", "claims", "claims_questions"])
def test_columns_are_where_the_scores_have_them(name):
    benchmark = BENCHMARKS[name]
    rows = benchmark.questions(None, None, scenes=4)
    scores = benchmark.score(rows, {row["id"]: "Yes. There is a dog on the left." for row in rows})
    assert all(type(at(scores, path)) is float for path in benchmark.figures.values())


def test_columns_of_official_benchmarks():
    """Scores of made-up rows; MMHal's rates and MM-Vet's total are in the runs' mean."""
    row = {"id": "1", "type": "attribute", "image": None, "prompt": "?"}
    scores = BENCHMARKS["mmhal"].score([row], {"1": ""}, [{"1": "Rating: 2"}])
    assert [at(scores, path) for path in BENCHMARKS["mmhal"].figures.values()][:2] == [2.0, 1.0]
    asked = {"kind": "existence", "label": "no"}
    scores = BENCHMARKS["amber"].score([{"id": "1", **asked}, {"id": "2", **asked}], {"1": "No", "2": "Yes"})
    figures = BENCHMARKS["amber"].figures
    assert [at(scores, figures[name]) for name in ("accuracy", "F1 existence", "CHAIR")] == [50.0, 66.6, None]


# ------------------------------------------------------------------------------------------- the published rows


def test_published_rows_have_known_columns_and_variants():
    """Every figure has its column; the paths of variants are options or scores that the benchmark has."""
    rows = json.loads(PUBLISHED.read_text())
    assert len({json.dumps([r[k] for k in ("paper", "table", "method", "model", "benchmark")]) for r in rows}) == len(rows)
    for found in rows:
        benchmark = BENCHMARKS[found["benchmark"]]
        assert found.keys() - {"note"} == {"paper", "table", "method", "model", "benchmark", "variant", "figures"}
        assert found["figures"] and set(found["figures"]) <= set(benchmark.figures)
        options = {name for f in evaluate.functions_of(benchmark) for name in options_of(f)}
        asked = {path.split(".")[2] for path in found["variant"] if path.startswith("protocol.options.")}
        assert asked <= options and found["variant"]["protocol.subset"] is False
    assert {row["benchmark"] for row in rows} <= set(BENCHMARKS) and read_published("pope")[0]["benchmark"] == "pope"
    adavip = next(r for r in read_published("amber") if r["method"] == "AdaViP")["figures"]
    assert adavip["AMBER"] == round((100 - adavip["CHAIR"] + adavip["F1"]) / 2, 1)


FILES = {"Re-Align": "re-align", "FiSAO": "fisao", "AdaViP": "adavip", "Understanding Alignment":
         "understanding-alignment-bdhs"}  # fmt: skip


@pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers are not here")
def test_published_figures_are_in_one_line_of_their_paper():
    """All figures of a row are in one line of the paper."""
    for found in json.loads(PUBLISHED.read_text()):
        text = (PAPERS / f"{FILES[found['paper'].partition(' (')[0]]}.txt").read_text()
        figures = [value * (100 if name == "hallucination_rate" else 1) for name, value in found["figures"].items()]
        lines = [{float(word) for word in line.replace("|", " ").replace("↑", " ").replace("↓", " ").split()
                  if word.replace(".", "", 1).isdigit()} for line in text.splitlines()]  # fmt: skip
        assert any({round(value, 4) for value in figures} <= line for line in lines), found
