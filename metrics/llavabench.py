"""LLaVA-Bench (In-the-Wild): a judge rates the model's answer next to one that GPT-4 wrote from captions alone.

Paper: Liu et al., "Visual Instruction Tuning", NeurIPS 2023, arXiv:2304.08485. For the 60 questions the judge gives
two ratings from 1 to 10, r(i) to the reference answer and m(i) to the model's:

    score = 100 mean m / mean r        over all questions, and over each category: conv, detail, complex

| symbol     | argument           | type                                                            |
|------------|--------------------|-----------------------------------------------------------------|
| i          | rows[i]["category"]| conv, detail or complex                                         |
| r(i), m(i) | replies[run][id]   | str; the first line of the judge's reply has both ratings       |

Rules of the released script: the first line, with commas read as spaces, must be two numbers separated by one space.
Else both ratings are -1 and stay in the means, which lowers every score; such replies are counted as `unparsed`. Each
mean is rounded to three decimals before the division; `rounded` follows that, the other figures are exact.

Official files: questions.jsonl, context.jsonl, answers_gpt4.jsonl and the images. Where only reviews are at hand,
`data` may be a file of reviews (JSONL of question_id, category, content, tuple): it names the questions.

Departures: context.jsonl may hold one caption as a text, which the released script would print letter by letter. A
score whose reference mean is 0 is 0.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from common import BadInput, brief
from metrics import judged
from metrics.answers import id_of, join, with_files
from metrics.benchmark import Benchmark, find
from metrics.files import each, field, read_jsonl, texts, unique

CATEGORIES = ("complex", "conv", "detail")
PREFIX = "llava_bench_"  # of a category in the reviews
HOME = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
FILES = dict.fromkeys(("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"), HOME)

PROMPT = """\
You check the quality of answers, helpfully and precisely.

[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}
[End of Assistant 1]

[Assistant 2]
{answer}
[End of Assistant 2]

[Task]
Two AI assistants answered a user's question about an image. You cannot see the image; the context describes it. Judge \
how helpful, relevant, accurate and detailed each answer is, and rate each as a whole from 1 to 10, where more is \
better. Write nothing on the first line but the two ratings, that of Assistant 1 first, with a space between them. \
From the second line on, explain your ratings. Favour neither side, and do not let the order of the answers matter."""


def questions(data: Path, images: Path | None = None) -> list[dict]:
    """The 60 questions: `id`, `image`, `prompt`, `category`, and `context` and `reference` for the judge."""
    if data.is_file():
        return unique(data, each(read_jsonl(data), _question))
    path, contexts, answers = (find(data, name, "llavabench", FILES) for name in FILES)
    context = dict(each(read_jsonl(contexts), lambda row: (field(row, "image"), _caption(row))))
    reference = dict(each(read_jsonl(answers), lambda row: (_id(row), field(row, "text"))))

    def row(entry: dict) -> dict:
        key, image = _id(entry), field(entry, "image")
        for place, table, name in ((contexts, context, image), (answers, reference, key)):
            if name not in table:
                raise BadInput(f"{place.name} has nothing for {brief(name)}")
        return {**_question(entry), "image": image, "prompt": field(entry, "text"),
                "context": context[image], "reference": reference[key]}

    return with_files(unique(path, each(read_jsonl(path), row)), images, "llavabench")


def _question(row: dict) -> dict:
    return {"id": _id(row), "category": _category(row)}


def _id(row: dict) -> str:
    return id_of(row, ("question_id",))


def _caption(row: dict) -> str:
    return row["caption"] if isinstance(row.get("caption"), str) else "\n".join(texts(row, "caption"))


def _category(row: dict) -> str:
    name = field(row, "category").removeprefix(PREFIX)
    if name not in CATEGORIES:
        raise BadInput(f"category {brief(name)} is none of {', '.join(CATEGORIES)}")
    return name


