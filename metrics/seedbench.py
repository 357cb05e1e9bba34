"""SEED-Bench: multiple choice in 12 dimensions, 9 about images and 3 about videos.

Paper: Li et al., "SEED-Bench: Benchmarking Multimodal LLMs with Generative Comprehension", CVPR 2024,
arXiv:2307.16125.

    accuracy = right answers / questions         of all, of the kinds image and video, and of each dimension

| symbol   | argument         | type                                       |
|----------|------------------|--------------------------------------------|
| question | rows[i]          | dict with `kind`, `dimension`, `label`     |
| label    | rows[i]["label"] | "A" ... "D"                                |
| answer   | said[id]         | str                                        |

Options
    kinds  all: 14,233 questions about images and 5,009 about videos; image: the former alone
    read   exact: the answer is the letter (LLaVA); first: its first character is, in either case (lmms-eval)

The paper ranks the likelihoods of the choices; LLaVA, whose way this is, has a letter generated. A video is shown as
its middle frame, extracted before: SEED-Bench-video-image/DIMENSION_QUESTION.png, next to SEED-Bench-image. The id
49914 occurs twice, in the questions and in LLaVA's file for upload: the second one is 49914-2 here. Answers to it
are taken in their order, and a single one answers both (LLaVA: the last one answers both).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief, read_json
from data.names import as_id
from metrics.answers import id_of, join, with_files
from metrics.benchmark import Benchmark, find, lines
from metrics.choices import LETTER_SUFFIX, multiple_choice, share
from metrics.files import as_object, each, field, read_jsonl, read_list, refuse_repeats

FILES = {"SEED-Bench.json": "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"}
TWICE, SECOND = "49914", "49914-2"
CHOICES = {"A": "choice_a", "B": "choice_b", "C": "choice_c", "D": "choice_d"}


def questions(data: Path, images: Path | None, *, kinds: Literal["all", "image"] = "all") -> list[dict]:
    """Rows of `id`, `image`, `prompt`, `kind`, `dimension` and `label`."""
    path = find(data, "SEED-Bench.json", "seedbench", FILES)
    entries = read_list(path, "questions")
    (names,) = each([(str(path), read_json(path))], lambda file: field(file, "question_type", dict))
    dimensions = {as_id(number): name for name, number in names.items()}
    rows = each(entries, lambda entry: _row(entry, dimensions))
    if len(again := [row for row in rows if row["id"] == TWICE]) > 1:
        again[1]["id"] = SECOND
    refuse_repeats((row["id"] for row in rows), f"{path}: question_id")
    rows = [row for row in rows if kinds == "all" or row["kind"] == kinds]
    return with_files(rows, images, "seedbench")


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> text, of LLaVA's answers (`text`), its file for upload (`prediction`) or of answers by `id`. Where only
    images are asked about, answers about videos (v...) do not count."""
    ids, answers = {row["id"] for row in rows}, read_jsonl(path)
    video = any(row["kind"] == "video" for row in rows)
    names = [as_id(answer.get("id", answer.get("question_id"))) for _, answer in answers]
    if SECOND in ids and names.count(TWICE) == 1 and SECOND not in names:
        where, answer = answers[names.index(TWICE)]
        answers.append((where, {**answer, "id": SECOND}))
    seen: Counter = Counter()

    def key(answer: dict) -> str | None:
        name = id_of(answer)
        seen[name] += 1
        if name == TWICE and seen[name] == 2:
            return SECOND if SECOND in ids else None
        return None if name.startswith("v") and not video else name

    return join(path, rows, key, subset=subset, entries=answers)


def score(rows: Sequence[dict], said: Mapping[str, str], *, read: Literal["exact", "first"] = "exact") -> dict:
    """{n, right, other, accuracy, kinds: {name: n, right, accuracy}, dimensions: the same, rounded}."""
    letters = {row["id"]: read_answer(said[row["id"]], read) for row in rows}
    right = [(row, letters[row["id"]] == row["label"]) for row in rows]
    parts = {f"{key}s": {name: share(hit for row, hit in right if row[key] == name)
                         for name in sorted({row[key] for row in rows})} for key in ("kind", "dimension")}  # fmt: skip
    total = share(hit for _, hit in right)
    rounded = {name: round(100 * one["accuracy"], 2)
               for name, one in {"all": total, **parts["kinds"], **parts["dimensions"]}.items()}  # fmt: skip
    return {"n": len(rows), "right": total["right"], "other": list(letters.values()).count(None),
            "accuracy": total["accuracy"], **parts, "rounded": rounded}  # fmt: skip


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """All questions, each kind, each dimension."""
    parts = [("all", scores), *scores["kinds"].items(), *scores["dimensions"].items()]
    return [("", "questions", "right", "accuracy"), *lines(parts, ("n", "right", "accuracy")),
            ("no letter", str(scores["n"]), str(scores["other"]), "")]


def read_answer(text: str, read: str = "exact") -> str | None:
    """The letter, None if there is none."""
    letter = text.strip()[:1].upper() if read == "first" else text
    return letter if letter in CHOICES else None


def _row(entry: object, dimensions: Mapping[str | None, str]) -> dict:
    """A question as a row. BadInput says what it lacks."""
    keys = ("question_id", "question", "data_type", "question_type_id", "data_id", "answer", *CHOICES.values())
    if missing := [key for key in keys if not isinstance(as_object(entry).get(key), str | int | float)]:
        raise BadInput(f"has no {', '.join(missing)}")
    name, number, file = (as_id(entry[key]) for key in ("question_id", "question_type_id", "data_id"))
    if name is None or file is None:
        raise BadInput("question_id and data_id must be strings or whole numbers")
    kind = entry["data_type"]
    if kind not in ("image", "video") or number not in dimensions:
        raise BadInput(f"unknown data_type {brief(kind)} or question_type_id {brief(number)}")
    if entry["answer"] not in CHOICES:
        raise BadInput(f"answer {brief(entry['answer'])}: want A, B, C or D")
    image = f"SEED-Bench-video-image/{number}_{name}.png" if kind == "video" else f"SEED-Bench-image/{file}"
    text = multiple_choice(str(entry["question"]), (str(entry[key]) for key in CHOICES.values()))
    return {"id": name, "image": image, "prompt": f"{text}\n{LETTER_SUFFIX}", "kind": kind,
            "dimension": dimensions[number], "label": entry["answer"]}  # fmt: skip


BENCHMARK = Benchmark(
    rules="SEED-Bench, letters generated and compared as in LLaVA (not ranked by likelihood)",
    questions=questions, score=score, table=table, max_new_tokens=128, files=FILES, read_answers=read_answers,
    figures={name: f"rounded.{name}" for name in ("all", "image", "video")},
)  # fmt: skip
