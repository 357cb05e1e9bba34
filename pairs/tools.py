"""What the methods of pairs/ ask for by the names of their arguments.

A tool is made by one function, at most once and only if it is used. The functions follow the rule of the methods: the
names of their arguments say what they need, their keyword-only arguments are options. A tool that a tool needs comes
as a function that makes it, because the options decide what is needed: `clip()` is called by --judge clip alone.

    model, processor, clip, clip_processor: the policy and the CLIP model
    similarity: two lists of texts -> cosines
    asked: (name or URL, name at the URL) -> a model that answers requests (judges/ask.py)
    judge: (records, responses of each) -> verdicts (judges/scores.py)
    referee: a judge of chosen responses that are not given, or None where all are taken
    shown: record -> classes of objects that its image shows (pairs/sentinel.py)
    sample, author: records -> several responses, or one, to each (pairs/texts.py)
    writer: records -> corruptions of `chosen` (pairs/corrupt.py)
    candidates: record -> labels of objects with the image without them (pairs/adavip.py)
    neighbours: image -> similar images, best first (pairs/realign.py)
    models, source: for the `source` of the pairs; the models in use, and how the texts came about

    option            meaning
    model             LLaVA folder or hub id
    template          prompt template, a name of model.families.TEMPLATES; None: the checkpoint's own
    aspect            how images are shown; None: the checkpoint's way
    clip_model        CLIP folder or hub id; None: the embedded one, which knows scenes only
    sentence_model    folder or hub id of a sentence encoder that compares responses; None: CLIP does
    samples           responses to each image
    temperature       of the sampling
    max_new_tokens    of a response
    seed              of all that is drawn; the samples of record i use seed + i
    judge             who judges: scene or chair (what --detector finds) know what an image shows; clip, policy (the
                      model itself), another LLaVA (folder or hub id) or a server's URL rank responses
    judge_model       name of the model at that server
    clean_chosen      reconstructed: drop records whose chosen response --judge scene or chair does not find faithful
    author            who writes the chosen responses that are not given: policy (the best of its samples), scene (its
                      own caption), another LLaVA or a server's URL
    author_model      name of the model at that server
    writer            who writes errors: scene (rules), policy, another LLaVA or a server's URL
    writer_model      name of the model at that server
    top_k             neighbours tried, nearest first
    same_image        reconstructed: neighbours whose 8 x 8 thumbnails have at least this cosine are the same image
                      under another name and passed over; above 1: those of equal pixels only
    nprobe            cells that an approximate search looks into; None: exact search
    detector          what finds objects: scene, ram+dino+sam, maskrcnn or a COCO instances FILE.json
    detector_weights  of maskrcnn; None: torchvision downloads them
    ram               weights of RAM or RAM++
    dino              weights of GroundingDINO
    sam               weights of SAM
    ram_tags          ram_tag_list.txt of RAM's released code
    ram_thresholds    ram_tag_list_threshold.txt; None: tag_threshold for all
    dino_tokenizer    tokenizer.json of bert-base-uncased
    tag_threshold     reconstructed: least probability of a tag
    box_threshold     reconstructed: least score of a box
    overlap           reconstructed: boxes of one tag that share more count as one
    lama              weights of LaMa, which fills holes; None: a smooth fill
    dilation          reconstructed: side of the square that masks grow by, odd
    max_area          reconstructed: objects that take a larger share of the image are left in it
"""

