"""MM-Vet: open questions that need several abilities at once, graded by a judge.

Paper: Yu et al., "MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities", ICML 2024,
arXiv:2308.02490. With a grade s(i) in [0, 1] for each of the 218 answers:

    total = 100 mean over i of s(i)            a capability's score = the same over the questions that need it
                                               a combination's score = over those that need exactly these

| symbol | argument                | type                                                                     |
|--------|-------------------------|--------------------------------------------------------------------------|
| i      | rows[i]["capabilities"] | list of rec, ocr, know, gen, spat, math                                  |
| s(i)   | replies[run][id]        | str, the judge's reply; its first word is the grade                      |

The paper has five runs of the judge. Answers: {"v1_0": text, ...} as JSON, or JSONL with an id and a text. Grades:
{"v1_0": {"model": [..], "content": [..], "score": [..]}}, one entry a run.

Departures
- The judge is asked once. The released script asks up to five times, with rising temperature, until the reply is a
  grade; both give 0 in the end, here counted as `unparsed`.
- A reply of nan is no grade.
- The released template has no place for the question: append "\\n{question} | {reference} | {answer} | " to use it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from common import BadInput, brief, read_json
from metrics import judged
from metrics.answers import join, with_files
from metrics.benchmark import Benchmark, find
from metrics.files import each, field, read_table, texts

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
FILES = {"mm-vet.json": "https://github.com/yuweihao/MM-Vet (release v1, mm-vet.zip)"}

PROMPT = """\
Grade the prediction of an AI model against the ground truth of a question about an image. The grade is one of 0.0 \
(entirely wrong), 0.1, 0.2, and so on up to 1.0 (entirely right). Where the ground truth joins parts by <AND>, the \
prediction is entirely right only if it has all of them, and earns its share if it has some. Where it joins parts by \
<OR>, any one of them is enough. Write the grade that completes the last line of the table, and nothing else.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
Which fruits are on the plate? | apple <AND> pear | Two bananas. | 0.0
Which fruits are on the plate? | apple <AND> pear | There is an apple. | 0.5
Which fruits are on the plate? | apple <AND> pear | An apple lies next to a pear. | 1.0
What is the total on the receipt? | 12.50 <OR> $12.50 | The total is $12.50. | 1.0
Why is the sign funny? | It says that the library is closed for reading. A library is the place to read, so the notice \
contradicts its own purpose. | The sign announces that a library is closed. | 0.3
{question} | {reference} | {answer} | """


def questions(data: Path, images: Path | None = None) -> list[dict]:
    """The 218 questions: `id`, `image`, `prompt`, `reference` and `capabilities`."""
    path = find(data, "mm-vet.json", "mmvet", FILES)

    def row(item: tuple) -> dict:
        key, entry = item
        if not set(texts(entry, "capability")) <= set(CAPABILITIES) or not entry["capability"]:
            raise BadInput(f"'capability' {brief(entry['capability'])} must name some of {', '.join(CAPABILITIES)}")
        return {"id": key, "image": field(entry, "imagename"), "prompt": field(entry, "question"),
                "reference": field(entry, "answer"),
                "capabilities": [name for name in CAPABILITIES if name in entry["capability"]]}

    return with_files(each(read_table(path), row), images, "mmvet")


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> answer."""
    entries = None
    if path.suffix == ".json" and isinstance(read_json(path, object), dict):
        entries = [(where, {"id": key, "text": text}) for where, (key, text) in read_table(path)]
    return join(path, rows, entries=entries, subset=subset)


