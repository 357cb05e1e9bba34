"""VizWiz: questions that blind people asked about their own photographs, VQA accuracy (metrics/vqa.py).

Paper: Gurari et al., "VizWiz Grand Challenge", CVPR 2018, arXiv:1802.08218.

Options
    split  val, or test, whose answers are hidden: the result is then `upload`, the normalised list {image, answer} for
           the evaluation server, from which LLaVA's published figures come
    rules  normalisation of answers: evalai, as in published figures, or classic

The prompt is LLaVA's. Answers are joined by the image, which `id`, `question_id`, `image_id` or `image` names in any
way of data/names.py (LLaVA's question_id 7 is VizWiz_test_00000007.jpg); upload files are read as well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput
from metrics.answers import image_of, join, with_files
from metrics.benchmark import Benchmark, find, lines
from metrics.files import each, field, read_list, unique
from metrics.vqa import SUFFIX, Rules, accuracy, mean, mean_by, normalise

FILES = {f"{split}.json": "https://vizwiz.org/tasks-and-datasets/vqa (annotations)" for split in ("val", "test")}
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def questions(data: Path, images: Path | None, *, split: Literal["val", "test"] = "val") -> list[dict]:
    """Rows with id (= image), prompt, and of val the answers and answer_type."""
    path = find(data, f"{split}.json", "vizwiz", FILES)
    rows = each(read_list(path), lambda item: _row(item) | (_answers(item) if split == "val" else {}))
    return with_files(unique(path, rows), images, "vizwiz")


def _row(item: object) -> dict:
    name = field(item, "image")
    return {"id": name, "image": name, "prompt": field(item, "question") + UNANSWERABLE + SUFFIX}


def _answers(item: dict) -> dict:
    answers = [field(answer, "answer") for answer in field(item, "answers", list)]
    if not answers:
        raise BadInput("has no answers")
    return {"answers": answers, "answer_type": item.get("answer_type")}


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """{image: text}; see above."""
    return join(path, rows, image_of(rows, ("id", "question_id", "image_id", "image")), subset=subset)


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
    return [("answer type", "accuracy", "questions"),
            *lines([*scores["by_type"].items(), ("all", scores)], ("accuracy", "n"))]


BENCHMARK = Benchmark(
    rules="VizWiz-VQA, VQA accuracy with the answer processing of EvalAI",
    questions=questions, score=score, table=table, max_new_tokens=16, files=FILES, read_answers=read_answers,
    figures={"accuracy": "rounded.accuracy"},
)  # fmt: skip
