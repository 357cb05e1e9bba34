"""Make preference pairs.

    python generate_pairs.py                            text pairs of 600 scenes -> runs/pairs-rank.jsonl
    python generate_pairs.py --method realign           with a rejected image from retrieval
    python generate_pairs.py --method adavip            with a rejected image that lacks one object
    python generate_pairs.py --method adavip --pairs runs/pairs-rank.jsonl
    python generate_pairs.py --method realign --images photos.jsonl --model FOLDER --clip FOLDER

Methods (one file each in pairs/, which names the paper and the departures from it)
    rank      --samples answers to each picture, ranked by an annotator: best = chosen, worst = rejected
    realign   chosen = given, or best of --samples; rejected = the chosen answer, its visual words filled in
              again while looking at a similar picture; that picture = rejected image (for rDPO)
    adavip    text pairs = given, or ranked; rejected image = the picture without the object whose removal
              makes it fit the chosen answer least (for AdaViP)

Input (one of three)
    --scenes N        pictures of the scene world, of which everything is known
    --images FILE     JSONL with `id`, `image`, `prompt` and, for realign, optionally `chosen`
    --pairs FILE      pair records (data/records.py); realign keeps `chosen`, adavip the whole text pair
Nobody knows what photographs show: to rank answers about them, or to remove objects from them, put an
annotator or a `candidates` function in the place of the scene world's (see pairs/rank.py, pairs/adavip.py).

Output: pair records, written in one go at the end; the same arguments give the same file. Then a summary:
pairs made, pictures dropped and why and, for scenes, the share of chosen and of rejected answers that mention
an absent object. On bad input exit status 2, with the reasons.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch

from data import scenes
from data.processor import ClipProcessor, Processor
from data.records import read_images, read_pairs, write_jsonl
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.clip import CLIP
from model.generate import answers
from model.llava import Llava
from pairs.adavip import vision_pairs
from pairs.rank import best_answers, judge_scene, rank_pairs
from pairs.realign import clip_similarity, infill, retrieval_pairs
from retrieval.embed import embed_images
from retrieval.index import neighbours

HOME = Path(__file__).resolve().parent
FIRST_SEED = {"pairs": scenes.PAIRS, "train": scenes.TRAIN, "dev": scenes.DEV}


class Models(NamedTuple):
    model: Llava
    processor: Processor
    clip: CLIP | None
    clip_processor: ClipProcessor | None


@dataclass(frozen=True)
class Options:
    samples: int = 4  # answers to each picture
    temperature: float = 1.0  # of the sampling
    max_new_tokens: int = 96  # of an answer
    seed: int = 0  # of the sampling: the i-th picture uses seed + i
    top_k: int = 5  # realign: neighbours tried, nearest first
    tau: float = 0.95  # realign: similarity that a rejected answer must stay below
    batch_size: int = 64  # pictures at a time
    root: Path | None = None  # folder that relative paths of images start from
    source: dict = field(default_factory=dict)  # goes into the records' `source`: model, ...
    progress: bool = True  # bars with the remaining time, on a terminal


def make_pairs(method: str, model: Llava, processor: Processor, clip: CLIP | None = None,
               clip_processor: ClipProcessor | None = None, *, scene_seeds: Iterable[int] | None = None,
               images: list[dict] | None = None, pairs: list[dict] | None = None,
               **options) -> tuple[list[dict], dict]:
    """Make preference pairs of scenes, of pictures or of text pairs (give exactly one of the three).

    Args:
        method: a key of METHODS.
        clip, clip_processor: "rank" does without.
        scene_seeds: seeds of the scene world.
        images, pairs: records as data/records.py reads them.
        options: fields of `Options`.

    Returns (pair records, report). The report is {method, pictures, pairs, dropped: {reason: count}} and, if
    all pictures are scenes, `hallucinating`: {chosen, rejected}, the share of answers that mention an absent
    object. Raises ValueError on input that the method cannot use, before the first answer is sampled.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, there are {', '.join(METHODS)}")
    if sum(given is not None for given in (scene_seeds, images, pairs)) != 1:
        raise ValueError("give exactly one of scene_seeds, images and pairs")
    if scene_seeds is not None:
        images = [{"id": f"scene-{seed}", "image": scenes.reference(seed), "prompt": scenes.CAPTION_PROMPT}
                  for seed in scene_seeds]
    records = images if pairs is None else pairs
    if not records:
        raise ValueError("there are no pictures to make pairs of")
    models = Models(model, processor, clip, clip_processor)
    made, dropped = METHODS[method](records, models, Options(**options))
    report = {"method": method, "pictures": len(records), "pairs": len(made), "dropped": dict(dropped)}
    if made and all(pair["image"].startswith("scene:") for pair in made):
        report["hallucinating"] = {key: _hallucinating(made, key) for key in ("chosen", "rejected")}
    return made, report


