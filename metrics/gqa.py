"""GQA: compositional questions made from scene graphs, 12,578 in testdev_balanced.

Paper: Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning", CVPR 2019, arXiv:1902.09506.

    accuracy = #{q : r(said_q) = answer_q} / #q       r: no full stops at the end, lower case

Also over binary questions (structural type verify, logical, choose or compare) and open ones (query), and by structural
and semantic type. What else the released script prints (consistency, validity, plausibility, distribution, grounding)
needs files that testdev lacks.

Options
    rules  official: equal strings, as LLaVA converts and GQA compares them; lmms: equal but for case and punctuation,
           as in lmms-eval

Answers are joined by id, question_id or questionId: GQA's prediction files and LLaVA's answers are both read.
"""

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from metrics.answers import with_files
from metrics.benchmark import Benchmark, find, lines
from metrics.files import each, field, read_table
from metrics.vqa import SUFFIX, mean, mean_by

QUESTIONS = "testdev_balanced_questions.json"
FILES = {QUESTIONS: "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions 1.2)"}
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def questions(data: Path, images: Path | None) -> list[dict]:
    """Rows with id, image, prompt, label; kind (binary or open), structural and semantic where the file has types."""
    return with_files(each(read_table(find(data, QUESTIONS, "gqa", FILES)), _row), images, "gqa")


def _row(entry: tuple[str, object]) -> dict:
    name, item = entry
    row = {"id": name, "image": f"{field(item, 'imageId')}.jpg", "prompt": field(item, "question") + SUFFIX,
           "label": field(item, "answer")}  # fmt: skip
    if not isinstance(types := item.get("types"), dict):
        return row
    kind = "open" if types.get("structural") == "query" else "binary"
    return row | {"kind": kind, "structural": types.get("structural"), "semantic": types.get("semantic")}


def is_right(said: str, label: str, rules: Literal["official", "lmms"] = "official") -> bool:
    """Whether an answer counts."""
    if rules == "lmms":
        return said.lower().translate(_PUNCTUATION) == label.lower().translate(_PUNCTUATION)
    return said.rstrip(".").lower() == label


def score(rows: Sequence[dict], said: Mapping[str, str], *, rules: Literal["official", "lmms"] = "official") -> dict:
    """{n, right, accuracy, by_kind, by_structural, by_semantic, rounded}."""
    right = [is_right(said[row["id"]], row["label"], rules) for row in rows]
    figure = mean(right)
    return {"n": len(rows), "right": sum(right), "accuracy": figure,
            **{f"by_{key}": mean_by(rows, right, key) for key in ("kind", "structural", "semantic")},
            "rounded": {"accuracy": round(100 * figure, 2)}}  # fmt: skip


def table(scores: Mapping) -> list[tuple]:
    """Accuracy in percent, of all questions and by their kind."""
    parts = {**scores["by_kind"], **scores["by_structural"], **scores["by_semantic"], "all": scores}
    return [("questions", "accuracy", "number"), *lines(parts.items(), ("accuracy", "n"))]


BENCHMARK = Benchmark(
    rules="GQA testdev_balanced, equal strings", questions=questions, score=score, table=table, max_new_tokens=16,
    files=FILES, figures={"accuracy": "rounded.accuracy"},
)  # fmt: skip