from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from common import HOME, BadInput, arguments_of, is_url, kwargs_of
from data import inpaint
from data.check import check_records, refuse_several
from data.detect import Detect, coco_instances, mask_rcnn, scene_objects
from data.images import is_scene
from data.lama import lama_fill, load_lama
from data.processor import ClipProcessor, Processor
from judges.ask import Model, Request, Server, local_model, server_model
from judges.chair import chair_judge, shown_to
from judges.clip import Similarity, clip_judge, clip_similarity
from judges.compare import model_judge
from judges.scene import judge_scene, shown_in_scene
from judges.scores import Judge, one_by_one
from judges.sentence import SentenceEncoder
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava
from model.clip import CLIP
from model.hub import resolve
from model.llava import Llava
from pairs.adavip import Candidates, photo_candidates, scene_candidates
from pairs.corrupt import Writer, model_corrupt, scene_corrupt
from pairs.progress import readable
from pairs.rank import Sample
from pairs.realign import Neighbours
from pairs.texts import Author, best_responses, sample_responses, scene_captions
from retrieval.cache import cached_images
from retrieval.embed import embed_images
from retrieval.index import Duplicates, approximate_neighbours
from retrieval.index import neighbours as exact_neighbours

SHARD = 1024  # images that a process embeds at a time, when several do
WHO = {"judge": ("scene", "chair", "clip", "policy"), "author": ("policy", "scene"), "writer": ("scene", "policy")}
COUNTING = ("scene", "chair")  # judges that count claims


class Share(NamedTuple):
    """This process among those that make the pairs together."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None  # waits until all processes have called it


class Setting(NamedTuple):
    """What is the same for all tools of a run."""

    records: list[dict]
    root: Path | None = None  # folder that relative paths of images start from, also of those that are made
    folder: Path | None = None  # where images go that a method makes
    cache: Path | None = None  # of embeddings and servers' replies
    file: Path | str = "scenes"  # where the records come from, for messages
    checks: dict = {}  # arguments of `check_records`: what the model will read
    batch_size: int = 64  # images at a time
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    progress: bool = True  # a bar with the remaining time, on a terminal
    bad_records: str = "stop"  # at an image that cannot be decoded: stop, or skip the record
    share: Share = Share()
    identity: dict = {}  # what the pairs depend on of a model that is given, for the part files


class Tools:
    """Tools by name.

    Args:
        setting: also to be had by the names of its fields.
        options: values of the tools' keyword-only arguments.
        made: tools that exist already.
    """

    def __init__(self, setting: Setting, options: dict, made: dict):
        self.options, self.used, self.notes = options, {}, {}
        self.made = {**setting._asdict(), "setting": setting, "used": self.used, "notes": self.notes, **made}

    def get(self, name: str):
        if name not in self.made:
            make = TOOLS[name]
            needs = {n: partial(self.get, n) if n in TOOLS else self.made[n] for n in arguments_of(make)}
            self.made[name] = make(**needs, **kwargs_of(make, self.options))
        return self.made[name]

    def bind(self, functions: list[Callable]) -> list[Callable]:
        """Functions of a chunk of records alone. Makes all tools first, in the order of TOOLS: cheap ones early, so
        that what they refuse is refused before a large model is loaded."""
        wanted = {name for function in functions for name in arguments_of(function)[1:]}
        for name in TOOLS:
            if name in wanted:
                self.get(name)
        return [partial(function, **{name: self.get(name) for name in arguments_of(function)[1:]},
                        **kwargs_of(function, self.options)) for function in functions]


def with_tools(*functions: Callable) -> list[Callable]:
    """Functions and those that make the tools they may use: all whose options count."""
    found = list(functions)
    for function in found:  # it grows
        needs = [TOOLS[name] for name in arguments_of(function) if name in TOOLS]
        found += [tool for tool in needs if tool not in found]
    return found


def check_options(options: dict) -> None:
    """Refuse what no tool can be made of. Raises BadInput."""
    for role, names in WHO.items():
        if role not in options:
            continue
        who, name = options[role], options.get(f"{role}_model")
        if who not in names and "/" not in who and not Path(who).is_dir():
            raise BadInput(f"--{role} {who!r} is none of {', '.join(names)}, a LLaVA folder or hub id, or a server's"
                           " http URL")
        if is_url(who) != bool(name):
            raise BadInput(f"--{role} URL and --{role}-model NAME belong together")
    if options.get("clean_chosen") and options["judge"] not in COUNTING:
        raise BadInput(f"--clean-chosen asks whether a response is faithful, --judge {options['judge']} only compares"
                       f" responses: choose {' or '.join(COUNTING)}")
    detector = options.get("detector", "scene")
    if detector not in ("scene", "ram+dino+sam", "maskrcnn") and not detector.endswith(".json"):
        raise BadInput(f"--detector {detector!r} is none of scene, ram+dino+sam, maskrcnn or a .json file")
    if options.get("dilation", 1) % 2 == 0:
        raise BadInput(f"--dilation {options['dilation']}: must be odd, so that the square has a middle")


def named(path: Path | str) -> str:
    """A folder of this repository by its place in it, so that records do not depend on where that is."""
    if not Path(path).is_dir():  # a hub id
        return str(path)
    folder = Path(path).resolve()
    return str(folder.relative_to(HOME) if folder.is_relative_to(HOME) else folder)


# ---------------------------------------------------------------------------------------- networks


def processor(setting: Setting, *, model: Path = DEFAULT_MODEL, template: str | None = None,
              aspect: str | None = None) -> Processor:
    """Before a large model is loaded, all records are named whose texts it would refuse in the middle."""
    made = Processor(resolve(model), template, aspect)
    check_records(setting.records, made, setting.root, setting.file, **setting.checks, progress="checking texts")
    return made


def model(processor, setting: Setting, used: dict, *, model: Path = DEFAULT_MODEL) -> Llava:
    """The policy, loaded after all records' texts were checked."""
    processor()
    used["model"] = named(model)
    return load_llava(resolve(model), dtype=setting.dtype, device=setting.device)


