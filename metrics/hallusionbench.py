"""HallusionBench: yes/no questions about charts, maps, illusions and videos, each asked about several images.

Paper: Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language Hallucination and Visual
Illusion in Large Vision-Language Models", CVPR 2024, arXiv:2310.14566. A judge says of each answer whether it is
correct. A group counts if every answer in it is right:

    aAcc   right answers / answers
    qAcc   groups of one question, about all its images
    fAcc   groups of one image, with all its questions (without the questions that have no image)
    easy   groups of one question, about its images that were not edited (visual_input 0 and 1)
    hard   groups of one question, about its edited images (visual_input 2)

| symbol  | argument          | type                                                                              |
|---------|-------------------|-----------------------------------------------------------------------------------|
| row     | rows[i]           | dict with category, subcategory, set_id, figure_id, question_id, visual_input     |
| answer  | said[id]          | str                                                                               |
| verdict | replies[run][id]  | str, the judge's words                                                            |

Options
    items  all: 1,129 questions, 178 of them without an image; image: the other 951
    by     judge: a language model compares the answer with the reference; yes_no: the answer's own yes or no is
           compared, without a judge (VLMEvalKit, with items image). The two are not comparable

Rules of the released code: "incorrect" in the judge's words, in any case, is wrong, else "correct" is right, else
the verdict is unclear; unclear is wrong, but right for a question of category VS without an image. Of several runs of
the judge the mean is given. With yes_no, an answer is unclear unless it holds exactly one of the words.

Departures: the judge prompt is our own; its second question (is the answer the same without the image?),
which only sorts the errors, is not asked. Nothing is added to the questions, as in the paper.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief
from data.names import as_id
from metrics.answers import id_of, join, with_files
from metrics.benchmark import Benchmark, find
from metrics.chair import percent, ratio
from metrics.files import each, field, read_jsonl, read_list, unique

FILES = {"HallusionBench.json": "https://github.com/tianyi-lab/HallusionBench"}
PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")  # together the id
TEXTS = (*PLACE, "visual_input", "question", "gt_answer", "gt_answer_details")
CHECK = "gpt4v_output_gpt_check"  # where the released script keeps a verdict
VERDICTS = {"0": "incorrect", "1": "correct", "2": "unclear"}
FIGURES = ("aAcc", "qAcc", "fAcc", "easy", "hard")
PROMPT = """You grade answers to questions about images. Compare the answer with the reference.

Question: {question}
Reference: {reference}
Answer: {answer}

Reply with one word: correct if the answer agrees with the reference, incorrect if it contradicts the reference, \
unclear if it does not settle the question."""


def questions(data: Path, images: Path | None, *, items: Literal["all", "image"] = "all",
              by: Literal["judge", "yes_no"] = "judge") -> list[dict]:  # fmt: skip
    """Rows of `id` (CATEGORY/SUBCATEGORY/SET/FIGURE/QUESTION), `image` or None, `prompt`, `by`, the official keys."""
    path = find(data, "HallusionBench.json", "hallusionbench", FILES)
    rows = unique(path, each(read_list(path), lambda entry: _row(entry, by)))
    return with_files([row for row in rows if items == "all" or row["image"] is not None], images, "hallusionbench")


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> text, of the official list with `model_prediction`, or of answers by `id`. Answers to questions without an
    image do not count where those are not asked."""
    return join(path, rows, _key(rows), subset=subset)


def read_replies(path: Path, rows: Sequence[dict]) -> list[dict[str, str]]:
    """One run of a judge: the verdicts in the released script's output, one list or a folder with its two files."""
    files = sorted(path.glob("hallusion_output_v?_model.json")) if path.is_dir() else [path]
    return [join(path, rows, _key(rows), _verdict, entries=[line for file in files for line in read_jsonl(file)])]


def _verdict(entry: dict) -> str:
    if (found := as_id(entry.get(CHECK))) not in VERDICTS:
        raise BadInput(f"{CHECK} {brief(entry.get(CHECK))}: want '0', '1' or '2'")
    return VERDICTS[found]


def requests(rows: Sequence[dict], said: Mapping[str, str]) -> dict[str, tuple[None, str]]:
    """id -> (no image, prompt) for the judge; empty with yes_no."""
    return {row["id"]: (None, PROMPT.format(question=row["question"], reference=row["gt_answer_details"],
                                            answer=said[row["id"]]))
            for row in rows if row["by"] == "judge"}  # fmt: skip


