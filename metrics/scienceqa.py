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

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from common import BadInput, brief, refuse
from metrics.answers import with_files
from metrics.benchmark import Benchmark, find
from metrics.chair import ratio
from metrics.choices import LETTER_SUFFIX, LETTERS, multiple_choice
from metrics.files import read_json, refuse_repeats

LLAVA = "llava_test_CQM-A.json"
OFFICIAL = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
FILES = {"problems.json": OFFICIAL, "pid_splits.json": OFFICIAL,
         LLAVA: "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md (eval.zip)"}  # fmt: skip
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
GROUPS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
GRADES = {f"grade{n}": "G1-6" if n < 7 else "G7-12" for n in range(1, 13)}
STATED = re.compile(r"The answer is ([A-Z]).")  # the dot is any character, as released


def questions(data: Path, images: Path | None) -> list[dict]:
    """Rows of `id`, `image` (ID/image.png or None), `prompt`, `label` and `groups`.

    Raises BadInput that lists bad entries, and ids that only one of LLaVA's and the official files has.
    """
    given = {name for name in FILES if any(data.rglob(name))}
    rows = _llava(find(data, LLAVA, FILES)) if LLAVA in given else None
    if rows is None or {"problems.json", "pid_splits.json"} <= given:
        official = _official(find(data, "problems.json", FILES), find(data, "pid_splits.json", FILES))
        rows = official if rows is None else _merged(rows, official, data)
    return with_files(rows, images, "test")


def score(rows: Sequence[dict], said: Mapping[str, str], *, headline: Literal["IMG", "total"] = "IMG") -> dict:
    """{n, right, failed, groups: {name: n, right, accuracy}, headline, accuracy, rounded}; total is a group, too."""
    letters = {row["id"]: read_answer(said[row["id"]]) for row in rows}
    members = {"total": list(rows)} | {name: found for name in GROUPS
                                       if (found := [row for row in rows if name in row["groups"]])}  # fmt: skip
    groups = {}
    for name, found in members.items():
        right = sum(letters[row["id"]] == row["label"] for row in found)
        groups[name] = {"n": len(found), "right": right, "accuracy": ratio(right, len(found))}
    return {"n": len(rows), "right": groups["total"]["right"], "failed": list(letters.values()).count(None),
            "groups": groups, "headline": headline, "accuracy": groups.get(headline, {}).get("accuracy"),
            "rounded": {name: round(100 * group["accuracy"], 2) for name, group in groups.items()}}  # fmt: skip


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """One line a group, * at the headline."""
    lines = [("group", "questions", "right", "accuracy")]
    return lines + [(name + " *" * (name == scores["headline"]), str(group["n"]), str(group["right"]),
                     f"{100 * group['accuracy']:.2f}") for name, group in scores["groups"].items()]  # fmt: skip


def read_answer(text: str) -> str | None:
    """Released rule: the letter, None if there is none."""
    if text in tuple(LETTERS):
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    stated = STATED.findall(text)
    return stated[0] if len(stated) == 1 else None


def _llava(path: Path) -> list[dict]:
    """Rows of LLaVA's file: id, image or none, conversation of a question and a letter."""
    entries, problems, rows = read_json(path), [], []
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{path}: want a filled JSON list")
    for number, entry in enumerate(entries, start=1):
        try:
            name, image, (asked, told) = entry["id"], entry.get("image"), entry["conversations"]
            prompt, label = asked["value"], told["value"]
            if not all(isinstance(text, str) for text in (name, prompt, image or "")) or label not in tuple(LETTERS):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError):
            problems.append(f"{path}:{number}: want id, perhaps image, and conversations of a question and a letter")
            continue
        shown = "<image>" in prompt
        text = prompt.replace("<image>", "").strip()
        rows.append({"id": name, "image": (image or f"{name}/image.png") if shown else None, "label": label,
                     "prompt": f"{text}\n{LETTER_SUFFIX}", "groups": ["IMG"] if shown else []})  # fmt: skip
    refuse(problems)
    refuse_repeats((row["id"] for row in rows), f"{path}: id")
    return rows


def _official(problems_file: Path, splits_file: Path) -> list[dict]:
    """Rows of the test split."""
    entries, splits = read_json(problems_file), read_json(splits_file)
    if not isinstance(entries, dict):
        raise BadInput(f"{problems_file}: want a JSON object {{id: problem}}")
    names = splits.get("test") if isinstance(splits, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{splits_file}: want a JSON object whose `test` lists ids")
    refuse_repeats(names, f"{splits_file}: id")
    problems, rows = [], []
    for name in names:
        try:
            rows.append(_row(name, entries.get(name)))
        except BadInput as error:
            problems.append(f"{problems_file}: problem {brief(name)}: {error}")
    refuse(problems)
    return rows


def _row(name: str, entry: object) -> dict:
    """A problem as a row. BadInput says what it lacks."""
    if not isinstance(entry, dict):
        raise BadInput("missing" if entry is None else "want a JSON object")
    choices, answer, image = entry.get("choices"), entry.get("answer"), entry.get("image")
    for key in ("question", "hint", "grade", "subject"):
        if not isinstance(entry.get(key), str):
            raise BadInput(f"{key} must be a string")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadInput("choices must be a list of strings")
    if type(answer) is not int or not 0 <= answer < min(len(choices), len(LETTERS)):
        raise BadInput(f"answer {brief(answer)} is the place of none of the {len(choices)} choices")
    if not isinstance(image, str | None):
        raise BadInput("image must be a string or null")
    context = f"Context: {entry['hint']}\n" if entry["hint"] else ""
    text = (context + multiple_choice(entry["question"], choices)).replace("  ", " ").strip()
    found = {SUBJECTS.get(entry["subject"]), GRADES.get(entry["grade"]), "TXT" if entry["hint"] else None,
             "IMG" if image else None, None if entry["hint"] or image else "NO"}  # fmt: skip
    return {"id": name, "image": f"{name}/{image}" if image else None, "prompt": f"{text}\n{LETTER_SUFFIX}",
            "label": LETTERS[answer], "groups": [group for group in GROUPS if group in found]}  # fmt: skip


def _merged(rows: list[dict], official: list[dict], data: Path) -> list[dict]:
    """LLaVA's rows with the official groups."""
    known = {row["id"]: row for row in official}
    own = {row["id"] for row in rows}
    problems = [f"{data}: id {brief(row['id'])} is in {LLAVA}, not in the test split"
                for row in rows if row["id"] not in known]  # fmt: skip
    problems += [f"{data}: id {brief(name)} of the test split is not in {LLAVA}" for name in known if name not in own]
    problems += [f"{data}: id {brief(row['id'])}: {LLAVA} and problems.json differ in the answer or the image"
                 for row in rows if row["id"] in known and (
                     row["label"], "IMG" in row["groups"]) != (
                     known[row["id"]]["label"], "IMG" in known[row["id"]]["groups"])]  # fmt: skip
    refuse(problems)
    return [{**row, "groups": known[row["id"]]["groups"]} for row in rows]


BENCHMARK = Benchmark(
    rules="ScienceQA, letters read as in LLaVA; accuracy over the test split (total) and its images (IMG)",
    questions=questions, score=score, table=table, max_new_tokens=128, files=FILES,
    figures={"total": "rounded.total", "IMG": "rounded.IMG"},
)  # fmt: skip
