"""MMBench: multiple choice, where a question counts only if the answer is right in every order of its choices.

Paper: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", ECCV 2024, arXiv:2307.06281
(CircularEval).

    accuracy = questions right in all their rows / questions        also for each category and l2-category

| symbol   | argument         | type                                                                        |
|----------|------------------|-----------------------------------------------------------------------------|
| row      | rows[i]          | dict with `group` (its question), `choices`, `label`, `categories`          |
| label    | rows[i]["label"] | letter of the right choice in this row's order                              |
| answer   | said[id]         | str                                                                         |

Options
    edition    official file, without .tsv. mmbench_dev_20230712 has 1,176 questions in 4,377 rows; the published
               accuracy, the server's, is over 1,164
    rounds     file: the orders that are in the file (copy k of a question has index + k 1,000,000); all: each row in
               all rotations of its choices as well, LLaVA's --all-rounds
    unmatched  wrong: an answer without a letter is wrong; random: a letter A-E is drawn, as released
    seed       of the letters that `unmatched random` draws

Rules of the released code, which only then asks ChatGPT: the letter is the only one of A-E among the words of an
answer (a lone "A" not in more than three words); or the only one with the same punctuation around it, e.g. "B." or
"(B)"; or that of the only choice whose text is in the answer, in any case. Choices end at the first empty cell.
Departures: what ChatGPT would match is counted as `unmatched`; a draw depends on seed and id, not on the order of
rows.

Images are in the file, as base64 (or as the index of the row that has it). Where a model is asked they are written
to a folder EDITION-images next to it. LLaVA's answers are read by `question_id` and `round_id`.
"""

import base64
import csv
import io
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from common import BadInput, brief, refuse
from data.names import as_id
from data.rows import Images
from metrics.answers import id_of, join
from metrics.benchmark import Benchmark, find, lines
from metrics.choices import LETTER_SUFFIX, LETTERS, multiple_choice, share
from metrics.files import each, read_text, refuse_repeats