def _rank(records: list[dict], models: Models, options: Options) -> tuple[list[dict], Counter]:
    if _have("rejected", records):
        raise ValueError("rank makes the text pairs itself: give pictures, not pairs")
    return rank_pairs(records, _sample(records, models, options), source=_origin(options))


def _realign(records: list[dict], models: Models, options: Options) -> tuple[list[dict], Counter]:
    if not _have("chosen", records):
        best = best_answers(records, _sample(records, models, options))
        records = [{**record, "chosen": answer} for record, answer in zip(records, best)]
    pictures = [record["image"] for record in records]
    vectors = embed_images(pictures, models.clip, models.clip_processor, batch_size=options.batch_size,
                           root=options.root, progress="embedding pictures" * options.progress)
    return retrieval_pairs(
        records, neighbours(pictures, vectors, options.top_k),
        infill(models.model, models.processor, batch_size=options.batch_size, root=options.root),
        clip_similarity(models.clip, models.clip_processor), tau=options.tau, source=_origin(options),
        progress="filling in, neighbour" * options.progress)


def _adavip(records: list[dict], models: Models, options: Options) -> tuple[list[dict], Counter]:
    pairs, dropped = (records, Counter()) if _have("rejected", records) else _rank(records, models, options)
    made, more = vision_pairs(pairs, models.clip, models.clip_processor, batch_size=options.batch_size,
                              root=options.root, source=options.source,
                              progress="scoring removals" * options.progress)
    return made, dropped + more


METHODS = {"rank": _rank, "realign": _realign, "adavip": _adavip}


def _have(key: str, records: list[dict]) -> bool:
    """Whether all records bring this text along; that some do and some do not is an error."""
    lacking = [record["id"] for record in records if key not in record]
    if 0 < len(lacking) < len(records):
        raise ValueError(f"{key!r} is missing in {len(lacking)} of {len(records)} records (first: "
                         f"{lacking[0]!r}); all must have it, or none")
    return not lacking


def _sample(records: list[dict], models: Models, options: Options) -> list[list[str]]:
    for record in records:
        judge_scene(record, [])  # raises now, not after hours, when it does not know a picture
    return answers(
        models.model, models.processor, [record["image"] for record in records],
        [record["prompt"] for record in records], n=options.samples, batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
        root=options.root, progress="sampling answers" * options.progress)


def _origin(options: Options) -> dict:
    return {**options.source, "seed": options.seed, "temperature": options.temperature}


def _hallucinating(pairs: list[dict], key: str) -> float:
    return sum(judge_scene(pair, [pair[key]])[0].wrong > 0 for pair in pairs) / len(pairs)


