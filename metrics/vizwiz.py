"""VizWiz: questions that blind people asked about their own photographs, VQA accuracy (metrics/vqa.py).

Paper: Gurari et al., "VizWiz Grand Challenge", CVPR 2018, arXiv:1802.08218.

split  "val" or "test"        the answers of test are hidden, and LLaVA's published figures are of its server: the score
                              is then `upload`, the list {image, answer} that the server takes, normalised
rules  "evalai" or "classic"  normalisation of answers; published figures are evalai

The prompt is LLaVA's. Answers are joined by the image, which `id`, `question_id`, `image_id` or `image` names in any
way of data/names.py (LLaVA's question_id 7 is VizWiz_test_00000007.jpg); upload files are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from data.names import Names
from metrics.answers import checked, given, join, with_files
from metrics.benchmark import Benchmark, find
from metrics.files import examples, read_json, refuse_repeats
from metrics.vqa import SUFFIX, Rules, accuracy, mean, mean_by, normalise

FILES = {f"{split}.json": "https://vizwiz.org/tasks-and-datasets/vqa (annotations)" for split in ("val", "test")}
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def questions(data: Path, images: Path | None, *, split: Literal["val", "test"] = "val") -> list[dict]:
    """Rows with id (= image), prompt, and of val the answers and answer_type. Raises BadInput."""
    path = find(data, f"{split}.json", FILES)
    kinds = {"image": str, "question": str, **({"answers": list} if split == "val" else {})}
    items = checked(path, read_json(path), **kinds)
    rows = [{"id": item["image"], "image": item["image"], "prompt": item["question"] + UNANSWERABLE + SUFFIX}
            for item in items]  # fmt: skip
    if split == "val":
        answers = [[answer.get("answer") if isinstance(answer, dict) else None for answer in item["answers"]]
                   for item in items]  # fmt: skip
        refuse(f"{path}: {item['image']} has no answers, or one without text" for item, texts in zip(items, answers)
               if not texts or not all(isinstance(text, str) for text in texts))  # fmt: skip
        for row, item, texts in zip(rows, items, answers):
            row |= {"answers": texts, "answer_type": item.get("answer_type")}
    refuse_repeats((row["id"] for row in rows), f"{path}: id")
    return with_files(rows, images)


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """{image: text}; see above. Raises BadInput as metrics.answers.join."""
    ids = [row["id"] for row in rows]
    find_image = Names("questions", ids).find

    def key(answer: dict) -> str:
        name = given(answer, ("id", "question_id", "image_id", "image"))
        if (found := find_image(name)) is None:
            raise BadInput(f"unknown image {brief(name)} (known: {examples(ids)})")
        return found

    return join(path, rows, key, subset=subset)


def upload(rows: Sequence[dict], said: Mapping[str, str], rules: Rules = "evalai") -> list[dict]:
    """The server's file: {image, answer} for each row."""
    return [{"image": row["image"], "answer": normalise(said[row["id"]], rules)} for row in rows]


def score(rows: Sequence[dict], said: Mapping[str, str], *, rules: Rules = "evalai") -> dict:
    """{n, accuracy, by_type, rounded}, and {n, upload} where the answers are hidden."""
    if not all("answers" in row for row in rows):
        return {"n": len(rows), "upload": upload(rows, said, rules)}
    values = [accuracy(said[row["id"]], row["answers"], rules) for row in rows]
    figure = mean(values)
    return {"n": len(rows), "accuracy": figure, "by_type": mean_by(rows, values, "answer_type"),
            "rounded": {"accuracy": round(100 * figure, 2)}}  # fmt: skip


def table(scores: Mapping) -> list[tuple]:
    """Accuracy in percent, of all questions and by type of answer."""
    if "upload" in scores:
        return [("accuracy", "questions"), ("hidden: `upload` is the server's file", str(scores["n"]))]
    lines = {**scores["by_type"], "all": scores}
    return [("answer type", "accuracy", "questions"),
            *((name, f"{100 * part['accuracy']:.2f}", str(part["n"])) for name, part in lines.items())]  # fmt: skip


BENCHMARK = Benchmark(
    rules="VizWiz-VQA, VQA accuracy with the answer processing of EvalAI",
    questions=questions,
    score=score,
    table=table,
    max_new_tokens=16,
    files=FILES,
    read_answers=read_answers,
    figures={"accuracy": "rounded.accuracy"},
)
