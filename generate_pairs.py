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
a judge ranks them. Where the model has nothing to say (texts are given), it is not loaded.

Input (one of three), in any of the formats of data/formats.py
    --scenes N        pictures of the scene world, of which everything is known
    --images FILE     pictures and questions, with or without an answer to be chosen
    --pairs FILE      preference pairs; realign, bdhs and corrupt keep `chosen`, the others both answers

Who judges, who writes, who finds objects: the scene world's own record, if nothing else is said. Nobody knows
what photographs show, so they need --judge (rank, or where no answers are given), --writer (corrupt, povid)
and --detector (adavip). A server's key is read from the environment variable OPENAI_API_KEY.

Long runs. What is done stands in part files beside the output, and the same command goes on where it was
interrupted; under torchrun the processes share the records. Neither changes the result (pairs/progress.py).

Output: pair records, written in one go at the end; the same arguments give the same file. Pictures that a
method makes lie beside it, in NAME-images. Then a summary: pairs made, pictures dropped and why and, for
scenes, the share of answers that mention an absent object and of rejected images that contradict the chosen
answer; the same as one line of JSON. On bad input, or when a server cannot be reached, exit status 2, with
the reasons.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from data import inpaint, scenes
from data.corrupt import STEPS, add_noise
from data.detect import coco_instances, mask_rcnn
from data.formats import read, write
from data.processor import ClipProcessor, Processor
from data.templates import TEMPLATES
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.clip import CLIP
from model.generate import answers
from model.hub import resolve
from model.lama import lama_fill, load_lama
from model.llava import Llava
from model.sentence import SentenceEncoder
from pairs.adavip import Candidates, photo_candidates, scene_candidates, vision_pairs
from pairs.ask import Model, Server, local_model, server_model
from pairs.bdhs import bdhs_pairs, completion
from pairs.corrupt import Corrupt, corrupt_pairs, model_corrupt, scene_corrupt
from pairs.gallery import write_gallery
from pairs.judge import model_judge
from pairs.mdpo import crop_pairs
from pairs.povid import noise_pairs
from pairs.progress import forget, in_chunks
from pairs.rank import Judge, best_answers, clip_judge, judge_scene, one_by_one, rank_pairs
from pairs.realign import Similarity, clip_similarity, infill, retrieval_pairs
from retrieval.cache import cached_images
from retrieval.embed import embed_images
from retrieval.index import approximate_neighbours, neighbours

HOME = Path(__file__).resolve().parent
FIRST_SEED = {"pairs": scenes.PAIRS, "train": scenes.TRAIN, "dev": scenes.DEV}
SHARD = 1024  # pictures that a process embeds at a time, when several do