def score(rows: Sequence[dict], said: Mapping[str, str], replies: Sequence[Mapping[str, str]] = ()) -> dict:
    """{n, unclear, aAcc, qAcc, fAcc, easy, hard, runs, rounded}: means over the runs of the judge. A run has the
    numbers of correct, incorrect and unclear verdicts, the figures, and `groups`: figure -> (right, all)."""
    runs = [_score_run(rows, said, verdicts) for verdicts in replies or [{}]]
    unclear, *means = (sum(run[name] for run in runs) / len(runs) for name in ("unclear", *FIGURES))
    figures = dict(zip(FIGURES, means))
    return {"n": len(rows), "unclear": unclear, **figures, "runs": runs, "rounded": percent(figures, 4)}


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """The five figures, and of each run what they count."""
    lines = [("", *FIGURES, "unclear")]
    lines += [(f"run {number}", *(f"{right}/{n}" for right, n in run["groups"].values()), str(run["unclear"]))
              for number, run in enumerate(scores["runs"], start=1)]  # fmt: skip
    return [*lines, ("mean", *(f"{100 * scores[name]:.2f}" for name in FIGURES), f"{scores['unclear']:g}")]


def read_reply(reply: str) -> str:
    """Released rule: the judge's words -> correct, incorrect or unclear."""
    reply = reply.lower()
    return "incorrect" if "incorrect" in reply else "correct" if "correct" in reply else "unclear"


def read_yes_no(text: str, label: str) -> str:
    """An answer's own yes or no, against the label "1" or "0" -> correct, incorrect or unclear."""
    words = {"yes", "no"} & set(re.findall(r"\w+", text.lower()))
    if len(words) != 1:
        return "unclear"
    return "correct" if (words == {"yes"}) == (label == "1") else "incorrect"


def _score_run(rows: Sequence[dict], said: Mapping[str, str], replies: Mapping[str, str]) -> dict:
    verdicts = [read_reply(replies[row["id"]]) if row["by"] == "judge"
                else read_yes_no(said[row["id"]], row["gt_answer"]) for row in rows]  # fmt: skip

    def groups(keys: Sequence[str], wanted: Callable[[dict], bool] = lambda row: True) -> tuple[int, int]:
        found: dict[tuple, bool] = defaultdict(lambda: True)
        for row, verdict in zip(rows, verdicts):
            if wanted(row):
                right = verdict == "correct" or verdict == "unclear" and _blind(row)
                found[tuple(row[key] for key in keys)] &= right
        return sum(found.values()), len(found)

    question, figure = (*PLACE[:3], "question_id"), PLACE[:4]
    counts = {
        "aAcc": groups(PLACE),
        "qAcc": groups(question),
        "fAcc": groups(figure, lambda row: not _blind(row)),
        "easy": groups(question, lambda row: row["visual_input"] != "2"),
        "hard": groups(question, lambda row: row["visual_input"] == "2"),
    }
    return {**{name: verdicts.count(name) for name in ("correct", "incorrect", "unclear")}, "groups": counts,
            **{name: ratio(*count) for name, count in counts.items()}}  # fmt: skip


def _key(rows: Sequence[dict]) -> Callable[[dict], str | None]:
    """An answer -> its id, None where it has no image and such questions are not asked."""
    blind = any(row["image"] is None for row in rows)

    def key(answer: dict) -> str | None:
        if as_id(answer.get("visual_input")) == "0" and not blind:
            return None
        places = [as_id(answer.get(part)) for part in PLACE]
        return id_of(answer) if None in places else "/".join(places)

    return key


def _blind(row: dict) -> bool:
    """Whether it is a question of category VS without an image."""
    return row["category"] == "VS" and row["figure_id"] == "0"


def _row(entry: object, by: str) -> dict:
    """An entry as a row. BadInput says what it lacks."""
    texts = {key: field(entry, key) for key in TEXTS}
    image = entry.get("filename")
    if not isinstance(image, str | None) or (image is None) != (entry["visual_input"] == "0"):
        raise BadInput(f"filename {brief(image)}: want a string, or null where visual_input is '0'")
    for key, known in (("visual_input", ("0", "1", "2")), ("gt_answer", ("0", "1"))):
        if entry[key] not in known:
            raise BadInput(f"{key} {brief(entry[key])}: want {' or '.join(map(repr, known))}")
    return {"id": "/".join(entry[key] for key in PLACE), "image": image and image.removeprefix("./"),
            "prompt": entry["question"], "by": by, **texts}  # fmt: skip


BENCHMARK = Benchmark(
    rules="HallusionBench as released; judge's prompt reconstructed, version 1",
    questions=questions, score=score, table=table, max_new_tokens=512, files=FILES, read_answers=read_answers,
    requests=requests, read_replies=read_replies,
    figures={name: f"rounded.{name}" for name in FIGURES},
)  # fmt: skip
