"""Measure object hallucination: CHAIR (captions) and POPE (yes/no questions).

    python evaluate.py --benchmark chair                        model/tiny on 300 held-out scenes
    python evaluate.py --benchmark pope --model runs/dpo/model --out pope.json
    python evaluate.py --benchmark chair --answers captions.jsonl --annotations objects.json
    python evaluate.py --benchmark chair --model FOLDER --images val2014 --annotations objects.json --num 500
    python evaluate.py --benchmark pope --answers answers.jsonl --annotations coco_pope_random.json

What is measured stands in metrics/chair.py and metrics/pope.py: the rules of the released code, exactly.

Pictures (one of two)
    scenes        without --annotations: --num scenes of --split, whose contents are known. POPE then has two
                  more rows, other_picture and removed, that tell looking from guessing: metrics/questions.py
    photographs   --annotations FILE, and --images FOLDER where a model shall answer. chair: one JSON object
                  {image id: [COCO classes]}, or an instances file of COCO; an id stands for the picture of this
                  name, of this stem or of this COCO number (40468 is COCO_val2014_000000040468.jpg):
                  data/names.py. pope: the label files of POPE (JSONL with question_id, image, text, label), one
                  for each split
Answers (one of two)
    a model       --model FOLDER: greedy, one question a prompt
    a file        --answers FILE: JSONL, or a JSON list, with an id (id, question_id, image_id) and a text (text,
                  answer, response, caption, model_prediction). Joined by id, for chair in any way that names the
                  picture: one that is missing, unknown or given twice is refused. --subset scores the questions
                  that are answered, and says so in the result. With several POPE label files the ids are SPLIT-ID
                  (random-17). Understood as well: POPE's own answers, in label order and each with its `question`,
                  which is compared; and LLaVA's, with --questions llava_pope_test.jsonl, whose other splits than
                  those of --annotations do not count

Output: a table, and with --out a JSON file {benchmark, protocol, scores}. `protocol` holds what decides
whether two figures may be compared: rules, pictures and their sample, prompt, length limit, decoding, model.
Fractions are not rounded; `percent` is. Nothing is written unless all went well. Exit status 2 on bad input, and
one line for each of the first problems.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from metrics.questions import (
    CHAIR_PROMPT,
    CONTROLS,
    POPE_PROMPT,
    chair_photographs,
    chair_scenes,
    pope_photographs,
    pope_scenes,
    read_asked,
)

from common import BadInput
from data import scenes
from data.check import check_records
from data.processor import Processor
from data.records import write_jsonl
from data.templates import TEMPLATES
from metrics import chair as chair_metric
from metrics import pope as pope_metric
from metrics.files import read_answers
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import answers
from model.llava import Llava

HOME = Path(__file__).resolve().parent
FIRST_SEED = {"dev": scenes.DEV, "test": scenes.TEST}
PART = scenes.TEST - scenes.DEV  # scenes of a split
SCENES = 300
PROMPTS = {"chair": CHAIR_PROMPT, "pope": POPE_PROMPT}
LENGTHS = {"chair": 96, "pope": 4}  # tokens


def evaluate_chair(
    model: Llava,
    processor: Processor,
    questions: Iterable[int | dict],
    *,
    prompt: str = CHAIR_PROMPT,
    max_new_tokens: int = LENGTHS["chair"],
    batch_size: int = 64,
    root: Path | None = None,
    progress: str = "",
) -> dict:
    """CHAIR of a model's greedy captions, as metrics.chair.chair returns it.

    questions: seeds of scenes (asked `prompt`), or questions of metrics/questions.py.
    """
    questions = list(questions)
    rows = chair_scenes(questions, prompt) if isinstance(questions[0], int) else questions
    return score_chair(rows, ask(model, processor, rows, max_new_tokens, batch_size, root, progress))


def evaluate_pope(
    model: Llava,
    processor: Processor,
    questions: Iterable[int | dict],
    *,
    prompt: str = POPE_PROMPT,
    max_new_tokens: int = LENGTHS["pope"],
    batch_size: int = 64,
    root: Path | None = None,
    progress: str = "",
) -> dict:
    """POPE of a model's greedy answers: {splits: {name: scores}, mean, controls: {name: scores}}.

    questions: seeds of scenes (asked `prompt`), or questions of metrics/questions.py.
    """
    questions = list(questions)
    rows = pope_scenes(questions, prompt) if isinstance(questions[0], int) else questions
    return score_pope(rows, ask(model, processor, rows, max_new_tokens, batch_size, root, progress))


def ask(
    model: Llava,
    processor: Processor,
    rows: Sequence[dict],
    max_new_tokens: int,
    batch_size: int = 64,
    root: Path | None = None,
    progress: str = "",
) -> dict[str, str]:
    """Greedy answers: question id -> text. What is asked twice about a picture is computed once."""
    asked = sorted({(row["image"], row["prompt"]) for row in rows})  # a picture's questions stand together
    images, prompts = zip(*asked)
    texts = answers(model, processor, list(images), list(prompts), batch_size=batch_size,
                    max_new_tokens=max_new_tokens, root=root, progress=progress)  # fmt: skip
    said = {pair: text for pair, (text,) in zip(asked, texts)}
    return {row["id"]: said[row["image"], row["prompt"]] for row in rows}


def score_chair(rows: Sequence[dict], said: Mapping[str, str], max_sentences: int | None = None) -> dict:
    """CHAIR of answers (question id -> text), each cut to its first `max_sentences` sentences."""
    texts = {key: first_sentences(text, max_sentences) for key, text in said.items()}
    return chair_metric.chair(texts, {row["id"]: row["objects"] for row in rows})


def score_pope(rows: Sequence[dict], said: Mapping[str, str]) -> dict:
    """POPE of answers (question id -> text) by split; the mean leaves the control rows out."""
    scores = {}
    for name in dict.fromkeys(row["split"] for row in rows):
        labels = {row["id"]: row["label"] for row in rows if row["split"] == name}
        scores[name] = pope_metric.pope({key: said[key] for key in labels}, labels)
    controls = {name: scores.pop(name) for name in CONTROLS if name in scores}
    return {"splits": scores, "mean": pope_metric.mean_of(scores.values()), "controls": controls}


def first_sentences(text: str, most: int | None) -> str:
    """The first `most` sentences; a sentence ends at . ! or ? before a blank. None keeps the text."""
    return text if most is None else " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:most])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit status 2 on bad input."""
    args = parse(argv)
    try:
        result, said, rows = run(args)
        if args.save_answers:
            write_jsonl(args.save_answers, ({**row, "text": said[row["id"]]} for row in rows))
        if args.out:
            write_jsonl(args.out, [result])
        print(table(result))
    except (BadInput, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def run(args: argparse.Namespace) -> tuple[dict, dict[str, str], list[dict]]:
    """Questions -> answers -> scores: (what --out holds, answers by id, questions)."""
    asked = read_asked(args.questions) if args.questions else None
    rows = make_questions(args, asked)
    if args.answers:
        also = asked.values() if asked else ()
        said = read_answers(args.answers, rows, args.benchmark, subset=args.subset, also=also)
        rows = [row for row in rows if row["id"] in said]
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        processor = Processor(args.model, template=args.template, aspect=args.aspect)
        source = ", ".join(map(str, args.annotations or ["scenes"]))
        check_records(rows, processor, args.images, source, new_tokens=args.max_new_tokens)
        model = load_llava(args.model, dtype, device)
        said = ask(model, processor, rows, args.max_new_tokens, args.batch_size, args.images, args.benchmark)
    if args.benchmark == "chair":
        scores = score_chair(rows, said, args.max_sentences)
    else:
        scores = score_pope(rows, said)
    return {"benchmark": args.benchmark, "protocol": protocol(args, rows), "scores": scores}, said, rows


def make_questions(args: argparse.Namespace, asked: Mapping | None = None) -> list[dict]:
    """The questions that the arguments describe; `asked` is what --questions holds."""
    chair = args.benchmark == "chair"
    if args.annotations is None:
        seeds = range(FIRST_SEED[args.split], FIRST_SEED[args.split] + args.num)
        return chair_scenes(seeds, args.prompt) if chair else pope_scenes(seeds, args.prompt, args.seed)
    common = args.images, args.num, args.seed, args.prompt
    if chair:
        return chair_photographs(args.annotations[0], *common)
    return pope_photographs(args.annotations, *common, asked)


def protocol(args: argparse.Namespace, rows: Sequence[dict]) -> dict:
    """What two results must share to be compared, and where the answers came from."""
    listed = "\n".join(f"{row['id']}\t{row['image']}" for row in rows)
    entries = {
        "rules": {"chair": chair_metric.RULES, "pope": pope_metric.RULES}[args.benchmark],
        "pictures": [str(path) for path in args.annotations] if args.annotations else f"scenes, {args.split}",
        "num": args.num,
        "seed": args.seed,
        "subset": args.subset,
        "questions": len(rows),
        "questions_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        "max_sentences": args.max_sentences,
    }
    if args.answers:
        return {**entries, "answers": str(args.answers)}
    decoding = {"decoding": "greedy", "max_new_tokens": args.max_new_tokens}
    model = args.model.resolve()
    name = model.relative_to(HOME) if model.is_relative_to(HOME) else model
    return {**entries, "model": str(name), "prompt": args.prompt, "template": args.template,
            "aspect": args.aspect, **decoding}


def table(result: dict) -> str:
    """The result for people: percentages and counts."""
    scores = result["scores"]
    if result["benchmark"] == "chair":
        lines = [("CHAIRs", "CHAIRi", "Recall", "words", "captions", "mentions", "hallucinated")]
        figures = [f"{100 * scores[name]:.1f}" for name in ("chair_s", "chair_i", "recall")]
        counts = (scores[name] for name in ("n", "mentions", "hallucinated"))
        lines += [(*figures, f"{scores['words']:.1f}", *counts)]
    else:
        counts = ("n", "TP", "FP", "TN", "FN", "other")
        lines = [("", *pope_metric.FIGURES, *counts)]
        for name, row in {**scores["splits"], "mean": scores["mean"], **scores["controls"]}.items():
            blank = ("precision", "recall", "f1") if name == "removed" else ()  # it has no "yes" to find
            figures = ["" if key in blank else f"{100 * row[key]:.2f}" for key in pope_metric.FIGURES]
            lines.append((name, *figures, *(row.get(count, "") for count in counts)))
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines)]
    return "\n".join("  ".join(f"{cell!s:>{width}}" for cell, width in zip(line, widths)) for line in lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with the defaults that depend on the benchmark filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--benchmark", choices=("chair", "pope"), required=True)
    add("--model", type=Path, default=DEFAULT_MODEL, help="llava-hf folder (default: model/tiny)")
    add("--template", choices=TEMPLATES, help="prompt template (default: the checkpoint's own)")
    add("--aspect", choices=("crop", "pad", "anyres"),
        help="how pictures are shown (default: the checkpoint's way)")
    add("--answers", type=Path, help="score this file instead of running a model")
    add("--subset", action="store_true", help="score the questions that --answers answers, not all or nothing")
    add("--annotations", type=Path, nargs="+", help="ground truth of photographs; without it: scenes")
    add("--questions", type=Path, help="pope: LLaVA's question file, if --answers has LLaVA's ids")
    add("--images", type=Path, help="folder of the photographs")
    add("--split", choices=tuple(FIRST_SEED), default="test", help="scenes: which part (default: test)")
    add("--num", type=positive, help="scenes: how many (default: 300); photographs: sample (default: all)")
    add("--seed", type=int, default=0, help="of the sample and of POPE's random questions (default: 0)")
    add("--prompt", help='default: "Describe the image in detail." or "{question}"')
    add("--max-new-tokens", type=positive, help="default: 96 for chair, 4 for pope")
    add("--max-sentences", type=positive, help="chair: score only the first sentences of each answer")
    add("--batch-size", type=positive, default=64, help="prompts at a time; changes no figure (default: 64)")
    add("--out", type=Path, help="write the result here (JSON)")
    add("--save-answers", type=Path, help="write the answers here (JSONL), for --answers")
    args = parser.parse_args(argv)
    check(args, parser)
    args.prompt = PROMPTS[args.benchmark] if args.prompt is None else args.prompt
    args.num = args.num or (None if args.annotations else SCENES)
    args.max_new_tokens = args.max_new_tokens or LENGTHS[args.benchmark]
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse arguments that do not go together, before any work is done."""
    pope, photographs = args.benchmark == "pope", args.annotations is not None
    for wrong, reason in (
        (pope and args.prompt is not None and "{question}" not in args.prompt, "--prompt lacks {question}"),
        (pope and args.max_sentences, "--max-sentences is for chair"),
        (not pope and args.questions, "--questions is for pope"),
        (not pope and photographs and len(args.annotations) > 1, "chair takes one --annotations file"),
        (photographs and not (args.answers or args.images), "--annotations needs --images or --answers"),
        (not photographs and (args.questions or args.images), "--questions, --images need --annotations"),
        (args.subset and not args.answers, "--subset is for --answers"),
        (not photographs and (args.num or 0) > PART, f"--num: a split has {PART:,} scenes"),
    ):
        if wrong:
            parser.error(reason)
    taken = {os.path.realpath(path) for path in (args.answers, args.questions, *(args.annotations or ())) if path}
    for path in filter(None, (args.out, args.save_answers)):
        if reason := "another argument names it" if os.path.realpath(path) in taken else _unwritable(path):
            parser.error(f"cannot write {path}: {reason}")
        taken.add(os.path.realpath(path))


def _unwritable(path: Path) -> str:
    """Why `write_jsonl` could not put a file there, or ""."""
    if os.path.exists(path) and not os.path.isfile(path):
        return "it is no regular file"
    try:
        tempfile.NamedTemporaryFile(dir=path.absolute().parent, prefix=f".{path.name}.").close()
    except OSError as error:
        return error.strerror
    return ""


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


if __name__ == "__main__":
    main()