def relocate(records: list[dict], root: Path, folder: Path) -> list[dict]:
    """Rewrite relative image paths, which start at `root`, so that they start at `folder`."""

    def move(reference: str | None) -> str | None:
        if not reference or reference.startswith("scene:") or os.path.isabs(reference):
            return reference
        return os.path.relpath(root / reference, folder)

    return [{**record, "image": move(record["image"]), "rejected_image": move(record["rejected_image"])}
            for record in records]


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=METHODS, default="rank", help="(default: %(default)s)")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--scenes", type=_count, default=600, metavar="N", help="how many scenes (default: 600)")
    one.add_argument("--images", type=Path, metavar="FILE", help="JSONL with id, image, prompt[, chosen]")
    one.add_argument("--pairs", type=Path, metavar="FILE", help="pair records that get a rejected image")
    add("--scene-split", choices=FIRST_SEED, default="pairs",
        help="which scenes; those of the test split are for evaluation only (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="pair records (default: runs/pairs-METHOD.jsonl)")
    add("--model", type=Path, default=DEFAULT_MODEL, metavar="FOLDER", help="llava-hf (default: model/tiny)")
    add("--clip", type=Path, default=DEFAULT_CLIP, metavar="FOLDER", help="(default: model/tiny/clip)")
    add("--samples", type=_count, metavar="N", help="answers to each picture (default: %(default)s)")
    add("--temperature", type=_between(0, 10), metavar="T", help="of the sampling (default: %(default)s)")
    add("--max-new-tokens", type=_count, metavar="N", help="of an answer (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="of the sampling (default: %(default)s)")
    add("--top-k", type=_count, metavar="K", help="realign: neighbours tried (default: %(default)s)")
    add("--tau", type=_between(-1, 1), metavar="X",
        help="realign: similarity that a rejected answer must stay below (default: %(default)s)")
    add("--batch-size", type=_count, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="(default: %(default)s)")
    parser.set_defaults(**{option.name: option.default for option in fields(Options)
                           if option.name not in ("root", "source", "progress")})
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs") / f"pairs-{arguments.method}.jsonl"
    return arguments


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _between(low: float, high: float):
    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return float(text)

    return number


def run(arguments: argparse.Namespace) -> dict:
    """Read, load, make, write; returns the report. Raises ValueError on bad input, files first."""
    root = None
    if arguments.pairs:
        given, root = {"pairs": read_pairs(arguments.pairs)}, arguments.pairs.parent
    elif arguments.images:
        given, root = {"images": read_images(arguments.images)}, arguments.images.parent
    else:
        first = FIRST_SEED[arguments.scene_split]
        given = {"scene_seeds": range(first, first + arguments.scenes)}
    where = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    models = [load_llava(arguments.model, **where), Processor(arguments.model)]
    source = {"model": _name(arguments.model)}
    if arguments.method != "rank":
        models += [load_clip(arguments.clip, **where), ClipProcessor(arguments.clip)]
        source["clip"] = _name(arguments.clip)
    options = {key: value for key, value in vars(arguments).items() if key in Options.__dataclass_fields__}
    records, report = make_pairs(arguments.method, *models, **given, **options, root=root, source=source)
    if not records:
        raise ValueError(f"no pair could be made, nothing is written; dropped: {report['dropped']}")
    write_jsonl(arguments.out, relocate(records, root, arguments.out.parent) if root else records)
    return report


def _name(folder: Path) -> str:
    """A folder of this repository by its place in it, so that records do not depend on where that is."""
    folder = folder.resolve()
    return str(folder.relative_to(HOME) if folder.is_relative_to(HOME) else folder)


def summary(report: dict, seconds: float) -> str:
    """What the report says, for people."""
    lines = [f"{report['pairs']} pairs of {report['pictures']} pictures in {seconds:.0f} s"]
    lines += [f"  {count:5d} dropped: {reason}" for reason, count in sorted(report["dropped"].items())]
    lines += [f"  {100 * share:5.1f} % of the {key} answers mention an absent object"
              for key, share in report.get("hallucinating", {}).items()]
    return "\n".join(lines)


def main() -> None:
    arguments, start = read_arguments(), time.monotonic()
    try:
        report = run(arguments)
    except ValueError as error:
        print(f"generate_pairs.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(summary(report, time.monotonic() - start))
    print(arguments.out)


if __name__ == "__main__":
    main()
