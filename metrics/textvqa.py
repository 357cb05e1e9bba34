"""TextVQA: questions about the text in an image, 5000 in the validation set, VQA accuracy (metrics/vqa.py).

Paper: Singh et al., "Towards VQA Models That Can Read", CVPR 2019, arXiv:1904.08920.

Options
    ocr     add the OCR tokens of LLaVA-1.5's prompts, which are worth about ten points: its published figure has them,
            those of LLaVA-1.6 and lmms-eval do not
    rules   normalisation of answers: evalai, as in published figures, or classic
    copies  a question asked twice about an image is scored against the answers to its own copy, or to the last copy as
            in LLaVA's script

With `ocr` the prompts are those of LLaVA's question file; else lmms-eval's: the question with a capital and the rest in
lower case. Answers are joined by `id` or the data set's `question_id`. In LLaVA's answer files `question_id` is the
image, and `prompt` holds the question: they are joined by both, and equal questions in the order of the file.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from data.names import as_id
from metrics.answers import id_of, join, with_files
from metrics.benchmark import Benchmark, find
from metrics.files import each, field, read_jsonl, read_list, texts, unique
from metrics.vqa import SUFFIX, Rules, accuracy, mean

ANNOTATIONS, LLAVA = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"
FILES = {
    ANNOTATIONS: "https://textvqa.org/dataset (v0.5.1, validation)",
    LLAVA: "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md (eval.zip)",
}


def questions(data: Path, images: Path | None, *, ocr: bool = False) -> list[dict]:
    """Rows with id, image, image_id, question, prompt and the ten answers."""
    path = find(data, ANNOTATIONS, "textvqa", FILES)
    rows = with_files(unique(path, each(read_list(path, "data"), _row)), images, "textvqa")
    return _with_ocr(find(data, LLAVA, "textvqa", FILES), rows) if ocr else rows


def _row(item: object) -> dict:
    if len(answers := texts(item, "answers")) != 10:
        raise BadInput(f"has {len(answers)} answers, not ten")
    question, image = field(item, "question"), field(item, "image_id")
    return {"id": str(field(item, "question_id", int)), "image": f"{image}.jpg", "image_id": image,
            "question": question, "prompt": question.capitalize() + SUFFIX, "answers": answers}  # fmt: skip


def _with_ocr(path: Path, rows: Sequence[dict]) -> list[dict]:
    prompts = dict(each(read_jsonl(path), lambda line: (
        (id_of(line, ("question_id",)), question_of(field(line, "text"))), line["text"])))  # fmt: skip
    refuse(f"{path}: has no question {row['id']}, {brief(row['question'])}" for row in rows
           if _asked(row) not in prompts)  # fmt: skip
    return [{**row, "prompt": prompts[_asked(row)]} for row in rows]


def _asked(row: Mapping) -> tuple[str, str]:
    return row["image_id"], row["question"].strip().lower()


def question_of(prompt: str) -> str:
    """The question in a prompt of LLaVA or InstructBLIP, in lower case."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: ") and (found := re.search("Question: (.*?) Short answer:", prompt, re.DOTALL)):
        return found[1].strip().lower()
    return lines[1 if prompt.startswith("Reference OCR token:") and len(lines) > 1 else 0].strip().lower()


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """{question id: text} of our answers or LLaVA's; see above."""
    images = {row["image_id"] for row in rows}
    waiting: dict[tuple[str, str], list[str]] = {}
    for row in reversed(rows):
        waiting.setdefault(_asked(row), []).append(row["id"])

    def key(answer: dict) -> str:
        if answer.get("id") is not None or as_id(answer.get("question_id")) not in images:
            return id_of(answer)
        if not isinstance(answer.get("prompt"), str):
            raise BadInput("has no prompt that tells which question about the image it answers")
        asked = id_of(answer, ("question_id",)), question_of(answer["prompt"])
        if asked not in waiting:
            raise BadInput(f"image {asked[0]} has no question {brief(asked[1])}")
        ids = waiting[asked]
        return ids.pop() if len(ids) > 1 else ids[0]

    return join(path, rows, key, subset=subset)


def score(rows: Sequence[dict], said: Mapping[str, str], *, rules: Rules = "evalai",
          copies: Literal["own", "last"] = "own") -> dict:  # fmt: skip
    """VQA accuracy: {n, accuracy, rounded}."""
    last = {_asked(row): row["answers"] for row in rows}
    figure = mean(accuracy(said[row["id"]], last[_asked(row)] if copies == "last" else row["answers"], rules)
                  for row in rows)  # fmt: skip
    return {"n": len(rows), "accuracy": figure, "rounded": {"accuracy": round(100 * figure, 2)}}


def table(scores: Mapping) -> list[tuple]:
    """Accuracy in percent."""
    return [("accuracy", "questions"), (f"{scores['rounded']['accuracy']:.2f}", str(scores["n"]))]


BENCHMARK = Benchmark(
    rules="TextVQA v0.5.1 validation, VQA accuracy with the answer processing of EvalAI",
    questions=questions, score=score, table=table, max_new_tokens=16, files=FILES, read_answers=read_answers,
    figures={"accuracy": "rounded.accuracy"},
)  # fmt: skip