Edition = Literal["mmbench_dev_20230712", "mmbench_dev_en_20231003", "MMBench_DEV_EN"]
FILES = {f"{name}.tsv": "https://github.com/open-compass/MMBench" for name in get_args(Edition)}
ROUNDS = ("0", "1", "2", "3")
COPY = 10**6  # copies of a question have its index plus a multiple of this
NOTHING = {"", "nan", "none", "null", "na", "n/a"}  # empty cells, as written by pandas, in lower case
AROUND = (("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
          (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."))  # punctuation of a letter, first match wins
KINDS = ("category", "l2-category")


def questions(data: Path, images: Path | None, *, edition: Edition = "mmbench_dev_20230712",
              rounds: Literal["file", "all"] = "file") -> list[dict]:  # fmt: skip
    """Rows of `id` (index, or index-ROUND), `image`, `prompt`, `group`, `choices`, `label` and `categories`."""
    path = find(data, f"{edition}.tsv", "mmbench", FILES)
    lines = _read(path)
    encoded = {line["index"]: line.get("image", "") for _, line in lines}

    def rounds_of(line: dict) -> list[dict]:
        image = None if images is None else _image(f"{path}:{line['index']}", line["index"], encoded, images)
        return _rounds(line, image, rounds == "all")

    rows = [row for found in each(lines, rounds_of) for row in found]
    refuse_repeats((row["id"] for row in rows), f"{path}: index")
    return rows


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> text, of LLaVA's answers (`question_id`, `round_id`, `text`) or of answers by `id`. The order of choices
    must be that of the round."""

    def key(answer: dict) -> str:
        name, turn, order = id_of(answer), as_id(answer.get("round_id", 0)), answer.get("option_char")
        if turn not in ROUNDS:
            raise BadInput(f"{brief(answer['round_id'])} is no round_id")
        if isinstance(order, list) and order != _rotated(list(LETTERS[: len(order)]), int(turn)):
            raise BadInput(f"option_char {brief(order)} is not the order of round {turn}")
        return name if turn == "0" else f"{name}-{turn}"

    return join(path, rows, key, subset=subset)


def score(rows: Sequence[dict], said: Mapping[str, str], *, unmatched: Literal["wrong", "random"] = "wrong",
          seed: int = 0) -> dict:  # fmt: skip
    """{n (questions), rows, right, rows_right, unmatched, accuracy, category, l2-category, rounded}."""
    letters = {row["id"]: read_answer(said[row["id"]], row["choices"]) for row in rows}
    missed = [key for key, letter in letters.items() if letter is None]
    if unmatched == "random":
        letters |= {key: random.Random(f"{seed}-{key}").choice(LETTERS) for key in missed}
    hits = {row["id"]: letters[row["id"]] == row["label"] for row in rows}
    groups, parts = defaultdict(list), {kind: defaultdict(list) for kind in KINDS}
    for row in rows:
        groups[row["group"]].append(row)
    right = [all(hits[row["id"]] for row in group) for group in groups.values()]
    for counts, group in zip(right, groups.values()):
        for kind, name in min(group, key=lambda row: row["copy"])["categories"].items():
            parts[kind][name].append(counts)
    means = {kind: {name: share(found) for name, found in sorted(parts[kind].items())} for kind in KINDS}
    total = share(right)
    rounded = {"accuracy": round(100 * total["accuracy"], 1)}
    rounded |= {kind: {name: round(100 * one["accuracy"], 1) for name, one in means[kind].items()} for kind in KINDS}
    return {**total, "rows": len(rows), "rows_right": sum(hits.values()), "unmatched": len(missed), **means,
            "rounded": rounded}  # fmt: skip


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """All questions, then each l2-category and category."""
    parts = [("all", scores), *scores["l2-category"].items(), *scores["category"].items()]
    return [("", "questions", "right", "accuracy"), *lines(parts, ("n", "right", "accuracy"), 1),
            ("unmatched rows", str(scores["rows"]), str(scores["unmatched"]), "")]  # fmt: skip


def read_answer(text: str, choices: Sequence[str]) -> str | None:
    """Released rule: the letter that the answer names, or whose choice it repeats; None if there is no single one."""
    words = text.split()
    for before, after in (("", ""), *AROUND):
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        article = (before, after) == ("", "") and found == ["A"] and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    found = [letter for letter, choice in zip(LETTERS, choices) if choice.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def _rotated(order: list[str], turn: int) -> list[str]:
    return order[turn:] + order[:turn]


def _read(path: Path) -> list[tuple[str, dict]]:
    """(FILE:LINE, {column: cell}) of a TSV file whose cells may be quoted and hold line breaks."""
    csv.field_size_limit(2**31 - 1)  # an image is one cell
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    lines, problems, last = [], [], 0
    try:
        head = next(reader, [])
        if missing := [name for name in ("index", "question", "A", "B", "answer") if name not in head]:
            hidden = ": the answers of the test split are with the server" if missing == ["answer"] else ""
            raise BadInput(f"{path}:1: has no column {', '.join(missing)}{hidden}")
        last = reader.line_num
        for cells in reader:
            where, last = f"{path}:{last + 1}", reader.line_num
            if len(cells) == len(head):
                lines.append((where, dict(zip(head, cells))))
            elif cells:
                problems.append(f"{where}: {len(cells)} cells, the head has {len(head)}")
    except csv.Error as error:
        raise BadInput(f"{path}:{reader.line_num}: not a TSV file ({error})") from None
    refuse(problems or ([] if lines else [f"{path}: has no rows"]))
    return lines


def _rounds(line: dict, image: str | None, rotate: bool) -> list[dict]:
    """The row of a line and, to `rotate`, one for each further rotation of its choices."""
    index = line["index"].strip().removesuffix(".0")
    if not re.fullmatch("[0-9]{1,18}", index):
        raise BadInput(f"index {brief(line['index'])} is no number")
    choices = []
    for letter in LETTERS[:4]:
        if line.get(letter, "").strip().lower() in NOTHING:
            break
        choices.append(line[letter])
    answer = line["answer"].strip()
    if answer not in tuple(LETTERS[: len(choices)]):
        raise BadInput(f"answer {brief(answer)} is none of the {len(choices)} choices")
    hint = line.get("hint", "")
    question = line["question"] if hint.strip().lower() in NOTHING else f"{hint}\n{line['question']}"
    shared = {"image": image, "group": str(int(index) % COPY), "copy": int(index) // COPY,
              "categories": {kind: line[kind] for kind in KINDS if kind in line}}  # fmt: skip
    orders = [_rotated(choices, turn) for turn in range(len(choices) if rotate else 1)]
    return [{"id": f"{index}-{turn}" if turn else index, **shared, "choices": order,
             "label": LETTERS[(LETTERS.index(answer) - turn) % len(choices)],
             "prompt": f"{multiple_choice(question, order)}\n{LETTER_SUFFIX}"}
            for turn, order in enumerate(orders)]  # fmt: skip


def _image(where: str, index: str, encoded: Mapping[str, str], images: Path) -> str:
    """The image of a row as a file, relative to `images`."""
    cell = encoded[index]
    if len(cell) <= 64:  # too short for an image: the index of the row that has it
        cell = encoded.get(cell, "")
    try:
        data = base64.b64decode(cell, validate=True)
    except ValueError:
        data = b""
    if not data:
        raise BadInput("its image is missing or not base64")
    return Images(where, images)(data)


BENCHMARK = Benchmark(
    rules="MMBench, CircularEval; letters inferred as released, without ChatGPT",
    questions=questions, score=score, table=table, max_new_tokens=128, files=FILES, read_answers=read_answers,
    figures={"accuracy": "rounded.accuracy"},
)  # fmt: skip