def clip_processor(*, clip_model: Path | None = None) -> ClipProcessor:
    """Texts and images for CLIP."""
    return ClipProcessor(resolve(clip_model or DEFAULT_CLIP))


def clip(setting: Setting, used: dict, *, clip_model: Path | None = None) -> CLIP:
    """The CLIP model. Raises BadInput where the embedded one would look at photographs."""
    if clip_model is None and not all(is_scene(record["image"]) for record in setting.records):
        raise BadInput("photographs need --clip-model DIR: the embedded CLIP knows scenes only")
    used["clip"] = named(clip_model or DEFAULT_CLIP)
    return load_clip(resolve(clip_model or DEFAULT_CLIP), dtype=setting.dtype, device=setting.device)


def similarity(clip, clip_processor, setting: Setting, used: dict, *,
               sentence_model: Path | None = None) -> Similarity:
    """What compares two responses."""
    if sentence_model is None:
        return clip_similarity(clip(), clip_processor())
    used["sentence_model"] = named(sentence_model)
    return SentenceEncoder(sentence_model, device=setting.device).similarity


# ---------------------------------------------------------------------------------------- who writes and judges


def sample(model, processor, setting: Setting, used: dict, *, samples: int = 4, temperature: float = 1.0,
           max_new_tokens: int = 96, seed: int = 0) -> Sample:
    """Several responses of the policy to each record; record i of the run uses seed + i."""
    used.update(seed=seed, temperature=temperature)
    seeds = {record["id"]: seed + row for row, record in enumerate(setting.records)}
    return partial(sample_responses, seeds=seeds, model=model(), processor=processor(), n=samples,
                   temperature=temperature, max_new_tokens=max_new_tokens, batch_size=setting.batch_size,
                   root=setting.root)


def asked(model, processor, setting: Setting, used: dict) -> Callable[[str, str | None], Model]:
    """Who writes or judges: the model that is trained itself, another local one, or one that a server runs."""
    show = {"batch_size": setting.batch_size, "root": setting.root}

    @cache
    def load(name: str) -> tuple[Llava, Processor]:  # who judges may also write, and is loaded once
        return load_llava(name, setting.dtype, setting.device), Processor(name)

    def ask(who: str, name: str | None) -> Model:
        if who == "policy":
            return local_model(model(), processor(), used.get("model", "policy"), **show)
        if not is_url(who):
            return local_model(*load(who), who, **show)
        if setting.cache is None:
            raise BadInput(f"{who} needs a folder that keeps its replies (--cache)")
        return server_model(Server(who, name), cache=setting.cache / "replies", root=setting.root)

    return ask


