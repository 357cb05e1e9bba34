"""What a run of train.py starts from: its records, the model with what trains marked, the judges of its samples."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import BadInput, read_json, refuse
from data import scenes
from data.batch import fields_of, tokens_of
from data.check import check_records, refuse_several
from data.formats import Data, load
from data.processor import ClipProcessor, Processor
from data.records import have_context, write_jsonl
from judges.ask import Server, server_model
from judges.clip import clip_judge, clip_similarity
from judges.compare import model_judge
from judges.known import KnownObjects
from judges.reward import reward_judge
from judges.scene import judge_scene
from judges.scores import Judge, one_by_one
from judges.words import Verifier
from model.checkpoint import DEFAULT_CLIP, load_clip, load_llava
from model.llava import Llava
from model.logprobs import Scorer
from model.lora import Reference, add_lora, merge_lora
from model.reference import identity
from model.reward import RewardModel, load_reward_model
from model.training import Policy, parameter_groups, restarts
from options import PAIRS, SCENES_OF_A_SEED, Recipe
from pairs.methods import make_pairs
from pairs.progress import forget

# ----------------------------------------------------------------------------------------------------- records


def find_records(args: argparse.Namespace, recipe: Recipe, policy: Policy, processor: Processor, rank: int,
                 world: int, given: Data | None = None) -> tuple[list[dict], Path]:
    """(records, folder that their paths start from): those of --data, which may have been read (`given`), or made from
    scenes and kept in --out.

    Only a run that goes on from a checkpoint takes pairs.jsonl as it is; others take part files of these settings.
    """
    path = args.data or args.out / PAIRS
    if args.data is None and not (args.resume and path.exists()):
        with policy.whole(here=rank == 0) as whole:
            if rank == 0:
                write_jsonl(path, resumable_records(path, args, recipe, whole.model, processor))
    if world > 1:
        dist.barrier()
    data = given or read_records(path, recipe, args.batch_size)
    if args.data is None:
        check_texts(args, recipe, processor, data, path, rank)
    elif rank == 0:
        after = ", with a context that their responses continue" if have_context(data.records) else ""
        print(f"--data {path}: {len(data.records):,} records, read as {data.format}{after}", flush=True)
    return data.records, data.root


def resumable_records(path: Path, args: argparse.Namespace, recipe: Recipe, model: Llava, processor: Processor,
                      ) -> list[dict]:
    """`make_records`, going on with the part files of `path`. Ctrl-C and SIGTERM end the run, with status 1 and a line
    that says how to go on."""
    if args.overwrite and not restarts():
        forget(path)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return make_records(args, recipe, model, processor, out=path, dtype=weights_dtype(args),
                            identity=identity(args.model, [], processor))
    except KeyboardInterrupt:
        sys.exit(f"train.py: interrupted, the pairs made so far are kept; go on with --resume --out {args.out}")
    finally:
        signal.signal(signal.SIGTERM, before)


def make_records(args: argparse.Namespace, recipe: Recipe, model: Llava, processor: Processor, **options,
                 ) -> list[dict]:
    """Pairs of scenes by the loss's method, with options of it, or the scenes themselves with the question about them.
    """
    first = scenes.PAIRS + args.seed % 10 * SCENES_OF_A_SEED  # never reaches the scenes of dev and test
    seeds = range(first, first + args.scenes)
    if not recipe.pairs:
        return [{"id": f"scene-{seed}", "image": scenes.reference(seed), "prompt": scenes.CAPTION_PROMPT}
                for seed in seeds]
    clip, clip_processor = load_clip(DEFAULT_CLIP, device=model.device), ClipProcessor(DEFAULT_CLIP)
    records, report = make_pairs(
        args.pairs or recipe.pairs, model, processor, clip, clip_processor,
        scene_seeds=seeds, seed=args.seed * SCENES_OF_A_SEED, folder=args.out / "images", root=args.out, **options,
    )
    print(f"pairs: {json.dumps(report)}", flush=True)
    return records


def read_records(path: Path, recipe: Recipe, batch_size: int = 1) -> Data:
    """Validated records, a batch at least, with what this loss reads: images and questions if it samples everything."""
    command = f"python generate_pairs.py --method {recipe.pairs}"
    hints = {"rejected": f"{command} --data {path} makes pairs",
             "rejected_image": f"{command} --data {path} adds one",
             "rejected_image_response": f"{command} --data {path} adds one"}
    needs = fields_of(recipe.sequences) - {"generated"} if recipe.pairs else ()
    data = load(path, needs=needs, hints=hints, answers=bool(recipe.pairs))
    if recipe.samples and have_context(data.records):
        raise BadInput(f"{path}: its responses continue a 'context', a loss that samples writes whole ones")
    if len(data.records) < batch_size:
        raise BadInput(f"{path}: {len(data.records)} records are fewer than one batch of {batch_size} (--batch-size)")
    return data


def check_texts(args: argparse.Namespace, recipe: Recipe, processor: Processor, data: Data, path: Path, rank: int,
                ) -> None:
    """Name all records that the tokenizer or the decoder's window would refuse later. Raises BadInput."""
    if recipe.asks_for("verifier") or recipe.asks_for("judge") and args.judge == "clip":  # CLIP looks at one
        refuse_several(data.records, f"--loss {args.loss} with CLIP")
    about = dict(root=data.root, source=path, progress="checking texts" if rank == 0 else "")
    check_records(data.records, processor, **about, sequences=recipe.sequences if recipe.pairs else None,
                  end=recipe.rewards, new_tokens=args.max_new_tokens if recipe.samples else 0)
    if recipe.asks_for("judge") and args.judge == "reward":  # reads each response with one more token after it
        check_records(data.records, reward_processor(args.reward), **about, new_tokens=args.max_new_tokens + 1)