class Share(NamedTuple):
    """This process among those that make the pairs together."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None  # waits until all processes have called it


class Models(NamedTuple):
    """What is loaded; None what the method does without."""

    model: Llava | None
    processor: Processor | None
    clip: CLIP | None = None
    clip_processor: ClipProcessor | None = None
    share: Share = Share()


@dataclass(frozen=True)
class Options:
    """Plain data: what the pairs depend on, and (the last five) what they do not."""

    samples: int = 4  # answers to each picture
    temperature: float = 1.0  # of the sampling
    max_new_tokens: int = 96  # of an answer
    seed: int = 0  # of all that is drawn; the i-th picture's samples use seed + i
    judge: str = "scene"  # who ranks the samples: scene, clip, policy or a server's URL
    judge_model: str | None = None  # name of the model at that server
    writer: str = "scene"  # corrupt, povid: who writes errors: scene, policy or a server's URL
    writer_model: str | None = None
    sentence_model: Path | None = None  # realign, bdhs: compares answers; None: CLIP does
    top_k: int = 5  # realign: neighbours tried, nearest first
    tau: float = 0.95  # realign: similarity that a rejected answer must stay below
    nprobe: int | None = None  # realign: cells of an approximate index that are searched; None: exact search
    rho_th: float = 0.99  # bdhs: share of the image tokens that is hidden
    iterations: int = 5  # bdhs: attempts, the last of them free
    eps_s: float = 0.97  # bdhs: similarity that a rejected answer must stay below
    noise: bool = False  # bdhs: a noisy picture instead of hidden tokens
    noise_step: int = 500  # povid, bdhs with noise: diffusion step, 0 to 999
    overflow: str = "clamp"  # of the noise: clamp or wrap
    detector: str = "scene"  # adavip: scene, maskrcnn or an instances file of COCO
    detector_weights: Path | None = None  # maskrcnn's; None: torchvision downloads them
    lama: Path | None = None  # adavip: weights of the inpainter; None: harmonic fill (data/inpaint.py)
    dilation: int = 15  # adavip: pixels by which masks grow
    max_area: float = 0.8  # adavip: objects that take a larger share of the picture are left in it
    source: dict = field(default_factory=dict)  # goes into the records' `source`: model, ...
    batch_size: int = 64  # pictures at a time
    root: Path | None = None  # folder that relative paths of images start from, also of those that are made
    folder: Path | None = None  # where mdpo, povid and adavip (of photographs) put the pictures they make
    cache: Path | None = None  # folder of embeddings and servers' replies
    progress: bool = True  # bars with the remaining time, on a terminal


HARMLESS = ("batch_size", "root", "folder", "cache", "progress")  # of the options

# rows of the records, whether to show bars -> (records made, how many were dropped for which reason)
Work = Callable[..., tuple[list[dict], Counter]]


class Plan(NamedTuple):
    """A method, ready to work on some rows at a time, and what it has to add to the report."""

    work: Work
    notes: dict = {}


def make_pairs(method: str, model: Llava | None, processor: Processor | None, clip: CLIP | None = None,
               clip_processor: ClipProcessor | None = None, *, scene_seeds: Iterable[int] | None = None,
               images: list[dict] | None = None, pairs: list[dict] | None = None, out: Path | None = None,
               share: Share = Share(), **options) -> tuple[list[dict], dict] | None:
    """Make preference pairs of scenes, of pictures or of text pairs (give exactly one of the three).

    Args:
        method: a key of METHODS.
        model, processor: None where `needs_model` says so.
        clip, clip_processor: None where `needs_clip` says so.
        scene_seeds: seeds of the scene world.
        images, pairs: records as data/formats.py reads them.
        out: the file that the caller will write; part files beside it let a run go on where it was
            interrupted (pairs/progress.py; `forget` deletes them). None: all in one go, nothing is kept.
        share: with `out`, the processes that share the records.
        options: fields of `Options`.

    Returns (pair records, report); None in processes other than the first. The report is {method, pictures,
    pairs, dropped: {reason: count}} and, if all pictures are scenes, `hallucinating`: {chosen, rejected}, the
    share of answers that mention an absent object, and `rejected_image` (see `_rejected_images`). Raises
    ValueError on input that the method cannot use, before the first answer is sampled, and ConnectionError when
    a server cannot be reached.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, there are {', '.join(METHODS)}")
    if sum(given is not None for given in (scene_seeds, images, pairs)) != 1:
        raise ValueError("give exactly one of scene_seeds, images and pairs")
    records = pairs if pairs is not None else images if images is not None else scene_records(scene_seeds)
    if not records:
        raise ValueError("there are no pictures to make pairs of")
    models, options = Models(model, processor, clip, clip_processor, share), Options(**options)
    plan = METHODS[method](records, models, options)
    if out is None:
        made, dropped = plan.work(list(range(len(records))), options.progress)
    else:
        found = in_chunks([record["id"] for record in records], plan.work, out,
                          settings(method, records, models, options), chunk=options.batch_size,
                          rank=share.rank, world=share.world, barrier=share.barrier,
                          progress="pictures" * options.progress)
        if found is None:
            return None
        made, dropped = found
    return made, {**report_on(method, records, made, dropped), **plan.notes}


def scene_records(seeds: Iterable[int]) -> list[dict]:
    """Scenes and the request to describe them."""
    return [{"id": f"scene-{seed}", "image": scenes.reference(seed), "prompt": scenes.CAPTION_PROMPT}
            for seed in seeds]


def settings(method: str, records: list[dict], models: Models, options: Options) -> dict:
    """All that the pairs depend on, as JSON: a run with others must not go on with this one's part files."""
    given = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
              if name not in HARMLESS}
    if models.model:
        chosen["template"], chosen["aspect"] = list(models.processor.template), models.processor.aspect
        chosen["dtype"] = str(next(models.model.parameters()).dtype)
    return {"method": method, "given": given, **chosen}


# ---------------------------------------------------------------------------------------- methods


def _rank(records: list[dict], models: Models, options: Options) -> Plan:
    if _have("rejected", records):
        raise ValueError("rank makes the text pairs itself: give pictures, not pairs")
    return Plan(_text_pairs(records, models, options))


