"""Make preference pairs.

    python generate_pairs.py                            text pairs of 600 scenes -> runs/pairs-rank.jsonl
    python generate_pairs.py --method realign           with a rejected image from retrieval
    python generate_pairs.py --method adavip            with a rejected image that lacks one object
    python generate_pairs.py --method adavip --data runs/pairs-rank.jsonl
    torchrun --nproc-per-node 2 generate_pairs.py --method bdhs            two processes, the same file
    python generate_pairs.py --method realign --data photos.jsonl --model DIR --clip-model DIR
    python generate_pairs.py --method adavip --data rlaif-v.parquet --detector maskrcnn --lama big-lama.pt
    python generate_pairs.py --data photos.jsonl --judge http://localhost:8000/v1 --judge-model NAME
    python generate_pairs.py --method bdhs --help       the options of one method

Methods (one file each in pairs/, which names the paper and the departures from it)

    --method   chosen           rejected response                            rejected image
    rank       best sample      worst sample                                 none
    realign    given or best    chosen, its visual words filled in again     a similar image, the one
                                while looking at a similar image             that was looked at
    adavip     given or best    given or worst                               without the object whose
                                                                             removal fits `chosen` least
    symmpo     given or best    given or worst                               a similar image, with the
                                                                             response right for it
    bdhs       given or best    chosen, its sentences completed with         none
                                hardly any of the image visible
    povid      given or best    given, or written as by corrupt              with diffusion noise
    mdpo       given or best    given or worst                               a small crop
    corrupt    given or best    chosen, with errors written into it          none
    sentinel   true sentence    hallucinated one, after the same context     none

"Given" is what the input brings along; "best" and "worst" are the ends of --samples responses of the model, as
a judge ranks them. Where only a chosen response is wanted, a stronger model may write it instead (--author).
Where the model has nothing to say (texts are given), it is not loaded.

Input: --data FILE in any of the formats of data/formats.py, or --scenes N of the scene world, of which everything is
known. What the records have decides what is kept: of preference pairs realign, bdhs and corrupt keep `chosen`, the
others both responses; images and questions may bring a chosen response, or none.

Who judges, who writes, who finds objects: the scene world's own record, if nothing else is said. The contents of
photographs are unknown, so they need --judge (rank, symmpo, sentinel, or where no responses are given), --writer
(corrupt, povid) and --detector (adavip, and with --judge chair). A server's key is read from the environment
variable OPENAI_API_KEY.

Long runs. What is done is kept in part files next to the output, and the same command goes on where it was
interrupted; under torchrun the processes share the records. Neither changes the result (pairs/progress.py).
An image that turns out to be damaged ends the run, and it goes on from there with --bad-records skip.

Output: pair records, written in one go at the end; the same arguments give the same file. Images that a
method makes go to NAME-images next to it. Then a summary: pairs made, images dropped and why and, for
scenes, the share of responses that mention an absent object and of rejected images that contradict the chosen
response; the same as one line of JSON. Exit status 2 on bad input, or when a server cannot be reached, with
the reasons; 1 when interrupted.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from common import BadInput, add_options, check_ranges, options_of, refuse, run_script, unwritable
from data import scenes
from data.export import write
from data.formats import load
from data.images import references
from data.records import relocate
from model.training import ranks, start_processes
from pairs.gallery import write_gallery
from pairs.methods import METHODS, make_pairs, scene_records
from pairs.progress import forget, parts
from pairs.report import summary
from pairs.tools import Share, with_tools

FIRST_SEED = {"pairs": scenes.PAIRS, "train": scenes.TRAIN, "dev": scenes.DEV}
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANGES = {  # what numbers may be: interval -> options
    "[1, 1e9]": "scenes batch_size samples max_new_tokens max_sentences top_k nprobe iterations dilation",
    "[0, 1e9]": "visible seed",
    "[0, 10]": "temperature",
    "[2, 1e9]": "rank_pairs.samples",  # a best and a worst one
    "(0, 10]": "rank_pairs.temperature",
    "[0, 999]": "noise_step",
    "[0, 1]": "rho_th max_area tag_threshold box_threshold overlap",
    "[-1, 1]": "tau",
    "[-1, 1.1]": "eps_s",  # a cosine; above 1 accepts everything
    "[0, 2]": "same_image",
}


# ---------------------------------------------------------------------------------------- command line


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> settings. The options of the chosen method are those of its functions and their tools."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=METHODS, default="rank", help="(default: %(default)s)")
    known, _ = first.parse_known_args(argv)
    parser = argparse.ArgumentParser(description=__doc__, parents=[first], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_general_options(parser)
    add_options(parser.add_argument_group(f"options of {known.method}"), *with_tools(*METHODS[known.method].functions))
    args = parser.parse_args(argv)
    suffix = {"plumbline": ".jsonl", "trl": ".parquet"}[args.format]
    args.out = args.out or Path("runs") / f"pairs-{args.method}{suffix}"
    args.cache = args.cache or args.out.parent / "cache"
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    return args


def add_general_options(parser: argparse.ArgumentParser) -> None:
    """Those that every method has."""
    add = parser.add_argument
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--data", type=Path, metavar="FILE",
                       help="images and questions, or preference pairs, in any format of data/formats.py")
    given.add_argument("--images", "--pairs", dest="data", type=Path, help=argparse.SUPPRESS)  # former names
    given.add_argument("--scenes", type=int, default=600, metavar="N", help="how many scenes (default: %(default)s)")
    add("--scene-split", choices=FIRST_SEED, default="pairs",
        help="which scenes; those of the test split are for evaluation only (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="(default: runs/pairs-METHOD.jsonl, for trl .parquet)")
    add("--resume", action="store_true", help="go on with an interrupted run; refused where there is none")
    add("--overwrite", action="store_true", help="begin again although --out or part files of it exist")
    add("--format", choices=("plumbline", "trl"), default="plumbline",
        help="trl: its columns, with the images in a .parquet file (default: %(default)s)")
    add("--gallery", action="store_true", help="also write a page to look at the pairs, with the suffix .html")
    add("--cache", type=Path, metavar="DIR",
        help="embeddings and servers' replies (default: cache, next to --out)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--precision", choices=PRECISION, help="(default: bf16 on CUDA, else fp32)")
    add("--batch-size", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    add("--bad-records", choices=("stop", "skip"), default="stop",
        help="when an image turns out to be damaged: stop, keeping what is done, or leave the record out"
             " (default: %(default)s)")


def check(args: argparse.Namespace) -> None:
    """Refuse, all at once, what could not be done or written in the end. Raises BadInput."""
    check_ranges(vars(args), RANGES, *METHODS[args.method].functions)
    refuse([*split_problems(args), *device_problems(args), *place_problems(args)])


def split_problems(args: argparse.Namespace) -> Iterator[str]:
    """More scenes than there are before those of the next split."""
    if args.data is None and args.scenes > scenes.DEV - scenes.PAIRS:
        yield f"--scenes {args.scenes}: a split has {scenes.DEV - scenes.PAIRS:,}"


def device_problems(args: argparse.Namespace) -> Iterator[str]:
    """A device that torch does not know, or that is not there."""
    try:
        device = torch.device(args.device)
    except RuntimeError:
        yield f"--device {args.device!r} is none of cpu, cuda, cuda:1, ..."
        return
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        yield f"--device {args.device}: torch finds {torch.cuda.device_count()} CUDA devices"


def place_problems(args: argparse.Namespace) -> Iterator[str]:
    """An --out that cannot be written, or must not be replaced."""
    if reason := unwritable(args.out):
        yield f"{args.out}: cannot be written ({reason})"
        return
    if reason := unwritable(args.cache / "file"):
        yield f"--cache {args.cache}: cannot be written ({reason})"
    started = parts(args.out)
    if args.out.suffix == ".parquet" and args.format != "trl":
        yield f"{args.out}: a Parquet file is written with --format trl"
    elif args.out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        yield f"{args.out}: Parquet needs pyarrow (pip install pyarrow)"
    if args.gallery and args.out.suffix == ".html":
        yield f"{args.out}: --gallery writes its page there; the pairs need another --out"
    if args.resume and args.overwrite:
        yield "--resume goes on with an interrupted run, --overwrite begins again: which of them?"
    if args.resume and not started:
        yield f"--resume: there are no part files of {args.out}"
    if args.out.exists() and not (started or args.overwrite):
        yield f"{args.out} exists: choose another --out, or replace it with --overwrite"


def read_input(args: argparse.Namespace) -> tuple[list[dict], Path]:
    """(records, folder that their paths start from)"""
    if args.data:
        data = load(args.data)
        return data.records, data.root
    first = FIRST_SEED[args.scene_split]
    return scene_records(range(first, first + args.scenes)), args.out.parent


def refuse_drawn(args: argparse.Namespace, records: list[dict]) -> None:
    """Raise BadInput where TRL's columns would have to point to images that are drawn."""
    if args.format == "trl" and args.out.suffix != ".parquet" and any(
            reference.startswith("scene:") for record in records for reference in references(record["image"])):
        raise BadInput(f"{args.out}: scenes have no files to point to; write a .parquet file")


