"""The methods of generate_pairs.py put together: what each needs, who judges, writes, retrieves and removes.

    records -> answers of the model -> ranked or given texts -> the method's own file -> pairs

`make_pairs` is the one way in, for generate_pairs.py and train.py alike. A method is set up once, which
refuses what it cannot use, and then works on some rows at a time (`Plan`), so that pairs/progress.py can stop,
resume and share the work. Each record's random numbers come from the seed and its row.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import BadInput
from data import inpaint, scenes
from data.batch import BadRecord, check_image
from data.corrupt import add_noise
from data.detect import coco_instances, mask_rcnn
from data.lama import lama_fill, load_lama
from data.processor import ClipProcessor, Processor
from judges.ask import Model, Request, Server, local_model, server_model
from judges.clip import Similarity, clip_judge, clip_similarity
from judges.compare import model_judge
from judges.scene import judge_scene
from judges.scores import Judge, one_by_one
from judges.sentence import SentenceEncoder
from model.checkpoint import load_llava
from model.clip import CLIP
from model.generate import answers
from model.llava import Llava
from pairs.adavip import Candidates, photo_candidates, scene_candidates, vision_pairs
from pairs.bdhs import bdhs_pairs, completion
from pairs.corrupt import Corrupt, corrupt_pairs, model_corrupt, scene_corrupt
from pairs.mdpo import crop_pairs
from pairs.povid import noise_pairs
from pairs.progress import in_chunks
from pairs.rank import best_answers, rank_pairs
from pairs.realign import infill, retrieval_pairs
from pairs.report import report_on
from retrieval.cache import cached_images
from retrieval.embed import embed_images
from retrieval.index import Duplicates, approximate_neighbours, neighbours

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
    """Plain data: what the pairs depend on, and (the last six) what they do not."""

    samples: int = 4  # answers to each picture
    temperature: float = 1.0  # of the sampling
    max_new_tokens: int = 96  # of an answer
    seed: int = 0  # of all that is drawn; the i-th picture's samples use seed + i
    judge: str = "scene"  # who ranks the samples: scene, clip, policy, another LLaVA's folder, a server's URL
    judge_model: str | None = None  # name of the model at that server
    author: str = "policy"  # realign, bdhs, povid, corrupt: who writes answers that are not given: the best of the
    author_model: str | None = None  # policy's samples, or a stronger model: a folder or a server's URL
    writer: str = "scene"  # corrupt, povid: who writes errors: scene, policy, a folder or a server's URL
    writer_model: str | None = None
    sentence_model: Path | None = None  # realign, bdhs: compares answers; None: CLIP does
    top_k: int = 5  # realign: neighbours tried, nearest first
    tau: float = 0.95  # realign: similarity that a rejected answer must stay below
    same_image: float = 0.995  # realign: pictures whose thumbnails have this cosine are the same, and passed over
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
    any_object: bool = False  # adavip: remove objects, too, that the chosen answer does not mention
    max_area: float = 0.8  # adavip: objects that take a larger share of the picture are left in it
    source: dict = field(default_factory=dict)  # goes into the records' `source`: model, ...
    batch_size: int = 64  # pictures at a time
    root: Path | None = None  # folder that relative paths of images start from, also of those that are made
    folder: Path | None = None  # where mdpo, povid and adavip (of photographs) put the pictures they make
    cache: Path | None = None  # folder of embeddings and servers' replies
    progress: bool = True  # bars with the remaining time, on a terminal
    bad_records: str = "stop"  # at a picture that cannot be decoded: stop, or skip the record


HARMLESS = ("batch_size", "root", "folder", "cache", "progress", "bad_records")  # of the options

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
    BadInput on input that the method cannot use, before the first answer is sampled, and ConnectionError when
    a server cannot be reached.
    """
    if method not in METHODS:
        raise BadInput(f"unknown method {method!r}, there are {', '.join(METHODS)}")
    if sum(given is not None for given in (scene_seeds, images, pairs)) != 1:
        raise BadInput("give exactly one of scene_seeds, images and pairs")
    records = pairs if pairs is not None else images if images is not None else scene_records(scene_seeds)
    if not records:
        raise BadInput("there are no pictures to make pairs of")
    models, options = Models(model, processor, clip, clip_processor, share), Options(**options)
    plan = METHODS[method](records, models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        (made, dropped), bad = _readable(rows, records, options, lambda good: plan.work(good, bars))
        return made, dropped + +Counter({"unreadable picture": bad})

    if out is None:
        made, dropped = work(list(range(len(records))), options.progress)
    else:
        found = in_chunks([record["id"] for record in records], work, out,
                          settings(method, records, models, options), chunk=options.batch_size,
                          rank=share.rank, world=share.world, barrier=share.barrier,
                          progress="pictures" * options.progress)
        if found is None:
            return None
        made, dropped = found
    return made, {**report_on(method, records, made, dropped), **plan.notes}


def _readable(rows: list[int], records: list[dict], options: Options, do: Callable[[list[int]], object]) -> tuple:
    """(`do` of rows, 0). Where it fails because pictures cannot be decoded: with --bad-records skip, (`do` of the
    other rows, how many there were); else BadInput that names the records."""
    try:
        return do(rows), 0
    except BadInput:
        bad = _damaged([records[row] for row in rows], options)
        if not bad:
            raise
    if options.bad_records == "stop":
        raise BadInput("\n".join(map(str, bad)) + "; mend it, or leave it out with --bad-records skip: the same"
                       " command goes on where this one stopped")
    names = {record.name for record in bad}
    good = [row for row in rows if records[row]["id"] not in names]
    if not good:
        return ([], Counter()), len(bad)
    return do(good), len(bad)


def _damaged(records: list[dict], options: Options) -> list[BadRecord]:
    """The records whose picture cannot be decoded; each distinct picture is decoded once."""
    verdicts: dict[str, str] = {}
    for record in records:
        if record["image"] not in verdicts:
            try:
                check_image(record, options.root)
                verdicts[record["image"]] = ""
            except BadRecord as error:
                verdicts[record["image"]] = error.reason
    return [BadRecord(record["id"], verdicts[record["image"]]) for record in records if verdicts[record["image"]]]


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
        raise BadInput("rank makes the text pairs itself: give pictures, not pairs")
    return Plan(_text_pairs(records, models, options))


def _realign(records: list[dict], models: Models, options: Options) -> Plan:
    answered = _answered(records, models, options)

    def retrieve(rows: list[int]) -> tuple[dict[str, list], dict]:
        return _retrieve([records[row]["image"] for row in rows], models, options)

    (near, notes), _ = _readable(list(range(len(records))), records, options, retrieve)
    complete = infill(models.model, models.processor, batch_size=options.batch_size, root=options.root)
    similarity = _similarity(models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        if any(records[row]["image"] not in near for row in rows):
            raise BadInput("a picture could not be read")  # `_readable` finds out which
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
                                  any_object=options.any_object, batch_size=options.batch_size,
                                  root=options.root, source=source, progress="scoring removals" * bars)
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
STARTS_FROM_CHOSEN = ("realign", "bdhs", "povid", "corrupt")  # those that make the rejected answer of the chosen one


def needs_model(method: str, records: list[dict], options: Options) -> bool:
    """Whether the model has to say something: not where the texts are given or others write them."""
    if method in TAKES_TEXTS and _have("rejected", records):
        return False
    answers_itself = options.author == "policy" and not _have("chosen", records)
    return method not in ("corrupt", "povid") or options.writer == "policy" or answers_itself


def needs_clip(method: str, options: Options) -> bool:
    """Whether pictures or texts have to be embedded."""
    similar = method == "bdhs" and options.sentence_model is None
    return method in ("realign", "adavip") or similar or options.judge == "clip"


# ---------------------------------------------------------------------------------------- their parts


def _have(key: str, records: list[dict]) -> bool:
    """Whether all records bring this text along; that some do and some do not is an error."""
    lacking = [record["id"] for record in records if key not in record]
    if 0 < len(lacking) < len(records):
        raise BadInput(f"{key!r} is missing in {len(lacking)} of {len(records)} records (first: "
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
    """Records with a chosen answer: the given one, one that a stronger model writes, or the best sample."""
    if _have("chosen", records):
        return _as_given(records)
    if options.author != "policy":
        return _written(_asked("author", options.author, options.author_model, models, options), records)
    judge = _judge(records, models, options)

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some = [records[row] for row in rows]
        best = best_answers(some, _sample(some, rows, models, options, bars), judge=judge)
        kept = [{**record, "chosen": answer} for record, answer in zip(some, best) if answer]
        return kept, +Counter({"no finished answer, or no verdict": len(some) - len(kept)})

    return work


def _written(author: Model, records: list[dict]) -> Work:
    """Records with the answers of a model that is asked once."""

    def work(rows: list[int], bars: bool = False) -> tuple[list[dict], Counter]:
        some = [records[row] for row in rows]
        replies = author.ask([Request(record["image"], record["prompt"]) for record in some])
        kept = [{**record, "chosen": reply.text} for record, reply in zip(some, replies, strict=True) if reply.text]
        return kept, Counter(reply.problem or "an empty answer" for reply in replies if not reply.text)

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
    """The model that is trained itself, another local one, or one behind a server."""
    if who == "policy":
        return local_model(models.model, models.processor, str(options.source.get("model", "policy")),
                           batch_size=options.batch_size, root=options.root)
    if not is_url(who):
        loaded = models.model or models.clip  # the other one goes where these are
        first = next(loaded.parameters()) if loaded else torch.empty(0)
        return local_model(load_llava(who, first.dtype, first.device), Processor(who), who,
                           batch_size=options.batch_size, root=options.root)
    if not name:
        raise BadInput(f"the {role} {who} needs the name of its model (--{role}-model)")
    if options.cache is None:
        raise BadInput(f"the {role} {who} needs a folder that keeps its replies (--cache)")
    return server_model(Server(who, name), cache=options.cache / "replies", root=options.root)


def is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _similarity(models: Models, options: Options) -> Similarity:
    """What compares two answers."""
    if options.sentence_model:
        return SentenceEncoder(options.sentence_model, device=models.model.device).similarity
    return clip_similarity(models.clip, models.clip_processor)


def _retrieve(pictures: list[str], models: Models, options: Options) -> tuple[dict[str, list], dict]:
    """Nearest other pictures of each picture; for the report, which were the same, and the recall of an approximate
    search."""
    vectors = _embed(pictures, models, options)
    duplicates = Duplicates(options.same_image, options.root)
    notes = {}
    if options.nprobe is None:
        found = neighbours(pictures, vectors, options.top_k, duplicates)
    else:
        found, recall = approximate_neighbours(pictures, vectors, options.top_k, options.nprobe,
                                               duplicates=duplicates)
        notes["recall"] = round(recall, 4)
    notes["same_image"] = {kind: len(pairs) for kind, pairs in duplicates.found.items()}
    return dict(zip(pictures, found)), notes


def _embed(pictures: list[str], models: Models, options: Options) -> np.ndarray:
    """Vectors of pictures (N, E); with a cache each process computes a share of them."""
    show = {"batch_size": options.batch_size, "root": options.root,
            "progress": "embedding pictures" * (options.progress and models.share.rank == 0)}
    if options.cache is None:
        return embed_images(pictures, models.clip, models.clip_processor, **show)
    folder, (rank, world, barrier) = options.cache / "embeddings", models.share
    distinct = list(dict.fromkeys(pictures))
    with suppress(BadInput):  # of a picture: all processes meet it below, behind the barrier
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
            raise BadInput(f"the weights of Mask R-CNN cannot be downloaded ({error}); "
                           "--detector-weights FILE names a file") from None
    else:
        detect = coco_instances(options.detector)
    fill = lama_fill(load_lama(options.lama, device)) if options.lama else inpaint.fill
    return photo_candidates(detect, folder, fill=fill, dilation=options.dilation, max_area=options.max_area,
                            root=options.root)


def _folder(options: Options) -> Path:
    if options.folder is None:
        raise BadInput("this method makes pictures: give the folder they go to")
    return options.folder


def _origin(options: Options) -> dict:
    judge = {} if options.judge == "scene" else {"judge": options.judge_model or options.judge}
    author = {} if options.author == "policy" else {"author": options.author_model or options.author}
    return {**options.source, "seed": options.seed, "temperature": options.temperature, **judge, **author}