def read_replies(path: Path, rows: Sequence[dict]) -> list[dict[str, str]]:
    """A file of reviews -> one run. The `tuple` counts: where `content` says otherwise, it is the reply."""
    wanted = {row["id"]: row["category"] for row in rows}

    def review(entry: dict) -> str:
        key, text = _id(entry), field(entry, "content")
        if _category(entry) != wanted.get(key, entry["category"].removeprefix(PREFIX)):
            raise BadInput(f"category {brief(entry['category'])}, the question's is {brief(wanted[key])}")
        pair = field(entry, "tuple", list)
        if len(pair) != 2 or not {type(rating) for rating in pair} <= {int, float}:
            raise BadInput(f"'tuple' must be two numbers, found {brief(pair)}")
        return text if list(read_ratings(text) or (-1, -1)) == pair else f"{pair[0]} {pair[1]}"

    return [join(path, rows, _id, review)]


def requests(rows: Sequence[dict], said: Mapping[str, str], prompt: str = PROMPT) -> dict[str, tuple[None, str]]:
    """id -> (None, text): the judge sees no image. BadInput where the rows come from a file of reviews."""
    if rows and "context" not in rows[0]:
        raise BadInput(f"a judge needs the official files ({', '.join(FILES)}), not a file of reviews alone")
    return {row["id"]: (None, judged.fill(prompt, context=row["context"], question=row["prompt"],
                                   reference=row["reference"], answer=said[row["id"]])) for row in rows}  # fmt: skip


def read_ratings(reply: str) -> tuple[float, float] | None:
    """(of the reference, of the model) from the first line of a reply."""
    words = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        ratings = tuple(map(float, words))
    except ValueError:
        return None
    return ratings if len(ratings) == 2 and all(map(math.isfinite, ratings)) else None


def score(rows: Sequence[dict], said: Mapping[str, str], replies: Sequence[Mapping[str, str]]) -> dict:
    """`mean` and `deviation` over the runs: `all`, each category, in percent of the reference.

    said: not needed. Also `counts` (questions of each), `ratings` (mean of reference and of model, by run and name),
    `unparsed` of each run, and `rounded` as printed.
    """
    judged.check_runs(replies, [row["id"] for row in rows])
    groups = {"all": rows} | {name: [row for row in rows if row["category"] == name] for name in CATEGORIES}
    groups = {name: group for name, group in groups.items() if group}
    ratings = [{name: _means(group, run) for name, group in groups.items()} for run in replies]
    figures = judged.over_runs([{name: _percent(*pair) for name, pair in run.items()} for run in ratings])
    printed = judged.over_runs([{name: _percent(*(round(mean, 3) for mean in pair)) for name, pair in run.items()}
                                for run in ratings])  # fmt: skip
    return {
        "n": len(rows), "runs": len(replies), "counts": {name: len(group) for name, group in groups.items()},
        "ratings": ratings, "unparsed": [sum(read_ratings(run[row["id"]]) is None for row in rows) for run in replies],
        **figures, "rounded": judged.rounded(printed, 1),
    }  # fmt: skip


def _means(rows: Sequence[dict], replies: Mapping[str, str]) -> tuple[float, float]:
    pairs = [read_ratings(replies[row["id"]]) or (-1.0, -1.0) for row in rows]
    return fmean(reference for reference, _ in pairs), fmean(model for _, model in pairs)


def _percent(reference: float, model: float) -> float:
    return model / reference * 100 if reference else 0.0


def table(scores: Mapping) -> list[tuple]:
    """All questions, then each category."""
    names = list(scores["counts"])
    return [("", *names, "unparsed"), ("LLaVA-Bench", *judged.cells(scores, names, 1), str(sum(scores["unparsed"])))]


BENCHMARK = Benchmark(
    rules="LLaVA-Bench (In-the-Wild) as released, judge prompt 1", questions=questions, score=score, table=table,
    max_new_tokens=1024, files=FILES, requests=requests, read_replies=read_replies,
    figures={name: f"rounded.mean.{name}" for name in ("all", *CATEGORIES)},
)  # fmt: skip