def judge(asked, clip, clip_processor, detect, setting: Setting, used: dict, *, judge: str = "scene",
          judge_model: str | None = None, seed: int = 0) -> Judge:
    """Who ranks the samples. Raises BadInput where the scenes' judge does not know an image."""
    if judge == "scene":
        for record in setting.records:
            judge_scene(record, [])  # raises now, not after hours, when it does not know an image
        return one_by_one(judge_scene)
    used["judge"] = judge_model or judge
    if judge == "chair":
        return chair_judge(detect(), setting.root)
    if judge == "clip":
        refuse_several(setting.records, "--judge clip")
        return clip_judge(clip(), clip_processor(), batch_size=setting.batch_size, root=setting.root)
    return model_judge(asked()(judge, judge_model), seed=seed)


def referee(judge, *, clean_chosen: bool = False) -> Judge | None:
    """Who says whether a chosen response is faithful."""
    return judge() if clean_chosen else None


def shown(detect, setting: Setting, used: dict, *, judge: Literal["scene", "chair"] = "scene",
          ) -> Callable[[dict], set[str]]:
    """Who knows which objects an image shows. Raises BadInput where the scenes' judge does not know one."""
    if judge == "scene":
        for record in setting.records:
            shown_in_scene(record)  # raises now
        return shown_in_scene
    used["judge"] = judge
    return shown_to(detect(), setting.root)


def writer(asked, setting: Setting, used: dict, *, writer: str = "scene", writer_model: str | None = None,
           seed: int = 0) -> Writer:
    """Who writes errors. Raises BadInput where rules do not know an image."""
    if writer == "scene":
        refuse_several(setting.records, "--writer scene")
        used.update(seed=seed, writer="rules")
        write = scene_corrupt(seed)
        write([record for record in setting.records if not record["image"].startswith("scene:")])  # raises now
        return write
    model = asked()(writer, writer_model)
    used["writer"] = model.name
    return model_corrupt(model)


def author(sample, judge, asked, setting: Setting, used: dict, *, author: str = "policy",
           author_model: str | None = None, seed: int = 0) -> Author:
    """Who writes the chosen responses that are not given. Raises BadInput where the scenes' author has no caption."""
    if author == "policy":
        return partial(best_responses, judge=judge(), sample=sample())
    if author == "scene":
        used.update(seed=seed, author="scene")
        scene_captions(setting.records)  # raises now, of all records
        return partial(scene_captions, seed=seed)
    used["author"] = author_model or author
    model = asked()(author, author_model)
    return lambda records: model.ask([Request(record["image"], record["prompt"]) for record in records])


# ---------------------------------------------------------------------------------------- images


def detect(setting: Setting, used: dict, *, detector: str = "scene", detector_weights: Path | None = None,
           ram: Path | None = None, ram_tags: Path | None = None, ram_thresholds: Path | None = None,
           dino: Path | None = None, dino_tokenizer: Path | None = None, sam: Path | None = None,
           tag_threshold: float = 0.68, box_threshold: float = 0.35, overlap: float = 0.7) -> Detect:
    """What finds objects (data/detect.py). Raises BadInput naming weights that are missing."""
    if detector == "scene":
        return scene_objects
    used["detector"] = detector
    if detector == "maskrcnn":
        try:
            return mask_rcnn(detector_weights, device=setting.device)
        except OSError as error:
            raise BadInput(f"the weights of Mask R-CNN cannot be downloaded ({error}); --detector-weights FILE names a"
                           " file") from None
    if detector != "ram+dino+sam":
        return coco_instances(detector)
    from networks.chain import ram_dino_sam  # torchvision takes a second, and only this needs it

    thresholds = {"tag_threshold": tag_threshold, "box_threshold": box_threshold, "overlap": overlap}
    used["thresholds"] = {**thresholds, **({"tag_threshold": ram_thresholds.name} if ram_thresholds else {})}
    files = {"ram": ram, "ram_tags": ram_tags, "ram_thresholds": ram_thresholds, "dino": dino,
             "dino_tokenizer": dino_tokenizer, "sam": sam}
    return ram_dino_sam(files, **thresholds, device=setting.device)