def _realign(records: list[dict], models: Models, options: Options) -> Plan:
    answered = _answered(records, models, options)
    near, notes = _retrieve([record["image"] for record in records], models, options)
    complete = infill(models.model, models.processor, batch_size=options.batch_size, root=options.root)
    similarity = _similarity(models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some, dropped = answered(rows, bars)
        made, more = retrieval_pairs(some, [near[record["image"]] for record in some], complete, similarity,
                                     tau=options.tau, source=_origin(options),
                                     progress="filling in, neighbour" * bars)
        return made, dropped + more

    return Plan(work, notes)


def _adavip(records: list[dict], models: Models, options: Options) -> Plan:
    texts, candidates = _text_pairs(records, models, options), _candidates(records, models, options)
    source = dict(options.source)
    if options.detector != "scene":
        source |= {"detector": options.detector, "fill": options.lama.name if options.lama else "harmonic"}

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        pairs, dropped = texts(rows, bars)
        made, more = vision_pairs(pairs, models.clip, models.clip_processor, candidates=candidates,
                                  batch_size=options.batch_size, root=options.root, source=source,
                                  progress="scoring removals" * bars)
        return made, dropped + more

    return Plan(work)


def _bdhs(records: list[dict], models: Models, options: Options) -> Plan:
    answered, similarity = _answered(records, models, options), _similarity(models, options)

    def noisy(image, seed: int):
        return add_noise(image, options.noise_step, seed, options.overflow)

    complete = completion(models.model, models.processor, noise=noisy if options.noise else None,
                          max_new_tokens=options.max_new_tokens, temperature=options.temperature,
                          batch_size=options.batch_size, root=options.root)
    rho_th = 0.0 if options.noise else options.rho_th
    noise = {"noise_step": options.noise_step, "overflow": options.overflow} if options.noise else {}

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some, dropped = answered(rows, bars)
        made, more = bdhs_pairs(some, complete, similarity, rho_th=rho_th, iterations=options.iterations,
                                eps_s=options.eps_s, seed=options.seed, source=_origin(options) | noise,
                                progress="completing, attempt" * bars)
        return made, dropped + more

    return Plan(work)


def _povid(records: list[dict], models: Models, options: Options) -> Plan:
    folder = _folder(options)
    texts = _as_given(records) if _have("rejected", records) else _corrupt(records, models, options).work

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        pairs, dropped = texts(rows, bars)
        made = noise_pairs(pairs, folder, step=options.noise_step, overflow=options.overflow,
                           seed=options.seed, root=options.root, source=options.source,
                           progress="adding noise" * bars)
        return made, dropped

    return Plan(work)


def _mdpo(records: list[dict], models: Models, options: Options) -> Plan:
    texts, folder = _text_pairs(records, models, options), _folder(options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        pairs, dropped = texts(rows, bars)
        made = crop_pairs(pairs, folder, seed=options.seed, root=options.root, source=options.source,
                          progress="cropping" * bars)
        return made, dropped

    return Plan(work)


def _corrupt(records: list[dict], models: Models, options: Options) -> Plan:
    answered, (name, corrupt) = _answered(records, models, options), _writer(records, models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some, dropped = answered(rows, bars)
        made, more = corrupt_pairs(some, corrupt, {**_origin(options), "writer": name})
        return made, dropped + more

    return Plan(work)


METHODS = {"rank": _rank, "realign": _realign, "adavip": _adavip, "bdhs": _bdhs, "povid": _povid,
           "mdpo": _mdpo, "corrupt": _corrupt}
TAKES_TEXTS = ("adavip", "povid", "mdpo")  # methods that leave a given text pair as it is


def needs_model(method: str, records: list[dict], options: Options) -> bool:
    """Whether the model has to say something: not where the texts are given or others write them."""
    if method in TAKES_TEXTS and _have("rejected", records):
        return False
    return method not in ("corrupt", "povid") or options.writer == "policy" or not _have("chosen", records)


def needs_clip(method: str, options: Options) -> bool:
    """Whether pictures or texts have to be embedded."""
    similar = method == "bdhs" and options.sentence_model is None
    return method in ("realign", "adavip") or similar or options.judge == "clip"


# ---------------------------------------------------------------------------------------- their parts


def _have(key: str, records: list[dict]) -> bool:
    """Whether all records bring this text along; that some do and some do not is an error."""
    lacking = [record["id"] for record in records if key not in record]
    if 0 < len(lacking) < len(records):
        raise ValueError(f"{key!r} is missing in {len(lacking)} of {len(records)} records (first: "
                         f"{lacking[0]!r}); all must have it, or none")
    return not lacking


def _as_given(records: list[dict]) -> Work:
    return lambda rows, bars=False: ([records[row] for row in rows], Counter())


def _text_pairs(records: list[dict], models: Models, options: Options) -> Work:
    """The given pairs, or the best against the worst sample."""
    if _have("rejected", records):
        return _as_given(records)
    judge = _judge(records, models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some = [records[row] for row in rows]
        samples = _sample(some, rows, models, options, bars)
        return rank_pairs(some, samples, source=_origin(options), judge=judge)

    return work


def _answered(records: list[dict], models: Models, options: Options) -> Work:
    """Records with a chosen answer: the given one, or the best sample."""
    if _have("chosen", records):
        return _as_given(records)
    judge = _judge(records, models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some = [records[row] for row in rows]
        best = best_answers(some, _sample(some, rows, models, options, bars), judge=judge)
        kept = [{**record, "chosen": answer} for record, answer in zip(some, best) if answer]
        return kept, +Counter({"no finished answer, or no verdict": len(some) - len(kept)})

    return work


def _sample(records: list[dict], rows: list[int], models: Models, options: Options,
            bars: bool) -> list[list[str]]:
    return answers(
        models.model, models.processor, [record["image"] for record in records],
        [record["prompt"] for record in records], n=options.samples, batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        seeds=[options.seed + row for row in rows], finished=True, root=options.root,
        progress="sampling answers" * bars)


def _judge(records: list[dict], models: Models, options: Options) -> Judge:
    if options.judge == "scene":
        for record in records:
            judge_scene(record, [])  # raises now, not after hours, when it does not know a picture
        return one_by_one(judge_scene)
    if options.judge == "clip":
        return clip_judge(models.clip, models.clip_processor, batch_size=options.batch_size,
                          root=options.root)
    model = _asked("judge", options.judge, options.judge_model, models, options)
    return model_judge(model, seed=options.seed)


def _writer(records: list[dict], models: Models, options: Options) -> tuple[str, Corrupt]:
    """(name, what writes errors into answers)"""
    if options.writer == "scene":
        corrupt = scene_corrupt(options.seed)
        corrupt([record for record in records if not record["image"].startswith("scene:")])  # raises now
        return "rules", corrupt
    model = _asked("writer", options.writer, options.writer_model, models, options)
    return model.name, model_corrupt(model)


def _asked(role: str, who: str, name: str | None, models: Models, options: Options) -> Model:
    """The model that is trained itself, or one behind a server."""
    if who == "policy":
        return local_model(models.model, models.processor, str(options.source.get("model", "policy")),
                           batch_size=options.batch_size, root=options.root)
    if not is_url(who):
        raise ValueError(f"{role} {who!r} is neither a name that is known nor a server's http URL")
    if not name:
        raise ValueError(f"the {role} {who} needs the name of its model (--{role}-model)")
    if options.cache is None:
        raise ValueError(f"the {role} {who} needs a folder that keeps its replies (--cache)")
    return server_model(Server(who, name), cache=options.cache / "replies", root=options.root)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _similarity(models: Models, options: Options) -> Similarity:
    """What compares two answers."""
    if options.sentence_model:
        return SentenceEncoder(options.sentence_model, device=models.model.device).similarity
    return clip_similarity(models.clip, models.clip_processor)


def _retrieve(pictures: list[str], models: Models, options: Options) -> tuple[dict[str, list], dict]:
    """Nearest other pictures of each picture, and the recall of an approximate search."""
    vectors = _embed(pictures, models, options)
    if options.nprobe is None:
        return dict(zip(pictures, neighbours(pictures, vectors, options.top_k))), {}
    found, recall = approximate_neighbours(pictures, vectors, options.top_k, options.nprobe)
    return dict(zip(pictures, found)), {"recall": round(recall, 4)}


def _embed(pictures: list[str], models: Models, options: Options) -> np.ndarray:
    """Vectors of pictures (N, E); with a cache each process computes a share of them."""
    show = {"batch_size": options.batch_size, "root": options.root,
            "progress": "embedding pictures" * (options.progress and models.share.rank == 0)}
    if options.cache is None:
        return embed_images(pictures, models.clip, models.clip_processor, **show)
    folder, (rank, world, barrier) = options.cache / "embeddings", models.share
    distinct = list(dict.fromkeys(pictures))
    for start in range(SHARD * rank, len(distinct) if world > 1 else 0, SHARD * world):
        part = distinct[start : start + SHARD]  # in batches as one process would make them
        cached_images(part, models.clip, models.clip_processor, folder, shard=SHARD, **show)
    barrier()
    return cached_images(pictures, models.clip, models.clip_processor, folder, shard=SHARD, **show)


def _candidates(records: list[dict], models: Models, options: Options) -> Candidates:
    """Pictures without one of their objects."""
    if options.detector == "scene":
        for record in records:
            scene_candidates(record)  # raises now when it does not know a picture
        return scene_candidates
    folder, device = _folder(options), models.clip.visual_projection.weight.device
    if options.detector == "maskrcnn":
        try:
            detect = mask_rcnn(options.detector_weights, device=device)
        except OSError as error:
            raise ValueError(f"the weights of Mask R-CNN cannot be downloaded ({error}); "
                             "--detector-weights FILE names a file") from None
    else:
        detect = coco_instances(options.detector)
    fill = lama_fill(load_lama(options.lama, device)) if options.lama else inpaint.fill
    return photo_candidates(detect, folder, fill=fill, dilation=options.dilation, max_area=options.max_area,
                            root=options.root)


def _folder(options: Options) -> Path:
    if options.folder is None:
        raise ValueError("this method makes pictures: give the folder they go to")
    return options.folder


def _origin(options: Options) -> dict:
    judge = {} if options.judge == "scene" else {"judge": options.judge_model or options.judge}
    return {**options.source, "seed": options.seed, "temperature": options.temperature, **judge}


# ---------------------------------------------------------------------------------------- report


def report_on(method: str, records: list[dict], made: list[dict], dropped: Counter) -> dict:
    """What `make_pairs` says about its pairs."""
    report = {"method": method, "pictures": len(records), "pairs": len(made), "dropped": dict(dropped)}
    if made and all(pair["image"].startswith("scene:") for pair in made):
        report["hallucinating"] = {key: _hallucinating(made, key) for key in ("chosen", "rejected")}
        if drawn := [pair for pair in made if (pair["rejected_image"] or "").startswith("scene:")]:
            report["rejected_image"] = _rejected_images(drawn)
    return report


def _hallucinating(pairs: list[dict], key: str) -> float:
    return sum(judge_scene(pair, [pair[key]])[0].wrong > 0 for pair in pairs) / len(pairs)


def _rejected_images(pairs: list[dict]) -> dict:
    """Shares of rejected scenes: `contradicts`, where `chosen` mentions more absent objects than in the scene
    it describes, and `gone`, where the object that was to be removed is."""
    wrong = [[judge_scene({**pair, "image": pair[key]}, [pair["chosen"]])[0].wrong
              for key in ("image", "rejected_image")] for pair in pairs]
    shares = {"contradicts": sum(other > own for own, other in wrong) / len(pairs)}
    removed = [(pair["rejected_image"], candidate["removed"]) for pair in pairs
               for candidate in pair["source"].get("candidates", ())
               if candidate["image"] == pair["rejected_image"]]
    if removed:
        gone = [label not in scenes.objects_present(*scenes.parse_reference(image))
                for image, label in removed]
        shares["gone"] = sum(gone) / len(gone)
    return shares


def summary(report: dict, seconds: float) -> str:
    """What the report says, for people."""
    lines = [f"{report['pairs']} pairs of {report['pictures']} pictures in {seconds:.0f} s"]
    lines += [f"  {count:5d} dropped: {reason}" for reason, count in sorted(report["dropped"].items())]
    lines += [f"  {100 * share:5.1f} % of the {key} answers mention an absent object"
              for key, share in report.get("hallucinating", {}).items()]
    says = {"contradicts": "of the rejected images lack an object that the chosen answer mentions",
            "gone": "of the removed objects are gone"}
    lines += [f"  {100 * share:5.1f} % {says[key]}"
              for key, share in report.get("rejected_image", {}).items()]
    if "recall" in report:
        lines.append(f"  {100 * report['recall']:5.1f} % of the nearest pictures are found (recall)")
    return "\n".join(lines)


def relocate(records: list[dict], root: Path, folder: Path) -> list[dict]:
    """Rewrite relative image paths, which start at `root`, so that they start at `folder`."""

    def move(row: dict) -> dict:
        moved = {key: os.path.relpath(root / row[key], folder) for key in ("image", "rejected_image")
                 if row.get(key) and not row[key].startswith("scene:") and not os.path.isabs(row[key])}
        return {**row, **moved}

    made = []
    for record in map(move, records):
        if listed := (record.get("source") or {}).get("candidates"):
            record["source"] = {**record["source"], "candidates": [move(candidate) for candidate in listed]}
        made.append(record)
    return made


# ---------------------------------------------------------------------------------------- command line


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
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
    add("--clip", type=Path, default=DEFAULT_CLIP, metavar="DIR",
        help="CLIP folder or hub id (default: model/tiny/clip)")
    add("--sentence-model", type=Path, metavar="DIR",
        help="realign, bdhs: folder or hub id of a sentence encoder that compares answers (default: CLIP)")
    add("--judge", type=_who("scene", "clip", "policy"), metavar="WHO",
        help="ranks the samples: scene, clip, policy or a server's URL (default: %(default)s)")
    add("--judge-model", metavar="NAME", help="the model at that server")
    add("--writer", type=_who("scene", "policy"), metavar="WHO",
        help="corrupt, povid: writes errors: scene, policy or a server's URL (default: %(default)s)")
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
        if text not in names and not is_url(text):
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)} or a server's http URL")
        return text

    return who


def _detector(text: str) -> str:
    if text not in ("scene", "maskrcnn") and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of scene, maskrcnn or a .json file")
    return text


def check(arguments: argparse.Namespace, records: list[dict]) -> None:
    """Refuse what could not be done or written in the end. Raises ValueError."""
    parquet = arguments.out.suffix == ".parquet"
    if parquet and arguments.format != "trl":
        raise ValueError(f"{arguments.out}: a Parquet file is written with --format trl")
    if parquet and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{arguments.out}: Parquet needs pyarrow (pip install pyarrow)")
    if arguments.format == "trl" and not parquet and any(r["image"].startswith("scene:") for r in records):
        raise ValueError(f"{arguments.out}: scenes have no files to point to; write a .parquet file")
    if arguments.dilation % 2 == 0:
        raise ValueError(f"--dilation {arguments.dilation}: must be odd, so that the square has a middle")
    for role in ("judge", "writer"):
        if is_url(getattr(arguments, role)) != bool(getattr(arguments, f"{role}_model")):
            raise ValueError(f"--{role} URL and --{role}-model NAME belong together")


def read_input(arguments: argparse.Namespace) -> tuple[str, list[dict], Path]:
    """(which argument of `make_pairs`, records, folder that their paths start from)"""
    file = arguments.pairs or arguments.images
    if file is None:
        first = FIRST_SEED[arguments.scene_split]
        return "images", scene_records(range(first, first + arguments.scenes)), arguments.out.parent
    records = read(file, needs=("rejected",) if arguments.pairs else ())
    if arguments.images and "rejected" in records[0]:
        raise ValueError(f"{file}: holds preference pairs: say --pairs")
    return "pairs" if arguments.pairs else "images", records, file if file.is_dir() else file.parent


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

    Raises ValueError on bad input, files first, and ConnectionError when a server cannot be reached.
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
        raise ValueError(f"no pair could be made, nothing is written; dropped: {report['dropped']}")
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
        models[:2] = load_llava(folder, **where), Processor(folder, arguments.template, arguments.aspect)
        source["model"] = _name(arguments.model)
    if needs_clip(arguments.method, options):
        folder = resolve(arguments.clip)
        models[2:] = load_clip(folder, **where), ClipProcessor(folder)
        source["clip"] = _name(arguments.clip)
    if arguments.sentence_model and arguments.method in ("realign", "bdhs"):
        source["sentence_model"] = _name(arguments.sentence_model)
    return models, source


def _name(model: Path) -> str:
    """A folder of this repository by its place in it, so that records do not depend on where that is."""
    if not model.is_dir():  # a hub id
        return str(model)
    folder = model.resolve()
    return str(folder.relative_to(HOME) if folder.is_relative_to(HOME) else folder)


def main() -> None:
    arguments, start = read_arguments(), time.monotonic()
    try:
        report = run(arguments)
    except (ValueError, ConnectionError) as error:
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
