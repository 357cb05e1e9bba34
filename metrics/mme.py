"""MME: two yes/no questions about each image, one true and one false, in 14 tasks.

Paper: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv:2306.13394. For each task:

    acc   = right answers / questions          acc+ = images with both answers right / images
    score = 100 (acc + acc+)                   perception, cognition = sum of the scores of 10 and of 4 tasks

| symbol   | argument         | type                                            |
|----------|------------------|-------------------------------------------------|
| question | rows[i]          | dict with `task`, `pair` (its image), `label`   |
| label    | rows[i]["label"] | "yes" or "no"                                   |
| answer   | said[id]         | str                                             |

Options
    suffix  llava: "Please answer yes or no." is replaced by the request for a single word; official: it is kept

Questions come from the released folder (TASK/IMAGE.txt, in five tasks TASK/questions_answers_YN/IMAGE.txt), or from
a folder of results (TASK.txt), whose lines hold the questions as well. The two differ: the release has 2,374
questions, the tool's template 2,370 (landmark 396 instead of 400).

Rules of the released code: an answer in lower case is "yes" or "no" if its first four characters hold this word,
"yes" before "no" ("know" is no); everything else is `other`, and wrong. Departures, none of which changes a
figure on the released files: the questions of an image are found by its name, not as two lines in a row; a sum is
None while one of its tasks is missing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from common import BadInput, brief, refuse
from metrics.answers import id_of, join
from metrics.benchmark import Benchmark, lines
from metrics.chair import ratio
from metrics.files import below, pick, read_lines

GROUPS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
TASKS = [task for tasks in GROUPS.values() for task in tasks]
RELEASE = "MME_Benchmark_release_version"
FILES = {RELEASE: "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"}
YES_NO = "Please answer yes or no."
WORD_SUFFIX = "Answer the question using a single word or phrase."
IMAGES = (".jpg", ".jpeg", ".png")


def questions(data: Path, images: Path | None, *, suffix: Literal["llava", "official"] = "llava") -> list[dict]:
    """Rows of `id` (TASK/IMAGE#NUMBER), `image`, `prompt`, `task`, `pair`, `question` and `label`. Raises BadInput also
    for images without their two questions."""
    folder = _with_tasks(data)
    files = _images(folder if images is None else _with_tasks(images), images or data)
    problems, rows, times = [], [], Counter()
    for where, task, cells in _lines(folder):
        if len(cells) < 3 or cells[2].strip().lower() not in ("yes", "no"):
            problems.append(f"{where}: want an image, a question and Yes or No, separated by tabs")
            continue
        name, question = f"{task}/{_stem(cells[0])}", cells[1].strip()
        times[name] += 1
        rows.append({"id": f"{name}#{times[name]}", "image": files.get(name, f"{task}/{cells[0]}"),
                     "prompt": f"{_plain(question)}\n{WORD_SUFFIX}" if suffix == "llava" else question,
                     "task": task, "pair": f"{name}#{(times[name] + 1) // 2}", "question": question,
                     "label": cells[2].strip().lower()})  # fmt: skip
    if not problems:
        problems += [f"{folder}: {name}: {n} questions, want two an image" for name, n in times.items() if n % 2]
    if images is not None:
        problems += [f"{images}: no image for {brief(name)}" for name in times if name not in files]
    refuse(problems or ([] if rows else [f"{folder}: holds no questions"]))
    return rows


def read_answers(path: Path, rows: Sequence[dict], *, subset: bool = False) -> dict[str, str]:
    """id -> text, of a folder of official results (TASK.txt: image, question, ground truth, reply), of LLaVA's JSONL
    (`question_id` TASK/IMAGE, `prompt`, `text`) or of answers by `id`."""
    ids, asked, times = {row["id"] for row in rows}, defaultdict(list), Counter()
    for row in rows:
        asked[row["id"].rpartition("#")[0], _plain(row["question"])].append(row["id"])

    def key(answer: dict) -> str:
        if (name := id_of(answer)) in ids:
            return name
        prompt = answer.get("prompt")
        question = f"{name.split('/')[0]}/{_stem(name)}", _plain(prompt) if isinstance(prompt, str) else ""
        if question not in asked:
            raise BadInput(f"no question {brief(prompt)} about {brief(name)}")
        times[question] += 1  # where an image has the same question twice, in the order of the file
        return asked[question][min(times[question], len(asked[question])) - 1]

    return join(path, rows, key, subset=subset, entries=_results(path) if path.is_dir() else None)


def score(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    """{n, other, tasks: {task: n, images, right, both, other, acc, acc_plus, score}, perception, cognition, rounded}.
    A sum is None while one of its tasks is missing."""
    tasks = {task: _score_task(mine, said) for task in TASKS if (mine := [row for row in rows if row["task"] == task])}
    sums = {group: sum(tasks[task]["score"] for task in names) if set(names) <= tasks.keys() else None
            for group, names in GROUPS.items()}  # fmt: skip
    rounded = {name: round(value, 2) for name, value in sums.items() if value is not None}
    rounded |= {task: round(found["score"], 2) for task, found in tasks.items()}
    counts = {name: sum(found[name] for found in tasks.values()) for name in ("n", "other")}
    return {**counts, "tasks": tasks, **sums, "rounded": rounded}


def table(scores: Mapping) -> list[tuple[str, ...]]:
    """One line a task, then the two sums ("-": tasks are missing)."""
    tasks = lines(scores["tasks"].items(), ("n", "other", "acc", "acc_plus"))
    return [("task", "questions", "other", "acc", "acc+", "score"),
            *((*line, f"{scores['tasks'][line[0]]['score']:.2f}") for line in tasks),
            *((group, "", "", "", "", "-" if scores[group] is None else f"{scores[group]:.2f}") for group in GROUPS)]


def read_answer(text: str) -> str:
    """Released rule: "yes", "no" or "other"."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _score_task(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    answers = [read_answer(said[row["id"]]) for row in rows]
    right = Counter(row["pair"] for row, answer in zip(rows, answers) if answer == row["label"])
    counts = {"n": len(rows), "images": len({row["pair"] for row in rows}), "right": right.total(),
              "both": sum(n == 2 for n in right.values()), "other": answers.count("other")}
    acc, acc_plus = ratio(counts["right"], counts["n"]), ratio(counts["both"], counts["images"])
    return {**counts, "acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}


def _with_tasks(data: Path) -> Path:
    """The folder that holds most tasks: folders of the release or, where there are none, TASK.txt."""
    files = list(below(data))
    release = {folder for path in files for folder in path.parents[:2] if folder.name in TASKS and folder != data}
    tasks = Counter(place.parent for place in release or
                    [path for path in files if path.suffix == ".txt" and path.stem in TASKS])  # fmt: skip
    if not tasks:
        raise BadInput(f"{data}: has no {RELEASE}; published at {FILES[RELEASE]}")
    most = [folder for folder, n in tasks.items() if n == max(tasks.values())]
    if len(folders := pick(most, data, "mme")) > 1:
        raise BadInput(f"{data}: {folders[0]} or {folders[1]}? one folder with the tasks of MME is wanted")
    return folders[0]


def _lines(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(FILE:LINE, task, [image, question, label, ...]) of the release or of results."""
    for task in TASKS:
        release = (folder / task).is_dir()
        files = _files(folder / task, "questions_answers_YN", "*.txt") if release else [folder / f"{task}.txt"]
        for file in filter(Path.is_file, files):
            image = [file.stem] if release else []
            yield from ((where, task, image + line.split("\t")) for where, line in read_lines(file))


def _results(folder: Path) -> list[tuple[str, dict]]:
    """(FILE:LINE, answer) of official results."""
    lines = list(_lines(folder))
    if not lines:
        raise BadInput(f"{folder}: holds none of MME's results, {TASKS[0]}.txt and others")
    refuse(f"{where}: want image, question, label and reply, separated by tabs, found {len(cells)} cells"
           for where, _, cells in lines if len(cells) != 4)  # fmt: skip
    return [(where, {"question_id": f"{task}/{image}", "prompt": question, "text": reply})
            for where, task, (image, question, _, reply) in lines]  # fmt: skip


def _images(folder: Path, root: Path) -> dict[str, str]:
    """TASK/STEM -> image file relative to `root`."""
    return {f"{task}/{path.stem}": path.relative_to(root).as_posix() for task in TASKS
            for path in _files(folder / task, "images", "*") if path.suffix.lower() in IMAGES}


def _files(folder: Path, inner: str, pattern: str) -> list[Path]:
    """The files of a task, in its inner folder if there is one."""
    return sorted((folder / inner if (folder / inner).is_dir() else folder).glob(pattern))


def _stem(image: str) -> str:
    """What an image and its questions are both called."""
    path = PurePosixPath(image)
    return path.stem if path.suffix.lower() in (*IMAGES, ".txt") else path.name


def _plain(question: str) -> str:
    """A question without any request for the form of the answer, and with single spaces."""
    return " ".join(question.replace(WORD_SUFFIX, " ").replace(YES_NO, " ").split())


BENCHMARK = Benchmark(
    rules="MME as released: yes or no in the first four characters, anything else wrong",
    questions=questions, score=score, table=table, max_new_tokens=128, files=FILES, read_answers=read_answers,
    figures={group: f"rounded.{group}" for group in GROUPS},
)  # fmt: skip
