"""Make preference pairs.

    python generate_pairs.py                            text pairs of 600 scenes -> runs/pairs-rank.jsonl
    python generate_pairs.py --method realign           with a rejected image from retrieval
    python generate_pairs.py --method adavip            with a rejected image that lacks one object
    python generate_pairs.py --method adavip --pairs runs/pairs-rank.jsonl
    torchrun --nproc-per-node 2 generate_pairs.py --method bdhs            two processes, the same file
    python generate_pairs.py --method realign --images photos.jsonl --model DIR --clip DIR
    python generate_pairs.py --method adavip --pairs rlaif-v.parquet --detector maskrcnn --lama big-lama.pt
    python generate_pairs.py --images photos.jsonl --judge http://localhost:8000/v1 --judge-model NAME

Methods (one file each in pairs/, which names the paper and the departures from it)

    --method   chosen           rejected answer                              rejected image
    rank       best sample      worst sample                                 none
    realign    given or best    chosen, its visual words filled in again     a similar picture, the one
                                while looking at a similar picture           that was looked at
    adavip     given or best    given or worst                               without the object whose
                                                                             removal fits `chosen` least
    bdhs       given or best    chosen, its sentences completed with         none
                                hardly any of the picture visible
    povid      given or best    given, or written as by corrupt              with diffusion noise
    mdpo       given or best    given or worst                               a small crop
    corrupt    given or best    chosen, with errors written into it          none

"Given" is what the input brings along; "best" and "worst" are the ends of --samples answers of the model, as
a judge ranks them. Where only a chosen answer is wanted, a stronger model may write it instead (--author).
Where the model has nothing to say (texts are given), it is not loaded.

Input (one of three), in any of the formats of data/formats.py
    --scenes N        pictures of the scene world, of which everything is known
    --images FILE     pictures and questions, with or without an answer to be chosen
    --pairs FILE      preference pairs; realign, bdhs and corrupt keep `chosen`, the others both answers

Who judges, who writes, who finds objects: the scene world's own record, if nothing else is said. Nobody knows
what photographs show, so they need --judge (rank, or where no answers are given), --writer (corrupt, povid)
and --detector (adavip). A server's key is read from the environment variable OPENAI_API_KEY.

Long runs. What is done stands in part files beside the output, and the same command goes on where it was
interrupted; under torchrun the processes share the records. Neither changes the result (pairs/progress.py).
A picture that turns out to be damaged ends the run, and it goes on from there with --bad-records skip.

Output: pair records, written in one go at the end; the same arguments give the same file. Pictures that a
method makes lie beside it, in NAME-images. Then a summary: pairs made, pictures dropped and why and, for
scenes, the share of answers that mention an absent object and of rejected images that contradict the chosen
answer; the same as one line of JSON. On bad input, or when a server cannot be reached, exit status 2, with
the reasons.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import BadInput
from data import scenes
from data.check import check_records
from data.corrupt import STEPS
from data.formats import load as load_data
from data.formats import write
from data.processor import ClipProcessor, Processor
from data.records import relocate
from data.templates import TEMPLATES
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.hub import resolve
from pairs.gallery import write_gallery
from pairs.methods import (
    METHODS,
    STARTS_FROM_CHOSEN,
    Options,
    Share,
    is_url,
    make_pairs,
    needs_clip,
    needs_model,
    scene_records,
)
from pairs.progress import forget
from pairs.report import summary

HOME = Path(__file__).resolve().parent
FIRST_SEED = {"pairs": scenes.PAIRS, "train": scenes.TRAIN, "dev": scenes.DEV}


# ---------------------------------------------------------------------------------------- command line


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> settings; what `Options` says are the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=METHODS, default="rank", help="(default: %(default)s)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--scenes", type=_count, default=600, metavar="N", help="how many scenes (default: 600)")
    one.add_argument("--images", type=Path, metavar="FILE", help="pictures, questions and perhaps answers")
    one.add_argument("--pairs", type=Path, metavar="FILE", help="preference pairs")
    add("--scene-split", choices=FIRST_SEED, default="pairs",
        help="which scenes; those of the test split are for evaluation only (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="(default: runs/pairs-METHOD.jsonl, for trl .parquet)")
    add("--format", choices=("plumbline", "trl"), default="plumbline",
        help="trl: its columns, with the pictures in a .parquet file (default: %(default)s)")
    add("--gallery", action="store_true", help="a page to look at the pairs, beside them as .html")
    add("--cache", type=Path, metavar="DIR",
        help="embeddings and servers' replies (default: cache, beside --out)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="(default: %(default)s)")
    add("--batch-size", type=_count, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--bad-records", choices=("stop", "skip"),
        help="when a picture turns out to be damaged: stop, keeping what is done, or leave the record out"
             " (default: %(default)s)")
    _add_models(parser.add_argument_group("models"))
    _add_methods(parser.add_argument_group("options of single methods"))
    parser.set_defaults(**{option.name: option.default for option in fields(Options)
                           if option.name not in ("root", "folder", "source", "progress")})
    arguments = parser.parse_args(argv)
    suffix = {"plumbline": ".jsonl", "trl": ".parquet"}[arguments.format]
    arguments.out = arguments.out or Path("runs") / f"pairs-{arguments.method}{suffix}"
    arguments.cache = arguments.cache or arguments.out.parent / "cache"
    return arguments


def _add_models(group) -> None:
    """Who answers, embeds, judges and writes."""
    add = group.add_argument
    add("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR",
        help="LLaVA folder or hub id (default: model/tiny)")
    add("--template", choices=TEMPLATES, help="prompt template (default: the checkpoint's own)")
    add("--aspect", choices=("crop", "pad", "anyres"),
        help="how pictures are shown (default: the checkpoint's way)")
    add("--clip", type=Path, metavar="DIR",
        help="CLIP folder or hub id (default: model/tiny/clip, which knows scenes only)")
    add("--sentence-model", type=Path, metavar="DIR",
        help="realign, bdhs: folder or hub id of a sentence encoder that compares answers (default: CLIP)")
    add("--judge", type=_who("scene", "clip", "policy"), metavar="WHO",
        help="ranks the samples: scene, clip, policy, another LLaVA (folder or hub id) or a server's URL"
             " (default: %(default)s)")
    add("--judge-model", metavar="NAME", help="the model at that server")
    add("--author", type=_who("policy"), metavar="WHO",
        help="realign, bdhs, povid, corrupt: writes the chosen answers that are not given: policy (the best of"
             " --samples), another LLaVA or a server's URL (default: %(default)s)")
    add("--author-model", metavar="NAME", help="the model at that server")
    add("--writer", type=_who("scene", "policy"), metavar="WHO",
        help="corrupt, povid: writes errors: scene, policy, another LLaVA or a server's URL"
             " (default: %(default)s)")
    add("--writer-model", metavar="NAME", help="the model at that server")


def _add_methods(group) -> None:
    """What the methods' equations leave open."""
    add = group.add_argument
    add("--samples", type=_count, metavar="N", help="answers to each picture (default: %(default)s)")
    add("--temperature", type=_between(0, 10), metavar="T", help="of the sampling (default: %(default)s)")
    add("--max-new-tokens", type=_count, metavar="N", help="of an answer (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="of all that is drawn (default: %(default)s)")
    add("--top-k", type=_count, metavar="K", help="realign: neighbours tried (default: %(default)s)")
    add("--tau", type=_between(-1, 1), metavar="X",
        help="realign: similarity that a rejected answer must stay below (default: %(default)s)")
    add("--same-image", type=_between(0, 2), metavar="X",
        help="realign: neighbours whose 8 x 8 thumbnails have at least this cosine are the same picture under another"
             " name, reconstructed; above 1: those of equal pixels only (default: %(default)s)")
    add("--nprobe", type=_count, metavar="N",
        help="realign: cells that an approximate search looks into (default: exact search)")
    add("--rho-th", type=_between(0, 1), metavar="X",
        help="bdhs: share of the image tokens that is hidden (default: %(default)s)")
    add("--iterations", type=_count, metavar="N",
        help="bdhs: attempts, the last one free (default: %(default)s)")
    add("--eps-s", type=_between(-1, 1.1), metavar="X",
        help="bdhs: similarity that a rejected answer must stay below (default: %(default)s)")
    add("--noise", action="store_true", help="bdhs: a noisy picture, no hidden tokens")
    add("--noise-step", type=_step, metavar="T",
        help="povid, bdhs --noise: diffusion step, 0 to 999 (default: %(default)s)")
    add("--overflow", choices=("clamp", "wrap"), help="noise out of range (default: %(default)s)")
    add("--detector", type=_detector, metavar="WHAT",
        help="adavip: scene, maskrcnn or a COCO instances FILE.json (default: %(default)s)")
    add("--detector-weights", type=Path, metavar="FILE", help="of maskrcnn (default: torchvision's download)")
    add("--lama", type=Path, metavar="FILE", help="adavip: weights of LaMa (default: a smooth fill)")
    add("--dilation", type=_count, metavar="N",
        help="adavip: side of the square that masks grow by, odd (default: %(default)s)")
    add("--any-object", action="store_true",
        help="adavip: remove objects, too, that the chosen answer does not mention (the paper's rule)")
    add("--max-area", type=_between(0, 1), metavar="X",
        help="adavip: larger objects stay in the picture (default: %(default)s)")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _step(text: str) -> int:
    if not text.isdigit() or int(text) >= STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {STEPS - 1}")
    return int(text)


def _between(low: float, high: float):
    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return float(text)

    return number


def _who(*names: str):
    def who(text: str) -> str:
        if text not in names and "/" not in text and not Path(text).is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}, a LLaVA folder or hub id, or"
                                             " a server's http URL")
        return text

    return who