# ---------------------------------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> dict | None:
    """Read, make, write; returns the report, None in processes other than the first.

    Raises BadInput on bad input and ConnectionError when a server cannot be reached.
    """
    check(args)
    records, root = read_input(args)
    refuse_drawn(args, records)
    rank, world = ranks()
    start_processes(world)
    share = Share(rank, world, dist.barrier) if world > 1 else Share()
    share.barrier()  # all have looked for part files
    if args.overwrite and share.rank == 0:
        forget(args.out)
    share.barrier()
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun each process has the GPU of its number
    options = {name: getattr(args, name) for name in options_of(*with_tools(*METHODS[args.method].functions))}
    found = make_pairs(
        args.method, records=records, root=root, folder=args.out.with_name(f"{args.out.stem}-images"), out=args.out,
        file=args.data or "scenes", cache=args.cache, batch_size=args.batch_size, bad_records=args.bad_records,
        device=own if args.device == "cuda" else args.device, dtype=PRECISION[args.precision], share=share, **options)
    if found is None:
        return None
    made, report = found
    if not made:
        forget(args.out)
        raise BadInput(f"no pair could be made, nothing is written; dropped: {report['dropped']}")
    made = relocate(made, root, args.out.parent)
    write(args.out, made, args.format)
    forget(args.out)
    if args.gallery:
        write_gallery(args.out.with_suffix(".html"), made, root=args.out.parent, title=args.out.name)
    return report


def main() -> None:
    """From the command line to the file of pairs, and what is printed of it."""
    args, start = read_arguments(), time.monotonic()
    report = run(args)
    if report is not None:
        print(summary(report, time.monotonic() - start))
        print(json.dumps(report))
        print(args.out)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main, "generate_pairs.py", "; go on with --resume")
