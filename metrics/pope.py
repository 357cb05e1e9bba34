"""POPE: yes/no questions about objects, half of them about objects the image does not show.

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", EMNLP 2023,
arXiv:2305.10355. "yes" is the positive class:

    accuracy = (TP + TN) / n    precision = TP / (TP + FP)    recall = TP / (TP + FN)
    F1 = 2 TP / (2 TP + FP + FN)                              yes_ratio = (TP + FP) / n

| symbol | argument             | type                                                        |
|--------|----------------------|-------------------------------------------------------------|
| answer | answers[question_id] | str, the model's words                                      |
| label  | labels[question_id]  | "yes" (image shows the object) or "no"                    |

An answer is read by the released rule (`read_answer`): whatever is not recognised as "no" counts as "yes".
That is kept, but answers that are "yes" only because they contain no "no" are counted as `other`. A ratio with
nothing to divide by is 0.0 (the released code fails).
The one figure usually printed is the mean F1 of the splits random, popular and adversarial (`mean_of`).

Questions are one of
    drawn scenes   known exactly, which allows two control rows that tell looking from guessing:
                   other_picture  the questions of all splits with their labels, asked about another image of the same
                                  place: the accuracy that remains can be had without looking at the objects
                   removed        the questions whose answer is "yes", after the object was taken out of the image:
                                  every label is "no", so the share of "yes" (yes_ratio) should be near 0
    label files    of --annotations, or the three official ones of --data, each a split. A file's split is random,
                   popular or adversarial if its name says so, else its stem; with several files ids are SPLIT-ID

Options
    annotations  POPE's label files (JSONL of question_id, image, text, label)
    questions    LLaVA's question file llava_pope_test.jsonl, if the answers have its ids; other splits do not count
    scenes       number of scenes, where there is no file
    num          a random sample of this many lines of each file
    split        of the scenes: test or dev
    seed         draws the sample, and what is asked about scenes
    prompt       what the model is asked; {question} is the question
    parser       how an answer is read: official (above), lmms (exactly yes or no, in any case; else `other` and wrong)
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from data.scenes import exist_question, held_out, pope_questions, reference, sample_scene
from metrics.answers import id_of, join, with_files
from metrics.benchmark import CONTROLS, Benchmark, find, lines
from metrics.chair import percent, ratio
from metrics.files import each, field, read_jsonl, refuse_repeats
from metrics.objects import sample

RULES = "POPE as released: 'No', 'no' or 'not' in the first sentence means no, everything else yes"
SPLITS = ("random", "popular", "adversarial")
LABELS = [f"coco_pope_{split}.json" for split in SPLITS]
FILES = {name: f"github.com/RUCAIBox/POPE, output/coco/{name}" for name in LABELS}
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def read_answer(text: str) -> str:
    """Released rule: the words before the first full stop, without commas; "no" only if one says so."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_other(text: str) -> bool:
    """True where `read_answer` gives "yes" although the answer does not contain the word yes."""
    return read_answer(text) == "yes" and "yes" not in re.findall(r"[a-z]+", text.lower())


def read_exactly(text: str) -> str:
    """The rule of lmms-eval: "yes" or "no" and nothing else, in any case; "" for all other answers."""
    word = text.strip().lower()
    return word if word in ("yes", "no") else ""


PARSERS = {"official": read_answer, "lmms": read_exactly}