def _detector(text: str) -> str:
    if text not in ("scene", "maskrcnn") and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of scene, maskrcnn or a .json file")
    return text


def check(arguments: argparse.Namespace, records: list[dict]) -> None:
    """Refuse what could not be done or written in the end. Raises BadInput."""
    parquet = arguments.out.suffix == ".parquet"
    if parquet and arguments.format != "trl":
        raise BadInput(f"{arguments.out}: a Parquet file is written with --format trl")
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise BadInput(f"{arguments.out}: Parquet needs pyarrow (pip install pyarrow)")
    if arguments.format == "trl" and not parquet and any(r["image"].startswith("scene:") for r in records):
        raise BadInput(f"{arguments.out}: scenes have no files to point to; write a .parquet file")
    if arguments.dilation % 2 == 0:
        raise BadInput(f"--dilation {arguments.dilation}: must be odd, so that the square has a middle")
    photographs = not all(record["image"].startswith("scene:") for record in records)
    options = Options(judge=arguments.judge, sentence_model=arguments.sentence_model)
    if arguments.clip is None and photographs and needs_clip(arguments.method, options):
        raise BadInput(f"{arguments.method} of photographs needs --clip DIR: the embedded CLIP knows scenes only")
    if arguments.author != "policy" and (arguments.method not in STARTS_FROM_CHOSEN
                                         or any("chosen" in record for record in records)):
        raise BadInput(f"--author writes chosen answers that are not given, for {', '.join(STARTS_FROM_CHOSEN)}")
    for role in ("judge", "writer", "author"):
        if is_url(getattr(arguments, role)) != bool(getattr(arguments, f"{role}_model")):
            raise BadInput(f"--{role} URL and --{role}-model NAME belong together")


