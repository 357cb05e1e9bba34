"""Measure a model, or a file of answers, on the field's benchmarks, by the rules of their released code.

    python evaluate.py --benchmark chair                                   model/tiny on 300 held-out scenes
    python evaluate.py --benchmark chair pope claims --model runs/dpo/model --out dpo.jsonl
    python evaluate.py --benchmark amber pope mme --model DIR --data DIR --out results.jsonl
    torchrun --nproc-per-node 8 evaluate.py --benchmark amber --model DIR --data DIR --out amber.jsonl
    python evaluate.py --benchmark pope --data DIR --answers answers.jsonl               scores only
    python evaluate.py --benchmark mmvet --data DIR --answers FILE --judge URL --judge-model NAME --out mmvet.jsonl
    python evaluate.py --benchmark mmvet --data DIR --answers FILE --replies grades.json      judged elsewhere
    python evaluate.py --benchmark preference --data pairs.jsonl --model DIR --reference DIR
    python evaluate.py --benchmark amber --help                            the options of one benchmark
    python evaluate.py --compare base.jsonl dpo.jsonl --plot tradeoff.svg  results of --out next to each other

    questions -> answers of a model, or of a file -> replies of a judge, if there is one -> scores -> table

A benchmark is one file of metrics/: what it measures, the official files it reads and its options are in that file's
header. --data is a folder with the official downloads as they come; what is missing is named, and where it is
published. chair, pope and claims need none: without it they ask about scenes, whose contents are known exactly.

A model answers greedily, one question a prompt. With --out, answers are kept as they come, and the same command goes
on after an interruption; neither interruptions nor the number of processes change the answers. --answers FILE joins
answers by id: what is missing, unknown or given twice is refused; --subset scores what is answered. A judge's replies
are kept in --cache by request, so scoring again asks nothing.

--out FILE receives one JSON object a line and benchmark: {benchmark, protocol, scores, versions}. `protocol` holds what
decides whether two results may be compared: rules, options, questions, prompt, length limit, decoding, model, judge.
Figures are not rounded; `rounded` or `percent` is, as the official script does. Nothing is written unless all went
well. --compare prints such files next to each other, with what papers report for the same variant, and --plot draws
hallucination against coverage (metrics/compare.py).

Exit status 2 on bad input, with one line for each of the first problems; 1 when interrupted.
"""

import argparse
import hashlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import (
    BadInput,
    add_options,
    check_ranges,
    is_url,
    kwargs_of,
    read_json,
    refuse,
    run_script,
    unwritable,
    versions,
    write_text,
)
from data.check import check_records
from data.processor import Processor
from data.records import write_jsonl
from judges.ask import Model, Request, Server, kept_model, local_model, server_model
from metrics import (
    amber,
    chair,
    claims,
    claims_questions,
    coco_captions,
    compare,
    gqa,
    hallusionbench,
    llavabench,
    mmbench,
    mme,
    mmhal,
    mmvet,
    object_halbench,
    pope,
    preference,
    scienceqa,
    seedbench,
    textvqa,
    vizwiz,
)
from metrics.benchmark import CONTROLS, Benchmark
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import answers
from model.reference import identity
from model.training import ranks, start_processes
from pairs.progress import forget, in_chunks

BENCHMARKS: dict[str, Benchmark] = {module.__name__.removeprefix("metrics."): module.BENCHMARK for module in (
    chair, pope, claims, claims_questions, amber, mme, scienceqa, mmbench, seedbench, textvqa, vizwiz, gqa,
    coco_captions, hallusionbench, mmhal, object_halbench, mmvet, llavabench, preference)}
BENCHMARKS |= {"mmhal_v": mmhal.BENCHMARK_V, "object_halbench_rules": object_halbench.BENCHMARK_RULES}
RANGES = {"[1, 1e9]": "max_new_tokens batch_size judge_runs scenes num max_sentences n", "(0, inf)": "beta",
          "[0, 1e9]": "seed"}