def candidates(setting: Setting, used: dict, notes: dict, detect: Callable[[], Detect], *, lama: Path | None = None,
               dilation: int = 15, max_area: float = 0.8) -> Candidates:
    """Images without one of their objects. Raises BadInput where nothing finds objects in an image."""
    find = detect()
    if find is scene_objects:
        for record in setting.records:
            scene_candidates(record)  # raises now when it does not know an image
        return scene_candidates
    used["fill"] = lama.name if lama else "harmonic, without weights"
    if not lama:
        notes["fill"] = "harmonic: no inpainting weights were given (--lama)"
    fill = lama_fill(load_lama(lama, setting.device)) if lama else inpaint.fill
    return photo_candidates(find, setting.folder, fill=fill, dilation=dilation, max_area=max_area, root=setting.root)


def neighbours(clip, clip_processor, setting: Setting, notes: dict, *, top_k: int = 5, same_image: float = 0.995,
               nprobe: int | None = None) -> Neighbours:
    """Searches for all records at once. Notes for the report: copies that were passed over, and the recall of an
    approximate search."""

    def search(records: list[dict]) -> dict[str, list]:
        images = [record["image"] for record in records]
        vectors = _embed(images, clip(), clip_processor(), setting)
        duplicates = Duplicates(same_image, setting.root)
        if nprobe is None:
            found = exact_neighbours(images, vectors, top_k, duplicates)
        else:
            found, recall = approximate_neighbours(images, vectors, top_k, nprobe, duplicates=duplicates)
            notes["recall"] = round(recall, 4)
        notes["same_image"] = {kind: len(pairs) for kind, pairs in duplicates.found.items()}
        return dict(zip(images, found))

    near, _ = readable(setting.records, search, setting.root, setting.bad_records)

    def look_up(image: str) -> list[tuple[str, float]]:
        if image not in near:
            raise BadInput(f"{image}: could not be read")  # `readable` finds out which record it is
        return near[image]

    return look_up


def _embed(images: list[str], clip: CLIP, processor: ClipProcessor, setting: Setting) -> np.ndarray:
    """Vectors of images (N, E); with a cache each process computes a share of them."""
    rank, world, barrier = setting.share
    show = {"batch_size": setting.batch_size, "root": setting.root,
            "progress": "embedding images" if setting.progress and rank == 0 else ""}
    if setting.cache is None:
        return embed_images(images, clip, processor, **show)
    folder, distinct = setting.cache / "embeddings", list(dict.fromkeys(images))
    with suppress(BadInput):  # of an image: all processes meet it below, after the barrier
        for start in range(SHARD * rank, len(distinct) if world > 1 else 0, SHARD * world):
            part = distinct[start : start + SHARD]  # in batches as one process would make them
            cached_images(part, clip, processor, folder, shard=SHARD, **show)
    barrier()
    return cached_images(images, clip, processor, folder, shard=SHARD, **show)


# ---------------------------------------------------------------------------------------- origin


def models(used: dict) -> dict:
    """The networks in use, by name."""
    keys = ("model", "clip", "sentence_model", "detector", "thresholds", "fill")
    return {key: used[key] for key in keys if key in used}


def source(used: dict) -> dict:
    """How the texts came about: networks, seed, temperature, judge, author and writer in use."""
    keys = ("model", "clip", "sentence_model", "seed", "temperature", "judge", "detector", "author", "writer")
    return {key: used[key] for key in keys if key in used}


TOOLS = {tool.__name__: tool for tool in (
    clip_processor, similarity, detect, candidates, asked, judge, referee, shown, writer, clip, author, sample,
    processor, model, neighbours, models, source)}
