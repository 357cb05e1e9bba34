"""ScienceQA: multiple-choice questions of school science, half of them with an image.

Paper: Lu et al., "Learn to Explain: Multimodal Reasoning via Thought Chains for Science Question Answering",
NeurIPS 2022, arXiv:2209.09513. Of the 4,241 questions of the test split:

    accuracy = right answers / questions        IMG = the same over the 2,017 questions with an image

| symbol   | argument         | type                                                       |
|----------|------------------|------------------------------------------------------------|
| question | rows[i]          | dict with `label`, `groups`                                |
| label    | rows[i]["label"] | "A" ... "E"                                                |
| groups   | rows[i]["groups"]| names of GROUPS that the question belongs to               |
| answer   | said[id]         | str                                                        |

Options
    headline  IMG (LLaVA, FiSAO) or total (Re-Align): which accuracy is called `accuracy`; both are always given

The groups NAT SOC LAN (subject), TXT IMG NO (context: a hint, an image, neither) and G1-6 G7-12 (grade) need the
official problems.json and pid_splits.json; LLaVA's llava_test_CQM-A.json alone gives total and IMG. Prompts are
LLaVA's: those of its file where it is there, else made in the same way (`Context: HINT`, question, choices).

Rules of LLaVA's released code: an answer is a letter A-E alone; or starts with one and ". "; or holds "The answer
is", one capital and one more character exactly once. Everything else is `failed`, and wrong.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief, read_json, refuse
from metrics.answers import with_files
from metrics.benchmark import Benchmark, find, lines
from metrics.choices import LETTER_SUFFIX, LETTERS, multiple_choice, share
from metrics.files import below, each, field, read_list, refuse_repeats, texts, unique

LLAVA = "llava_test_CQM-A.json"
OFFICIAL = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
FILES = {"problems.json": OFFICIAL, "pid_splits.json": OFFICIAL,
         LLAVA: "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md (eval.zip)"}  # fmt: skip
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GROUPS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
GRADES = {f"grade{n}": "G1-6" if n < 7 else "G7-12" for n in range(1, 13)}
STATED = re.compile(r"The answer is ([A-Z]).")  # the dot is any character, as released


def questions(data: Path, images: Path | None) -> list[dict]:
    """Rows of `id`, `image` (ID/image.png or None), `prompt`, `label` and `groups`. Raises BadInput also for ids that
    only one of LLaVA's and the official files has."""
    given, rows = {path.name for path in below(data)}, []
    if LLAVA in given:
        path = find(data, LLAVA, "scienceqa", FILES)
        rows = unique(path, each(read_list(path), _llava_row))
    if not rows or {"problems.json", "pid_splits.json"} <= given:
        official = _official(*(find(data, name, "scienceqa", FILES) for name in ("problems.json", "pid_splits.json")))
        rows = _merged(rows, official, data) if rows else official
    return with_files(rows, images, "scienceqa")


def score(rows: Sequence[dict], said: Mapping[str, str], *, headline: Literal["IMG", "total"] = "IMG") -> dict:
    """{n, right, failed, groups: {name: n, right, accuracy}, headline, accuracy, rounded}; total is a group, too."""
    letters = {row["id"]: read_answer(said[row["id"]]) for row in rows}
    right = [(row["groups"], letters[row["id"]] == row["label"]) for row in rows]
    groups = {"total": share(hit for _, hit in right)}
    groups |= {name: found for name in GROUPS if (found := share(hit for mine, hit in right if name in mine))["n"]}
    return {"n": len(rows), "right": groups["total"]["right"], "failed": list(letters.values()).count(None),
            "groups": groups, "headline": headline, "accuracy": groups.get(headline, {}).get("accuracy"),
            "rounded": {name: round(100 * group["accuracy"], 2) for name, group in groups.items()}}  # fmt: skip


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """One line a group, * at the headline."""
    groups = [(name + " *" * (name == scores["headline"]), group) for name, group in scores["groups"].items()]
    return [("group", "questions", "right", "accuracy"), *lines(groups, ("n", "right", "accuracy"))]


def read_answer(text: str) -> str | None:
    """Released rule: the letter, None if there is none."""
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    stated = STATED.findall(text)
    return stated[0] if len(stated) == 1 else None


def _llava_row(entry: object) -> dict:
    """A row of LLaVA's file: id, image or none, conversation of a question and a letter."""
    name, turns = field(entry, "id"), field(entry, "conversations", list)
    if len(turns) != 2 or field(turns[1], "value") not in tuple(LETTERS):
        raise BadInput("want conversations of a question and a letter")
    prompt = field(turns[0], "value")
    shown = "<image>" in prompt
    image = field(entry, "image") if entry.get("image") else f"{name}/image.png"
    return {"id": name, "image": image if shown else None, "label": turns[1]["value"],
            "prompt": f"{prompt.replace('<image>', '').strip()}\n{LETTER_SUFFIX}", "groups": ["IMG"] if shown else []}


def _official(problems_file: Path, splits_file: Path) -> list[dict]:
    """Rows of the test split."""
    problems = read_json(problems_file)
    names = each(read_list(splits_file, "test"), lambda name: field({"id": name}, "id"))
    refuse_repeats(names, f"{splits_file}: id")
    return each(((f"{problems_file}:{brief(name)}", (name, problems.get(name))) for name in names), _row)


def _row(entry: tuple[str, object]) -> dict:
    """A problem as a row. BadInput says what it lacks."""
    name, problem = entry
    if problem is None:
        raise BadInput("missing")
    question, hint, grade, subject = (field(problem, key) for key in ("question", "hint", "grade", "subject"))
    choices, answer, image = texts(problem, "choices"), field(problem, "answer", int), problem.get("image")
    if not 0 <= answer < min(len(choices), len(LETTERS)):
        raise BadInput(f"answer {answer} is the place of none of the {len(choices)} choices")
    if not isinstance(image, str | None):
        raise BadInput("image must be a string or null")
    context = f"Context: {hint}\n" if hint else ""
    text = (context + multiple_choice(question, choices)).replace("  ", " ").strip()
    found = {SUBJECTS.get(subject), GRADES.get(grade), "TXT" if hint else None,
             "IMG" if image else None, None if hint or image else "NO"}  # fmt: skip
    return {"id": name, "image": f"{name}/{image}" if image else None, "prompt": f"{text}\n{LETTER_SUFFIX}",
            "label": LETTERS[answer], "groups": [group for group in GROUPS if group in found]}  # fmt: skip


def _merged(rows: list[dict], official: list[dict], data: Path) -> list[dict]:
    """LLaVA's rows with the official groups."""
    known, own = ({row["id"]: row for row in file} for file in (official, rows))

    def says(row: dict) -> tuple[str, bool]:
        return row["label"], "IMG" in row["groups"]

    problems = [f"id {brief(name)} is in {LLAVA}, not in the test split" for name in own if name not in known]
    problems += [f"id {brief(name)} of the test split is not in {LLAVA}" for name in known if name not in own]
    problems += [f"id {brief(name)}: {LLAVA} and problems.json differ in the answer or the image"
                 for name in own if name in known and says(own[name]) != says(known[name])]  # fmt: skip
    refuse(f"{data}: {problem}" for problem in problems)
    return [{**row, "groups": known[row["id"]]["groups"]} for row in rows]


BENCHMARK = Benchmark(
    rules="ScienceQA, letters read as in LLaVA; accuracy over the test split (total) and its images (IMG)",
    questions=questions, score=score, table=table, max_new_tokens=128, files=FILES,
    figures={"total": "rounded.total", "IMG": "rounded.IMG"},
)  # fmt: skip