HOME = Path(__file__).resolve().parent
HINT = "; with --out, the same command goes on"


class Task(NamedTuple):
    """A benchmark that was asked for: its questions, and its answers if they are in a file."""

    name: str
    benchmark: Benchmark
    rows: list[dict]
    said: Mapping | None
    length: int  # limit of an answer in tokens


# ---------------------------------------------------------------------------------------------- command line


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line -> settings. The options of the chosen benchmarks are those of their functions."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--benchmark", nargs="+", choices=BENCHMARKS, required=True, metavar="NAME",
                       help=", ".join(BENCHMARKS))
    known, _ = first.parse_known_args([word for word in argv or sys.argv[1:] if word not in ("-h", "--help")])
    parser = argparse.ArgumentParser(description=__doc__, parents=[first], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_general_options(parser)
    group = parser.add_argument_group(f"options of {', '.join(known.benchmark)}")
    functions = dict.fromkeys(f for name in known.benchmark for f in functions_of(BENCHMARKS[name]))
    add_options(group, *functions, suppress=True)
    args = parser.parse_args(argv)
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    check(args, parser)
    return args


def add_general_options(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark has."""
    add = parser.add_argument
    add("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="folder or hub id (default: model/tiny)")
    add("--template", help="prompt template (default: the checkpoint's own)")
    add("--aspect", metavar="WAY", help="how images are shown, a way of the model's family (default: the checkpoint's)")
    add("--precision", choices=("fp32", "bf16"), help="(default: bf16 on CUDA, else fp32)")
    add("--data", type=Path, metavar="DIR", help="folder with the official files; of preference: a file of pairs")
    add("--images", type=Path, metavar="DIR", help="folder of the image files (default: --data)")
    add("--answers", type=Path, metavar="FILE", help="score these answers instead of asking a model")
    add("--subset", action="store_true", help="score the questions that --answers answers, not all or nothing")
    add("--max-new-tokens", type=int, help="limit of an answer (default: the benchmark's own)")
    add("--batch-size", type=int, default=64, help="prompts at a time (default: %(default)s)")
    add("--judge", metavar="WHO", help="the URL of an OpenAI-compatible server, or a LLaVA folder")
    add("--judge-model", metavar="NAME", help="name of the model at that server")
    add("--judge-runs", type=int, default=1, help="how often each answer is judged (default: %(default)s)")
    add("--judge-prompts", type=Path, metavar="FILE", help="JSON {benchmark: prompt} in place of our own prompts")
    add("--replies", type=Path, nargs="+", metavar="FILE", help="a judge's replies, in the benchmark's official format")
    add("--cache", type=Path, default=Path("runs/cache"), metavar="DIR", help="judges' replies (default: %(default)s)")
    add("--reference", type=Path, metavar="DIR", help="of preference: the reference policy")
    add("--out", type=Path, metavar="FILE", help="write the results here (JSON, one line a benchmark)")
    add("--save-answers", type=Path, metavar="FILE", help="write questions and answers here (JSONL), for --answers")


def functions_of(benchmark: Benchmark) -> tuple[Callable, Callable]:
    """Those whose keyword arguments are options."""
    return benchmark.questions, benchmark.score


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that do not go together, and places that cannot be written, before any work is done."""
    several = len(args.benchmark) > 1
    for wrong, reason in (
        (len(set(args.benchmark)) < len(args.benchmark), "--benchmark names one twice"),
        (several and (args.answers or args.save_answers or args.replies),
         "--answers, --save-answers and --replies are for one benchmark at a time"),
        (args.subset and not args.answers, "--subset is for --answers"),
        (args.judge and args.replies, "--judge asks, --replies has been answered: which of them?"),
        (args.judge and is_url(args.judge) != bool(args.judge_model),
         "--judge-model names the model of a server: --judge URL --judge-model NAME"),
        (args.judge_runs > 1 and args.judge and not is_url(args.judge), "a local judge is greedy: one run is all"),
        (ranks()[1] > 1 and not args.out, "several processes need --out, next to which their answers are kept"),
    ):  # fmt: skip
        if wrong:
            parser.error(reason)
    for path in filter(None, (args.out, args.save_answers)):
        if reason := "another argument names it" if _names(args, path) > 1 else unwritable(path):
            parser.error(f"cannot write {path}: {reason}")


def _names(args: argparse.Namespace, path: Path) -> int:
    """How many arguments name this file."""
    given = [item for value in vars(args).values() for item in (value if isinstance(value, list | tuple) else [value])]
    return sum(isinstance(item, Path) and os.path.realpath(item) == os.path.realpath(path) for item in given)


# -------------------------------------------------------------------------------- questions, answers, replies


def prepare(name: str, args: argparse.Namespace) -> Task:
    """Questions, and answers if they are in a file. Raises BadInput."""
    benchmark = BENCHMARKS[name]
    data = inspect.signature(benchmark.questions).parameters["data"]
    if args.data is None and data.default is data.empty:
        wanted = f"a folder with {', '.join(benchmark.files)}" if benchmark.files else "a file"
        raise BadInput(f"{name} needs --data, {wanted}")
    asks = not (args.answers or args.replies)
    images = image_folder(args) if asks else None
    rows = benchmark.questions(args.data, images, **kwargs_of(benchmark.questions, vars(args)))
    if asks and not images and any(row["image"] and ":" not in row["image"] for row in rows):
        raise BadInput(f"{name}: --images DIR with the image files, or --answers FILE")
    said = None if asks else {}  # a judge's replies may be all that the scores need
    if args.answers:
        said = benchmark.read_answers(args.answers, rows, subset=args.subset)
        rows = [row for row in rows if row["id"] in said]
    return Task(name, benchmark, rows, said, args.max_new_tokens or benchmark.max_new_tokens)


def image_folder(args: argparse.Namespace) -> Path | None:
    """Where the image files are; a file of pairs names them from its own folder."""
    if args.images or args.data is None:
        return args.images
    return args.data if args.data.is_dir() else args.data.parent


def ask(model, processor: Processor, rows: Sequence[dict], max_new_tokens: int, batch_size: int = 64,
        root: Path | None = None, progress: str = "", out: Path | None = None,
        settings: Mapping | None = None) -> dict[str, str] | None:
    """Greedy answers: question id -> text. What is asked twice about an image is computed once.

    out: the answers are kept next to this file as they come, and processes share the questions (pairs/progress.py);
    None in processes other than the first.
    """
    asked = sorted({(row["image"], row["prompt"]) for row in rows}, key=lambda pair: (pair[0] or "", pair[1]))
    keys = [hashlib.sha256(repr(pair).encode()).hexdigest()[:16] for pair in asked]

    def work(places: list[int]) -> tuple[list[dict], Counter]:
        images, prompts = zip(*(asked[place] for place in places))
        texts = answers(model, processor, list(images), list(prompts), batch_size=batch_size,
                        max_new_tokens=max_new_tokens, root=root)
        return [{"id": keys[place], "text": text} for place, (text,) in zip(places, texts)], Counter()

    rank, world = ranks()
    found = in_chunks(keys, work, out, dict(settings or {}), chunk=batch_size, rank=rank, world=world,
                      barrier=dist.barrier if world > 1 else lambda: None, progress=progress)
    if found is None:
        return None
    texts = {pair: row["text"] for pair, row in zip(asked, found[0], strict=True)}
    return {row["id"]: texts[row["image"], row["prompt"]] for row in rows}


def make_judges(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, root: Path | None) -> list[Model]:
    """The judge of --judge, once a run; replies are kept in --cache. A server gets the run as its seed."""
    if args.judge is None:
        return []
    folder = args.cache / "replies"
    if is_url(args.judge):
        return [server_model(Server(args.judge, args.judge_model, seed=run), cache=folder, root=root)
                for run in range(args.judge_runs)]
    model = local_model(load_llava(args.judge, dtype, device), Processor(args.judge), args.judge,
                        batch_size=args.batch_size, root=root)
    return [kept_model(model, folder)]


def measure(model, processor: Processor, name: str, *, said: Mapping | None = None, controls: bool = False,
            **options) -> tuple[dict, Mapping]:
    """(scores, answers) of a benchmark about scenes; `said` spares the asking. With `controls`, control rows too."""
    benchmark = BENCHMARKS[name]
    rows = [row for row in benchmark.questions(None, None, **options)
            if controls or row.get("split", row.get("part")) not in CONTROLS]
    said = said or ask(model, processor, rows, benchmark.max_new_tokens, progress=name)
    return benchmark.score(rows, said), said


# ------------------------------------------------------------------------------------------------- results


def text(value: object) -> object:
    """A setting as it is written: paths as texts."""
    if isinstance(value, tuple | list):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def protocol(task: Task, args: argparse.Namespace) -> dict:
    """What two results must share to be compared, and where the answers came from."""
    listed = "\n".join(f"{row['id']}\t{row.get('image')}" for row in task.rows)
    options = {name: text(value) for function in functions_of(task.benchmark)
               for name, value in kwargs_of(function, vars(args)).items()}
    entries = {"rules": task.benchmark.rules, "data": text(args.data), "options": options, "subset": args.subset,
               "questions": len(task.rows), "questions_sha256": hashlib.sha256(listed.encode()).hexdigest()}
    if task.benchmark.requests:
        entries |= {"judge": args.judge_model or args.judge or text(args.replies or []), "judge_runs": args.judge_runs,
                    "judge_prompts": text(args.judge_prompts)}
    if args.answers or args.replies:
        return {**entries, "answers": text(args.answers)}
    model = args.model.resolve()
    name = model.relative_to(HOME) if model.is_relative_to(HOME) else args.model
    return {**entries, "model": str(name), "template": args.template, "aspect": args.aspect,
            "precision": args.precision, "decoding": "greedy", "max_new_tokens": task.length,
            "first_prompt": task.rows[0]["prompt"] if task.rows else None,
            **({"reference": str(args.reference)} if args.reference else {})}


def table(cells: Sequence[Sequence]) -> str:
    """Rows of cells, right-aligned."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*cells)]
    return "\n".join("  ".join(f"{cell!s:>{width}}" for cell, width in zip(line, widths)) for line in cells)


def run(args: argparse.Namespace) -> list[tuple[Task, Mapping, dict]] | None:
    """(task, answers, result) of each benchmark; None in processes other than the first."""
    check_ranges(vars(args), RANGES)
    tasks = [prepare(name, args) for name in args.benchmark]
    prompts = read_json(args.judge_prompts) if args.judge_prompts else {}
    check_judges(tasks, args, prompts)
    rank, world = ranks()
    device = start_processes(world)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    root = image_folder(args)
    model = processor = None
    if any(task.said is None for task in tasks):
        processor = Processor(args.model, template=args.template, aspect=args.aspect)
        for task in tasks:
            check_records([row for row in task.rows if row["image"]], processor, root, task.name,
                          sequences=task.benchmark.sequences, new_tokens=task.length)
        model = load_llava(args.model, dtype, device).eval()
    said = [answer(task, model, processor, args, root, dtype) if task.said is None else task.said for task in tasks]
    model = None  # frees the device for a judge
    if rank:
        return None
    judges = make_judges(args, device, dtype, root)
    return [(task, its, result_of(task, its, args, judges, prompts)) for task, its in zip(tasks, said)]


def answer(task: Task, model, processor: Processor, args: argparse.Namespace, root: Path | None,
           dtype: torch.dtype) -> Mapping | None:
    """What the model says, or what is measured of it. None in processes other than the first."""
    if task.benchmark.measure:
        reference = load_llava(args.reference, dtype, model.device).eval() if args.reference else None
        said = task.benchmark.measure(model, processor, task.rows, root=root, reference=reference,
                                      batch_size=args.batch_size, progress=task.name)
        return said if ranks()[0] == 0 else None
    out = args.out and args.out.with_name(f"{args.out.name}.{task.name}")
    return ask(model, processor, task.rows, task.length, args.batch_size, root, task.name, out,
               {**protocol(task, args), **identity(args.model, [], processor)})  # another model of this name is refused


def check_judges(tasks: Sequence[Task], args: argparse.Namespace, prompts: Mapping) -> None:
    """Every judged benchmark needs a judge, or its replies. Raises BadInput."""
    refuse(f"{task.name} is judged: --judge URL --judge-model NAME, --judge DIR, or --replies FILE" for task in tasks
           if task.benchmark.requests and not (args.judge or args.replies)
           and task.benchmark.requests(task.rows, {row["id"]: "any answer of a few words" for row in task.rows}))
    refuse(f"{args.judge_prompts}: {name} is no judged benchmark that was asked for, or its prompt is no text"
           for name, prompt in prompts.items()
           if not isinstance(prompt, str) or name not in {t.name for t in tasks if t.benchmark.requests})  # fmt: skip


def result_of(task: Task, said: Mapping, args: argparse.Namespace, judges: list[Model], prompts: Mapping) -> dict:
    """{benchmark, protocol, scores, versions}."""
    benchmark, inputs = task.benchmark, [task.rows, said]
    if benchmark.requests:
        replies = [run for path in args.replies or () for run in benchmark.read_replies(path, task.rows)]
        if judges:  # {key: text} of each run; a request without a reply gets "", which counts as unparsed
            asked = benchmark.requests(*inputs, **({"prompt": prompts[task.name]} if prompts.get(task.name) else {}))
            requests = [Request(image, text) for image, text in asked.values()]
            replies += [dict(zip(asked, (reply.text for reply in judge.ask(requests)))) for judge in judges]
        inputs.append(replies)
    scores = benchmark.score(*inputs, **kwargs_of(benchmark.score, vars(args)))
    return {"benchmark": task.name, "protocol": protocol(task, args), "scores": scores, "versions": versions()}


def compare_results(argv: Sequence[str]) -> None:
    """--compare: a table for each benchmark, and with --plot an image of them."""
    parser = argparse.ArgumentParser(description=compare.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, nargs="+", required=True, metavar="RESULT", help="files of --out")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw hallucination against coverage")
    args = parser.parse_args(argv)
    runs = compare.read_runs(args.compare, BENCHMARKS)
    if args.plot:
        write_text(args.plot, compare.picture(runs, BENCHMARKS))
    for name, mine in compare.by_benchmark(runs).items():
        cells, notes = compare.compare(mine, BENCHMARKS[name], compare.read_published(name))
        print("\n".join([name, table(cells), *notes, ""]))


def main(argv: Sequence[str] | None = None) -> None:
    """From the command line to the tables. Raises BadInput."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--compare" for word in argv):
        return compare_results(argv)
    args = read_arguments(argv)
    found = run(args)
    if found is not None:
        write(args, found)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def write(args: argparse.Namespace, found: Sequence[tuple[Task, Mapping, dict]]) -> None:
    """Files first, then the tables; the answers that were kept on the way are no longer needed."""
    for task, said, _ in found:
        if args.save_answers:
            write_jsonl(args.save_answers, ({**row, "text": said[row["id"]]} for row in task.rows))
    if args.out:
        write_jsonl(args.out, [result for _, _, result in found])
    for task, _, result in found:
        if args.out:
            forget(args.out.with_name(f"{args.out.name}.{task.name}"))
        print(f"{task.name}\n" * (len(found) > 1) + table(task.benchmark.table(result["scores"])))


if __name__ == "__main__":
    run_script(main, "evaluate.py", HINT)