# ------------------------------------------------------------------------------------------------------- model


def record_lengths(args: argparse.Namespace, recipe: Recipe, processor: Processor, records: list[dict],
                   root: Path | None) -> list[int] | None:
    """Tokens of each record where batches go by them. BadInput that names the records beyond --max-tokens, which no
    micro-batch could take."""
    if not (args.max_tokens or args.group_by_length):
        return None
    lengths = [tokens_of(record, recipe.sequences, processor, root, recipe.rewards) for record in records]
    refuse(f"{args.data or args.out / 'pairs.jsonl'}: record {record['id']!r}: {length:,} tokens, more than"
           f" --max-tokens {args.max_tokens:,}" for record, length in zip(records, lengths)
           if args.max_tokens and length > args.max_tokens)
    return lengths


def load_model(args: argparse.Namespace, device: torch.device) -> Llava:
    """The model, with what trains marked: adapters (and the projector), or decoder and projector in full; and the
    vision tower."""
    # Before it is sharded it stays in its files; layer by layer it then moves to the device.
    model = load_llava(args.model, None, "cpu") if args.shard else load_llava(args.model, weights_dtype(args), device)
    merge_lora(model)  # a folder of adapters is a starting point like any other
    return with_trained(args, model)


def weights_dtype(args: argparse.Namespace) -> torch.dtype:
    """Of the weights that are loaded: bf16 where they do not train."""
    return torch.bfloat16 if args.precision == "bf16" and args.lora_rank else torch.float32


def with_trained(args: argparse.Namespace, model: Llava) -> Llava:
    """The model with adapters, and what trains marked."""
    full = args.lora_rank == 0
    model.requires_grad_(False)
    torch.manual_seed(args.seed)  # the same adapters in every process
    if full:
        model.language_model.requires_grad_(True)
    else:
        add_lora(model.language_model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if full or args.train_projector:
        model.connector.float().requires_grad_(True)
    if args.train_vision:
        model.train_tower()
    set_checkpointing(model, args.checkpointing)
    return model


def set_checkpointing(model: Llava, on: bool) -> None:
    """Whether decoder and tower are recomputed in the backward."""
    for module in model.modules():
        if hasattr(module, "checkpointing"):
            module.checkpointing = on


def make_policy(args: argparse.Namespace, recipe: Recipe, model: Llava, device: torch.device, world: int) -> Policy:
    """Scorer, reference and optimiser around the model; all that trains is inside the scorer."""
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    scorer = RewardModel(model, autocast) if recipe.rewards else Scorer(model, autocast, recipe.asks_for("values"))
    kind, kind_of_reference = Policy, Reference
    if args.shard:
        from model import shard  # not at the top: importing FSDP takes a second
        kind, kind_of_reference = shard.shard(scorer, model, weights_dtype(args), device, autocast), shard.Reference
    ratios = {model.CONNECTOR: (args.projector_lr or args.lr) / args.lr,
              model.TOWER: (args.vision_lr or args.lr) / args.lr}
    optimizer = torch.optim.AdamW(parameter_groups(scorer, ratios), lr=args.lr, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay, fused=device.type == "cuda" or None)
    compares = recipe.compares and not args.reference_cache  # a reference may hold a copy of the weights
    reference = kind_of_reference(model) if compares else None
    if world > 1 and not args.shard:
        scorer = DistributedDataParallel(scorer, gradient_as_bucket_view=True)  # gradients are kept once, not twice
    return kind(model, scorer, reference, optimizer, args.clip_norm)


# ------------------------------------------------------------------------------------------------------ judges


def make_judges(args: argparse.Namespace, recipe: Recipe, model: Llava, processor: Processor, root: Path,
                ) -> dict[str, Callable]:
    """Who judges the samples of this loss, if it samples: by the names that its functions ask for."""
    judges: dict[str, Callable] = {}
    if recipe.asks_for("judge"):
        judges["judge"] = make_judge(args, model.device, root)
    if recipe.asks_for("verifier"):
        judges["verifier"] = Verifier(load_clip(args.clip_model, device=model.device), ClipProcessor(args.clip_model),
                                      processor, root, KnownObjects(args.objects))
    if recipe.asks_for("similarity"):
        judges["similarity"] = clip_similarity(load_clip(args.clip_model, device=model.device),
                                               ClipProcessor(args.clip_model))
    return judges


def make_judge(args: argparse.Namespace, device: torch.device, root: Path) -> Judge:
    """The judge of --judge."""
    if args.judge == "scene":
        return one_by_one(judge_scene)
    if args.judge == "clip":
        return clip_judge(load_clip(args.clip_model, device=device), ClipProcessor(args.clip_model), root=root)
    if args.judge == "reward":
        half = torch.bfloat16 if args.precision == "bf16" else None
        reward = load_reward_model(args.reward, half or torch.float32, device, autocast=half)
        return reward_judge(reward, reward_processor(args.reward), root)
    server = server_model(Server(args.judge, args.judge_model), cache=args.out / "replies", root=root)
    return model_judge(server, seed=args.seed)


def reward_processor(folder: Path) -> Processor:
    """How the reward model of a folder reads images and texts."""
    config = read_json(folder / "config.json")
    if not all(isinstance(config.get(key, 0), str | None) for key in ("template", "aspect")):
        raise BadInput(f"{folder / 'config.json'}: template and aspect must be names, or null")
    return Processor(folder / "model", template=config["template"], aspect=config["aspect"])