def read_replies(path: Path, rows: Sequence[dict]) -> list[dict[str, str]]:
    """A file of grades -> one {id: reply} a run. The `score` counts: it replaces a `content` that says otherwise, as
    after five failed tries."""

    def grades(item: tuple[str, object]) -> list[str]:
        scores = field(item[1], "score", list)
        if wrong := [score for score in scores if type(score) not in (int, float) or not 0 <= score <= 1]:
            raise BadInput(f"score {brief(wrong[0])} is no number from 0 to 1")
        if len(contents := texts(item[1], "content")) != len(scores):
            raise BadInput(f"{len(scores)} scores of {len(contents)} replies")
        return [text if (read_grade(text) or 0) == score else str(score) for text, score in zip(contents, scores)]

    found = join(path, rows, lambda item: item[0], grades, entries=read_table(path))
    runs = {len(replies) for replies in found.values()}
    if len(runs) != 1 or 0 in runs:
        raise BadInput(f"{path}: all answers need equally many grades, found {' and '.join(map(str, sorted(runs)))}")
    return [{key: replies[run] for key, replies in found.items()} for run in range(runs.pop())]


def requests(rows: Sequence[dict], said: Mapping[str, str], prompt: str = PROMPT) -> dict[str, tuple[None, str]]:
    """id -> (None, text): the judge sees no image."""
    spaced = {row["id"]: row["reference"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ") for row in rows}
    return {row["id"]: (None, judged.fill(prompt, question=row["prompt"], reference=spaced[row["id"]],
                                   answer=said[row["id"]])) for row in rows}  # fmt: skip


def read_grade(reply: str) -> float | None:
    """The first word of a reply, if it is a number from 0 to 1."""
    try:
        grade = float(reply.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def score(rows: Sequence[dict], said: Mapping[str, str], replies: Sequence[Mapping[str, str]]) -> dict:
    """`mean` and `deviation` over the runs, in percent: `total`, capabilities, combinations ("ocr+math", "ocr only").

    said: not needed. Also `counts` (questions of each), `totals` and `unparsed` of each run, `rounded` (one decimal).
    """
    judged.check_runs(replies, [row["id"] for row in rows])
    found = [_run(rows, run) for run in replies]
    figures = judged.over_runs([{name: total / n * 100 for name, (total, n) in run.items()} for run in found])
    return {
        "n": len(rows), "runs": len(replies), "counts": {name: n for name, (_, n) in found[0].items()},
        "unparsed": [sum(read_grade(run[row["id"]]) is None for row in rows) for run in replies],
        "totals": [run["total"][0] / len(rows) * 100 for run in found],
        **figures, "rounded": judged.rounded(figures, 1),
    }  # fmt: skip


def _run(rows: Sequence[dict], replies: Mapping[str, str]) -> dict[str, tuple[float, int]]:
    """Name -> (sum of grades, questions), summed in the order of the rows, as the released script does: sums of tenths
    are not exact, and half of the scores of eight questions end in 5."""
    sums: dict[str, tuple[float, int]] = {}
    for row in rows:
        grade, needs = read_grade(replies[row["id"]]) or 0.0, row["capabilities"]
        for name in ("total", *needs, "+".join(needs) if len(needs) > 1 else f"{needs[0]} only"):
            total, n = sums.get(name, (0.0, 0))
            sums[name] = total + grade, n + 1
    return sums


def table(scores: Mapping) -> list[tuple]:
    """The total, the capabilities, then the combinations, those of many questions first."""
    counts = scores["counts"]
    combinations = sorted(set(counts) - {"total", *CAPABILITIES}, key=lambda name: (-counts[name], name))
    names = ["total", *(name for name in CAPABILITIES if name in counts), *combinations]
    lines = zip(names, (str(counts[name]) for name in names), judged.cells(scores, names, 1))
    return [("", "questions", "score"), *lines, ("unparsed", str(sum(scores["unparsed"])), "")]


BENCHMARK = Benchmark(
    rules="MM-Vet as released (218 questions), judge prompt 1", questions=questions, score=score, table=table,
    max_new_tokens=1024, files=FILES, read_answers=read_answers, requests=requests, read_replies=read_replies,
    figures={name: f"rounded.mean.{name}" for name in ("total", *CAPABILITIES)},
)  # fmt: skip