def read_input(arguments: argparse.Namespace) -> tuple[str, list[dict], Path]:
    """(which argument of `make_pairs`, records, folder that their paths start from)"""
    file = arguments.pairs or arguments.images
    if file is None:
        first = FIRST_SEED[arguments.scene_split]
        return "images", scene_records(range(first, first + arguments.scenes)), arguments.out.parent
    hints = {"rejected": "say --images where there are no pairs"}
    data = load_data(file, needs=("rejected",) if arguments.pairs else (), hints=hints)
    if arguments.images and "rejected" in data.records[0]:
        raise BadInput(f"{file}: holds preference pairs: say --pairs")
    return "pairs" if arguments.pairs else "images", data.records, data.root


def start_processes() -> Share:
    """Joins the process group when torchrun started us."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Share()
    if not dist.is_initialized():  # processes meet after hours of work
        dist.init_process_group("gloo", timeout=timedelta(days=30))
    return Share(rank, world, dist.barrier)


def run(arguments: argparse.Namespace) -> dict | None:
    """Read, load, make, write; returns the report, None in processes other than the first.

    Raises BadInput on bad input, files first, and ConnectionError when a server cannot be reached.
    """
    kind, records, root = read_input(arguments)
    check(arguments, records)
    share = start_processes()
    options = {key: value for key, value in vars(arguments).items() if key in Options.__dataclass_fields__}
    options |= {"root": root, "folder": arguments.out.with_name(f"{arguments.out.stem}-images")}
    models, source = load(arguments, records, Options(**options))
    found = make_pairs(arguments.method, *models, **{kind: records}, **options, source=source,
                       out=arguments.out, share=share)
    if found is None:
        return None
    made, report = found
    if not made:
        forget(arguments.out)
        raise BadInput(f"no pair could be made, nothing is written; dropped: {report['dropped']}")
    made = relocate(made, root, arguments.out.parent)
    write(arguments.out, made, arguments.format)
    forget(arguments.out)
    if arguments.gallery:
        page = arguments.out.with_suffix(".html")
        write_gallery(page, made, root=arguments.out.parent, title=arguments.out.name)
    return report


def load(arguments: argparse.Namespace, records: list[dict], options: Options) -> tuple[list, dict]:
    """([model, processor, clip, clip_processor], names of them); None what the method does without."""
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    where = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device or cuda}
    models, source = [None] * 4, {}
    if needs_model(arguments.method, records, options):
        folder = resolve(arguments.model)
        processor = Processor(folder, arguments.template, arguments.aspect)
        check_texts(arguments, records, processor, options)  # before a large model is loaded
        models[:2] = load_llava(folder, **where), processor
        source["model"] = _name(arguments.model)
    if needs_clip(arguments.method, options):
        folder = resolve(arguments.clip or DEFAULT_CLIP)
        models[2:] = load_clip(folder, **where), ClipProcessor(folder)
        source["clip"] = _name(arguments.clip or DEFAULT_CLIP)
    if arguments.sentence_model and arguments.method in ("realign", "bdhs"):
        source["sentence_model"] = _name(arguments.sentence_model)
    return models, source


def check_texts(arguments: argparse.Namespace, records: list[dict], processor: Processor, options: Options) -> None:
    """Name all records whose texts the model would refuse in the middle. Raises BadInput."""
    given = "chosen" in records[0]
    generates = arguments.method == "bdhs" or (arguments.author == "policy" and not given)
    scored = {"chosen": dict(image="image", response="chosen")} if arguments.method in ("realign", "bdhs") else None
    check_records(records, processor, options.root, arguments.pairs or arguments.images or "scenes", sequences=scored,
                  new_tokens=arguments.max_new_tokens if generates else 0, progress="checking texts")


def _name(model: Path) -> str:
    """A folder of this repository by its place in it, so that records do not depend on where that is."""
    if not model.is_dir():  # a hub id
        return str(model)
    folder = model.resolve()
    return str(folder.relative_to(HOME) if folder.is_relative_to(HOME) else folder)


def main() -> None:
    """The command line; exit status 2 on bad input and unreachable servers."""
    arguments, start = read_arguments(), time.monotonic()
    try:
        report = run(arguments)
    except (BadInput, ConnectionError) as error:
        print(f"generate_pairs.py: {error}", file=sys.stderr)
        sys.exit(2)
    if report is not None:
        print(summary(report, time.monotonic() - start))
        print(json.dumps(report))
        print(arguments.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