def pope(answers: Mapping[str, str], labels: Mapping[str, str], parser: str = "official") -> dict:
    """Scores of answers against labels, both keyed by question id.

    Returns counts (n, TP, FP, TN, FN, other), fractions in [0, 1] (unrounded) and `percent` (2 decimals).
    """
    said = Counter((PARSERS[parser](answers[key]), label) for key, label in labels.items())
    tp, fp, tn, fn = said["yes", "yes"], said["yes", "no"], said["no", "no"], said["no", "yes"]
    figures = {
        "accuracy": ratio(tp + tn, len(labels)),
        "precision": ratio(tp, tp + fp),
        "recall": ratio(tp, tp + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "yes_ratio": ratio(tp + fp, len(labels)),
    }
    other = sum(map(is_other if parser == "official" else lambda text: not read_exactly(text), answers.values()))
    counts = {"n": len(labels), "TP": tp, "FP": fp, "TN": tn, "FN": fn, "other": other}
    return {**counts, **figures, "percent": percent(figures, 2)}


def mean_of(splits: Iterable[Mapping[str, float]]) -> dict:
    """Unweighted mean of each figure over the splits (not pooled), as POPE is usually printed."""
    splits = list(splits)
    figures = {name: sum(split[name] for split in splits) / len(splits) for name in FIGURES}
    return {**figures, "percent": percent(figures, 2)}


# ------------------------------------------------------------------------------------------------- questions


def questions(data: Path | None = None, images: Path | None = None, *, annotations: tuple[Path, ...] = (),
              questions: Path | None = None, scenes: int = 300, num: int | None = None,
              split: Literal["test", "dev"] = "test", seed: int = 0, prompt: str = "{question}") -> list[dict]:
    """Rows of `id`, `image`, `prompt`, `split` and `label`; of label files also `text`, the question."""
    if "{question}" not in prompt:
        raise BadInput("--prompt lacks {question}")
    if data is None and not annotations:
        return scene_questions(held_out(split, num or scenes), prompt, seed)
    paths = annotations or [find(data, name, "pope", FILES) for name in LABELS]
    rows = label_questions(paths, num, seed, read_asked(questions) if questions else None)
    return with_files([{**row, "prompt": prompt.replace("{question}", row["text"])} for row in rows], images, "coco")


def scene_questions(seeds: Iterable[int], prompt: str = "{question}", seed: int = 0) -> list[dict]:
    """POPE's three splits over scenes and the two control rows. `seed` draws what is asked in the splits."""
    rows, removed = [], {}
    for row in pope_questions([sample_scene(s) for s in seeds], random.Random(seed)):
        ref, category = reference(row["seed"]), row["category"]
        asked = {"prompt": prompt.replace("{question}", exist_question(category)), "label": row["label"]}
        name, other = f"{row['split']}-{ref}-{category}", reference(same_place(row["seed"]))
        rows += [{"id": name, "image": ref, "split": row["split"], **asked},
                 {"id": f"other_picture-{name}", "image": other, "split": "other_picture", **asked}]
        if row["label"] == "yes":  # the same ones in all splits
            key, without = f"removed-{ref}-{category}", reference(row["seed"], (category,))
            removed[key] = {"id": key, "image": without, "split": "removed", **asked, "label": "no"}
    return rows + list(removed.values())


@lru_cache(maxsize=4096)
def same_place(seed: int) -> int:
    """The next seed whose scene is of the same place."""
    place = sample_scene(seed).place
    return next(other for other in count(seed + 1) if sample_scene(other).place == place)


def label_questions(paths: Sequence[Path], num: int | None = None, seed: int = 0,
                    asked: Mapping[tuple[str, str, str], str] | None = None) -> list[dict]:
    """Rows of label files, one split each. asked (`read_asked`): LLaVA's ids, which are then used."""
    names = {path: next((name for name in SPLITS if name in path.stem), path.stem) for path in paths}
    refuse_repeats((names[path] for path in paths), "label files: split")
    refuse(f"{path}: {name!r} is the name of a control row, not of a split"
           for path, name in names.items() if name in CONTROLS)  # fmt: skip
    rows = []
    for path, split in names.items():
        labels = _read_labels(path, split)
        if asked is not None:
            also = list(asked.values()) if not rows else []  # answers to LLaVA's other splits do not count
            labels = [{**row, "also": also} for row in _rename(labels, asked, split, path)]
        elif len(paths) > 1:
            labels = [{**row, "id": f"{split}-{row['id']}"} for row in labels]
        rows += sample(labels, num, seed, path)
    return rows


def _read_labels(path: Path, split: str) -> list[dict]:
    """Rows of `id`, `split`, `image`, `text` and `label`."""
    def row(line: dict) -> dict:
        if (label := field(line, "label")) not in ("yes", "no"):
            raise BadInput(f"label {brief(label)}: want 'yes' or 'no'")
        return {"id": id_of(line, ("question_id",)), "split": split, "label": label, "image": field(line, "image"),
                "text": field(line, "text")}

    rows = each(read_jsonl(path), row)
    refuse_repeats((row["id"] for row in rows), f"{path}: question_id")
    return rows


def read_asked(path: Path) -> dict[tuple[str, str, str], str]:
    """LLaVA's question file: (category, image, first line of the question) -> id. BadInput naming bad lines."""
    rows = each(read_jsonl(path), lambda line: (
        id_of(line, ("question_id",)), *(field(line, key) for key in ("image", "text", "category"))))  # fmt: skip
    keys = [(category, image, text.split("\n")[0]) for _, image, text, category in rows]
    refuse_repeats((name for name, *_ in rows), f"{path}: question_id")
    refuse_repeats((" / ".join(key) for key in keys), f"{path}: question")
    return {key: name for key, (name, *_) in zip(keys, rows)}


def _rename(rows: list[dict], asked: Mapping[tuple[str, str, str], str], split: str, path: Path) -> list[dict]:
    """The rows of a split under LLaVA's ids."""
    ids = {key[1:]: name for key, name in asked.items() if key[0] == split}
    if not ids:
        raise BadInput(f"{path}: split {brief(split)} by its name, the question file has "
                       f"{', '.join(map(brief, sorted({key[0] for key in asked})))}")
    times = Counter((row["image"], row["text"]) for row in rows)
    refuse(f"{path}: {brief(' / '.join(key))}: {times[key]} labels, asked {int(key in ids)} times"
           for key in {**ids, **times} if times[key] != 1 or key not in ids)  # fmt: skip
    return [{**row, "id": ids[row["image"], row["text"]]} for row in rows]


# ----------------------------------------------------------------------------------------- answers and scores


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> answer. POPE's own answer files have no id: their order counts, and each `question` must be that of the
    row in its place."""
    entries, place = read_jsonl(path), iter(rows)
    also = {name for row in rows for name in row.get("also", ())} - {row["id"] for row in rows}
    has_ids = any(key in answer for _, answer in entries for key in ("id", "question_id"))

    def key(answer: dict) -> str | None:
        if has_ids:
            return None if (name := id_of(answer)) in also else name
        row = next(place, {})
        if answer.get("question", "") != row.get("text"):
            raise BadInput("no id, and not the question in the same place")
        return row["id"]

    return join(path, rows, key, entries=entries, subset=subset)


def score(rows: Sequence[dict], said: Mapping[str, str], *, parser: Literal["official", "lmms"] = "official") -> dict:
    """Scores of answers (id -> text): {splits: {name: scores}, mean, controls: {name: scores}}; the mean leaves the
    control rows out."""
    scores = {}
    for name in dict.fromkeys(row["split"] for row in rows):
        labels = {row["id"]: row["label"] for row in rows if row["split"] == name}
        scores[name] = pope({key: said[key] for key in labels}, labels, parser)
    controls = {name: scores.pop(name) for name in CONTROLS if name in scores}
    return {"splits": scores, "mean": mean_of(scores.values()), "controls": controls}


def table(scores: Mapping) -> list[tuple]:
    """A line for each split, the mean, and the control rows."""
    columns, controls = (*FIGURES, "n", "TP", "FP", "TN", "FN", "other"), dict(scores["controls"])
    if "removed" in controls:  # no label is "yes"
        controls["removed"] = controls["removed"] | dict.fromkeys(("precision", "recall", "f1"))
    return [("", *columns),
            *lines([*scores["splits"].items(), ("mean", scores["mean"]), *controls.items()], columns)]


BENCHMARK = Benchmark(
    rules=RULES, questions=questions, score=score, table=table, max_new_tokens=4, files=FILES,
    read_answers=read_answers,
    figures={**{f"accuracy {name}": f"splits.{name}.percent.accuracy" for name in SPLITS},
             "accuracy": "mean.percent.accuracy", "F1": "mean.percent.f1"},
)  # fmt: skip
