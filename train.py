"""Align a LLaVA-type model with preferences: given ones, or made of what it says while it trains.

    torchrun train.py --loss adavip                                     the embedded model, one process
    torchrun --nproc-per-node 2 train.py --loss dpo                     two processes, same losses
    python train.py --loss rdpo --steps 20                              without torchrun
    python train.py --loss adavip --data pairs.jsonl --model DIR        your pairs, your LLaVA checkpoint
    python train.py --loss dpo --data rlaif-v.parquet --model DIR       published ones, as they are
    python train.py --loss adavip --out runs/adavip --resume            go on after an interruption
    python train.py --loss adavip --resume --steps 90                   and make a run longer
    python train.py --loss reward_model                                 a reward model, for the next line
    python train.py --loss ppo --reward runs/reward_model               reinforcement; rloo too, fisao needs none
    python train.py --loss dpo --help                                   the options of one loss

With no --data it makes its pairs from the scene world (data/scenes.py), with the method that fits the loss,
and as long as the pictures are scenes it measures hallucination on held-out scenes before and after: CHAIR_s
(share of captions that mention an absent object), CHAIR_i (share of mentions that are of absent objects),
recall (share of present objects that are mentioned) and POPE (accuracy of yes / no answers).

One step: records -> batch (data/batch.py) -> token log-probs of policy and reference (model/logprobs.py) ->
loss (losses/) -> AdamW. The reference is the model itself with its adapters off. A loss is a pure function;
its argument names say which log-probs it gets, its keyword arguments become options here (--beta, ...).
Losses that need samples draw them first: pairs from pairs/online.py, rollouts from reinforce.py.

--out receives: config.json (the resolved configuration, the git commit and versions), pairs.jsonl (if made here),
metrics.jsonl (one line an interval), checkpoint.pt and checkpoint-previous.pt (to resume), model/ (llava-hf folder,
adapters merged), adapters/ (PEFT's format), result.json (before and after, and the records that --bad-records skip has
replaced), and from fisao baselines.json and scores.svg (what the verifier says of words and sentences, before and
after). What an earlier run left there is replaced only with --overwrite.

What can be known of the records is checked before the model is loaded, and all bad ones are listed: fields, the
headers of pictures, special tokens in texts, answers beyond the decoder's window. That a picture is damaged
inside shows when it is decoded: --bad-records says what happens then.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
import reinforce
from common import BadInput, read_json, versions
from data import scenes
from data.batch import BadRecord, Batch, MicroBatches, collate, fields_of, with_seeds, without_bad
from data.check import check_records
from data.formats import Data, load
from data.processor import ClipProcessor, Processor
from data.records import write_jsonl
from data.templates import TEMPLATES
from judges.ask import Server, server_model
from judges.clip import clip_judge, clip_similarity
from judges.compare import model_judge
from judges.known import KnownObjects
from judges.reward import reward_judge
from judges.scene import judge_scene
from judges.scores import one_by_one
from judges.words import Verifier
from losses import (
    adavip,
    bdhs,
    dpo,
    dpo_weighted,
    fisao,
    ipo,
    mdpo,
    povid,
    ppo,
    rdpo,
    reward_model,
    rloo,
    sft,
    slic,
)
from metrics.score_plot import write_histograms
from model import reference
from model.adapters import save_adapters
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava, save_json, save_llava
from model.logprobs import Scorer
from model.lora import Reference, add_lora, merge_lora
from model.reference import identity
from model.reward import RewardModel, load_reward_model, save_reward_head
from model.training import (
    CHECKPOINT,
    PREVIOUS,
    Log,
    StopRequest,
    asked,
    by_name,
    hold_back,
    read_checkpoint,
    refuse_other,
    restore,
    save_checkpoint,
    update,
)
from pairs import online
from pairs.methods import METHODS, make_pairs


class Recipe(typing.NamedTuple):
    """What a --loss consists of. What its functions ask for by the names of their arguments decides the rest; nothing
    asks which functions they are."""

    loss: Callable  # of losses/
    sequences: dict  # what it needs scored
    pairs: str = ""  # method of generate_pairs.py that makes fitting records; "": pictures and questions suffice
    online: Callable | None = None  # makes the records of a step anew from what the policy says
    advantages: Callable | None = None  # reinforcement: what a step's rollouts teach
    parts: tuple[Callable, ...] = ()  # the functions of losses/ that `advantages` puts together
    inner_epochs: int = 4  # how often reinforcement goes through a step's samples

    @property
    def functions(self) -> list[Callable]:
        """Those whose keyword arguments are options."""
        return [function for function in (self.loss, self.online, *self.parts) if function]

    def asks_for(self, name: str) -> bool:
        """Whether the loss, or what makes its records or advantages, has this argument."""
        asking = [function for function in (self.loss, self.online, self.advantages) if function]
        return any(name in inspect.signature(function).parameters for function in asking)


LOSSES = {
    "sft": Recipe(sft.sft_loss, sft.SEQUENCES, "rank"),
    "dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, "rank"),
    "ipo": Recipe(ipo.ipo_loss, ipo.SEQUENCES, "rank"),
    "slic": Recipe(slic.slic_loss, slic.SEQUENCES, "rank"),
    "slic_hf": Recipe(slic.slic_hf_loss, slic.SEQUENCES, "rank"),
    "dpo_weighted": Recipe(dpo_weighted.dpo_weighted_loss, dpo_weighted.SEQUENCES, "rank"),
    "rdpo": Recipe(rdpo.rdpo_loss, rdpo.SEQUENCES, "realign"),
    "rdpo_released": Recipe(rdpo.rdpo_loss, rdpo.SEQUENCES_RELEASED, "realign"),
    "mdpo": Recipe(mdpo.mdpo_loss, mdpo.SEQUENCES, "rank"),
    "adavip": Recipe(adavip.adavip_loss, adavip.SEQUENCES, "adavip"),
    "povid": Recipe(povid.povid_loss, povid.SEQUENCES, "rank"),
    "povid_released": Recipe(povid.povid_loss, povid.SEQUENCES_RELEASED, "rank"),
    "reward_model": Recipe(reward_model.reward_model_loss, reward_model.SEQUENCES, "rank"),
    "online_dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, online=online.ranked_pairs),
    "mixed_dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, "rank", online=online.mixed_pairs),
    "bdhs_online": Recipe(bdhs.bdhs_loss, bdhs.SEQUENCES, "rank", online=online.bdhs_triples),
    "ppo": Recipe(ppo.ppo_loss, reinforce.SEQUENCES, advantages=reinforce.ppo_advantages,
                  parts=(ppo.token_rewards, ppo.gae)),
    "rloo": Recipe(rloo.rloo_loss, reinforce.SEQUENCES, advantages=reinforce.rloo_advantages,
                   parts=(rloo.penalised, rloo.leave_one_out), inner_epochs=1),
    "fisao": Recipe(ppo.ppo_loss, reinforce.SEQUENCES, advantages=reinforce.fisao_advantages,
                    parts=(ppo.token_rewards, ppo.gae, fisao.mention_rewards, fisao.place)),
}
TUNED = "train.json"  # of a checkpoint: settings that suit it, {option: value} and, for single functions, {name: {..}}

SCENES_OF_A_SEED = 100_000  # pairs of ten seeds fit below the scenes of the dev and test splits

# What numbers may be: interval -> options, of one function alone where FUNCTION.option. A clip of inf is none.
RANGES = {
    "[1, 1e9]": "steps batch_size micro_batch_size log_every save_every scenes samples max_new_tokens inner_epochs"
                " minibatches iterations",
    "[2, 1e9]": "ranked_pairs.samples mixed_pairs.samples leave_one_out.samples",  # compared with each other
    "[0, 1e9]": "lora_rank eval_scenes workers seed",
    "(0, inf)": "lr lora_alpha temperature beta dpo_weighted_loss.gamma",
    "[0, inf)": "weight_decay kl_coef kl_target missing_eos_penalty value_coef margin sft_weight centring_weight"
                " slic_hf_loss.delta bdhs_triples.temperature",
    "(0, inf]": "clip_norm clip value_clip limit",
    "[0, inf]": "rloo_loss.clip",  # 0: none
    "[0, 1)": "warmup lora_dropout",
    "[0, 0.5)": "label_smoothing",
    "[0, 1]": "gamma lam offline rho_th",
    "[-1, 1]": "eps_s",  # a cosine
    "(-inf, inf)": "delta",
}


# -------------------------------------------------------------------------------------------------- arguments


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> settings. The options of the chosen loss are those of its functions."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", choices=LOSSES, default="adavip", help="(default: %(default)s)")
    first.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR",
                       help="LLaVA folder or hub id (default: model/tiny)")
    known, _ = first.parse_known_args(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_general_options(parser)
    recipe = LOSSES[known.loss]
    own = loss_options(*recipe.functions)
    tuned = tuned_settings(known.model, recipe)
    group = parser.add_argument_group(f"options of {known.loss}")
    for name, (kind, default) in own.items():
        shown = f"{tuned[name]} by {TUNED}, else {default}" if name in tuned else default
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        group.add_argument(f"--{name.replace('_', '-')}", type=type(default) if choices else kind,
                           default=default, choices=choices, help=f"{meaning(recipe, name)} (default: {shown})")
    if recipe.online or recipe.advantages:
        add_online_options(group, recipe)
    parser.set_defaults(**tuned)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.loss
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    if "clip_model" in args and args.clip_model is None and tuned:
        args.clip_model = DEFAULT_CLIP
    return args


def add_general_options(parser: argparse.ArgumentParser) -> None:
    """Those that every loss has."""
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE",
        help="records in any format of data/formats.py; left out, they are made from scenes")
    add("--pairs", choices=METHODS,
        help="method that makes pairs of scenes (default: the loss's own)")
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/LOSS)")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    add("--overwrite", action="store_true", help="begin anew although --out holds an earlier run")
    add("--steps", type=int, default=60,
        help="optimiser steps; a resumed run may have another number, and from there on the learning rate of a run"
             " of that length (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="records a step, over all processes (default: %(default)s)")
    add("--micro-batch-size", type=int, help="records a forward pass and process (default: all of the process)")
    add("--lr", type=float, default=1e-6, help="peak learning rate (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of steps with rising rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--lora-rank", type=int, default=32, help="0: decoder and projector in full (default: %(default)s)")
    add("--lora-alpha", type=float, help="(default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, help="(default: %(default)s)")
    add("--train-projector", action="store_true", help="with LoRA, train the projector too")
    add("--precision", choices=("fp32", "bf16"), help="(default: bf16 on CUDA, else fp32)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--reference-cache", type=Path, metavar="FILE",
        help="compute the reference's log-probs once and keep them here; refused if they are not this run's")
    add("--template", choices=TEMPLATES, help="prompt template (default: the checkpoint's own)")
    add("--aspect", choices=("crop", "pad", "anyres"),
        help="how pictures are shown (default: the checkpoint's way)")
    add("--seed", type=int, default=0, help="of scenes, sampling, adapters and order (default: %(default)s)")
    add("--scenes", type=int, default=600, help="scenes that records are made from (default: %(default)s)")
    add("--eval-scenes", type=int, default=300, help="held-out scenes, 0 for none (default: %(default)s)")
    add("--eval-split", choices=("test", "dev"), default="test",
        help="choose settings on dev (default: %(default)s)")
    add("--log-every", type=int, default=5, help="steps between log lines (default: %(default)s)")
    add("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches (default: %(default)s)")
    add("--bad-records", choices=("stop", "skip"), default="stop",
        help="when a picture turns out to be damaged: save a checkpoint and stop, or put another record in its"
             " place (default: %(default)s)")


def add_online_options(group, recipe: Recipe) -> None:
    """Who judges what is sampled, and how often a sample is used."""
    add = group.add_argument
    if recipe.asks_for("judge"):
        add("--judge", choices=("scene", "clip", "reward", "server"),
            default="reward" if recipe.advantages else "scene",
            help="the scene's own record, a CLIP model, a reward model, a VLM behind a server"
                 " (default: %(default)s)")
        add("--reward", type=Path, metavar="DIR",
            help="for --judge reward: what train.py --loss reward_model wrote")
        add("--server", metavar="URL", help="for --judge server: base address of an OpenAI-compatible API")
        add("--server-model", metavar="NAME", help="for --judge server")
    add("--clip-model", type=Path, metavar="DIR",
        help="CLIP folder (default: model/tiny/clip, which knows scenes only; with --model none)")
    if recipe.asks_for("verifier"):
        add("--objects", type=Path, metavar="FILE",
            help="what photographs show, to measure the baselines on: {image: [classes]} or COCO instances")
        add("--baselines", type=Path, metavar="FILE", help="baselines.json of an earlier run, to take instead")
    if recipe.advantages:
        add("--samples", type=int, default=4, help="answers to each picture (default: %(default)s)")
        add("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
        add("--max-new-tokens", type=int, default=96, help="of an answer (default: %(default)s)")
        add("--inner-epochs", type=int, default=recipe.inner_epochs,
            help="times that a step's samples are gone through (default: %(default)s)")
        add("--minibatches", type=int, default=1, help="optimiser steps in each of them (default: %(default)s)")
        add("--kl-target", type=float, default=0.0,
            help="nats an answer that the KL coefficient is steered to; 0: it is fixed (default: %(default)s)")


def uses_reference(recipe: Recipe) -> bool:
    """Whether the loss compares with the model as it was."""
    names = inspect.signature(recipe.loss).parameters
    return recipe.advantages is not None or any(name.startswith("reference_") for name in names)


def loss_options(*functions: Callable) -> dict[str, tuple[type, object]]:
    """Keyword-only arguments: name -> (type, default)."""
    found = {}
    for function in functions:
        types = typing.get_type_hints(function)
        keywords = (p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
        found |= {p.name: (types[p.name], p.default) for p in keywords
                  if p.default is not p.empty and p.name not in reinforce.MEASURED}
    return found


def meaning(recipe: Recipe, option: str) -> str:
    """What the table in the header of the function's file says about an argument, without its symbol and type."""
    function = next(f for f in recipe.functions if option in loss_options(f))
    lines = (inspect.getmodule(function).__doc__ or "").splitlines()
    for number, line in enumerate(lines):
        row = re.split(r"\s{2,}", line.strip())  # symbol, argument, type, meaning
        if option in row[:2] and row[-1] not in (option, "float", "int", "str"):
            column = line.rindex(row[-1])
            more = takewhile(lambda x: len(x) - len(x.lstrip()) == column, lines[number + 1 :])  # noqa: B023
            return " ".join([row[-1], *map(str.strip, more)]).replace("%", "%%")
    return ""


def tuned_settings(model: Path, recipe: Recipe) -> dict[str, object]:
    """What train.json of the model's folder says about the options of this loss: those for all, then those for its
    functions. Raises BadInput when it is no table of numbers."""
    if not (model / TUNED).is_file():
        return {}
    given = read_json(model / TUNED)
    found = {name: value for name, value in given.items() if not isinstance(value, dict)}
    for function in filter(None, (*recipe.functions, recipe.advantages)):
        own = given.get(function.__name__, {})
        found |= own if isinstance(own, dict) else {function.__name__: own}
    if bad := [name for name, value in found.items() if type(value) not in (int, float)]:
        raise BadInput(f"{model / TUNED}: {bad[0]} is to be a number")
    own = {"lr", "steps", *loss_options(*recipe.functions)}
    return {name: value for name, value in found.items() if name in own}


def check_ranges(args: argparse.Namespace) -> None:
    """Refuse numbers outside RANGES, NaN among them. Raises BadInput."""
    intervals = {option: interval for interval, options in RANGES.items() for option in options.split()}
    names = [function.__name__ for function in LOSSES[args.loss].functions]
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        own = [intervals[key] for key in (f"{function}.{name}" for function in names) if key in intervals]
        interval = own[0] if own else intervals.get(name, "(-inf, inf)")
        low, high = map(float, interval[1:-1].split(","))
        ends = {low} if interval[0] == "[" else set()
        ends |= {high} if interval[-1] == "]" else set()
        if not (low < value < high or value in ends):
            raise BadInput(f"--{name.replace('_', '-')} must be in {interval}, not {value}")


def check(args: argparse.Namespace, world: int) -> None:
    """Refuse impossible settings before anything is loaded. Raises BadInput."""
    check_ranges(args)
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, args.batch_size // world)
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.batch_size % (world * args.micro_batch_size):
        raise BadInput(f"--batch-size {args.batch_size} is not a multiple of {world} processes"
                       f" x micro-batch {args.micro_batch_size}")
    parts = args.batch_size // (world * args.micro_batch_size)
    if parts % getattr(args, "minibatches", 1):
        raise BadInput(f"--minibatches {args.minibatches} does not divide the {parts} micro-batches"
                       " of a process")
    if args.pairs and (args.data or not LOSSES[args.loss].pairs):
        raise BadInput("--pairs is for losses that learn from pairs, where there is no --data")
    if args.data is None and args.scenes > SCENES_OF_A_SEED:
        raise BadInput(f"--scenes {args.scenes} is more than the {SCENES_OF_A_SEED} of a seed")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on with what --out holds, --overwrite replaces it: which of them?")
    if args.resume and not any((args.out / name).is_file() for name in (CHECKPOINT, PREVIOUS)):
        raise BadInput(f"--resume: there is no {args.out / CHECKPOINT}")
    if getattr(args, "judge", "") == "reward" and not args.reward:
        raise BadInput("--judge reward needs --reward DIR; python train.py --loss reward_model makes one")
    if getattr(args, "judge", "") == "scene" and LOSSES[args.loss].advantages:
        raise BadInput("--judge scene compares answers, it does not score them: reinforcement needs another")
    if getattr(args, "judge", "") == "server" and not (args.server and args.server_model):
        raise BadInput("--judge server needs --server URL and --server-model NAME")
    if args.reference_cache and not uses_reference(LOSSES[args.loss]):
        raise BadInput(f"--reference-cache: {args.loss} has no reference")
    if getattr(args, "offline", 0) and not LOSSES[args.loss].pairs:
        raise BadInput(f"--offline {args.offline}: {args.loss} has no given pairs, mixed_dpo does")
    looks = getattr(args, "judge", "clip") == "clip"  # fisao and bdhs_online have no judge, and a CLIP
    if "clip_model" in args and looks and args.clip_model is None:
        raise BadInput(f"{args.loss} needs --clip-model DIR: the embedded CLIP knows scenes only")
    for name in ("objects", "baselines"):
        if (path := getattr(args, name, None)) and not path.is_file():
            raise BadInput(f"--{name} {path}: no such file")
    fixed = not (LOSSES[args.loss].online or LOSSES[args.loss].advantages)
    if args.reference_cache and (not fixed or any(":" in s[0] for s in LOSSES[args.loss].sequences.values())):
        raise BadInput(f"--reference-cache: what {args.loss} scores is drawn anew at every step")


def check_places(args: argparse.Namespace) -> None:
    """Refuse an --out that holds an earlier run, and places that cannot be written. Raises BadInput."""
    earlier = [name for name in (CHECKPOINT, PREVIOUS, "result.json", "model") if (args.out / name).exists()]
    if earlier and not (args.resume or args.overwrite):
        raise BadInput(f"{args.out} holds {earlier[0]} of an earlier run: choose another --out, go on with"
                       " --resume or replace it with --overwrite")
    for folder in (args.out, *([args.reference_cache.parent] if args.reference_cache else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = "a file is there" if folder.is_file() else error.strerror
            raise BadInput(f"{folder}: cannot write into this folder ({reason})") from None


# ------------------------------------------------------------------------------------------------ set-up


def start_processes(world: int) -> torch.device:
    """The device; joins the process group when torchrun started several of us."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:  # rank 0 may spend a while making pairs or evaluating
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return device


def emulates_bf16(device: torch.device) -> bool:
    """Whether it is an x86 CPU without instructions for bf16, where fp32 is many times faster."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return device.type == "cpu" and x86 and not (torch.cpu._is_avx512_bf16_supported()
                                                 or torch.cpu._is_amx_tile_supported())


def load_policy(args: argparse.Namespace, device: torch.device):
    """The model, with what trains marked: adapters (and the projector), or decoder and projector in full."""
    full = args.lora_rank == 0
    dtype = torch.bfloat16 if args.precision == "bf16" and not full else torch.float32
    model = load_llava(args.model, dtype, device)
    merge_lora(model)  # a folder of adapters is a starting point like any other
    model.requires_grad_(False)
    torch.manual_seed(args.seed)  # the same adapters in every process
    if full:
        model.language_model.requires_grad_(True)
    else:
        add_lora(model.language_model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    if full or args.train_projector:
        model.multi_modal_projector.float().requires_grad_(True)
    model.language_model.model.checkpointing = args.checkpointing
    return model


def find_records(args, recipe: Recipe, model, processor, rank: int, world: int) -> tuple[list[dict], Path]:
    """(records, folder that their paths start from): those of --data, or made from scenes and kept in --out.

    Only a resumed run uses what --out holds: a new one may have another seed, method or model.
    """
    path = args.data or args.out / "pairs.jsonl"
    if args.data is None and not (args.resume and path.exists()) and rank == 0:
        write_jsonl(path, make_records(args, recipe, model, processor))
    if world > 1:
        dist.barrier()
    data = read_records(path, recipe)
    if args.data is None:
        check_texts(args, recipe, processor, data, path, rank)
    elif rank == 0:
        print(f"--data {path}: {len(data.records):,} records, read as {data.format}", flush=True)
    if len(data.records) < args.batch_size:
        raise BadInput(f"{path}: {len(data.records)} records are fewer than one batch of {args.batch_size}"
                       " (--batch-size)")
    return data.records, data.root


def make_records(args, recipe: Recipe, model, processor) -> list[dict]:
    """Pairs of scenes by the loss's method, or the scenes themselves with the question about them."""
    first = scenes.PAIRS + args.seed % 10 * SCENES_OF_A_SEED  # never reaches the scenes of dev and test
    seeds = range(first, first + args.scenes)
    if not recipe.pairs:
        return [{"id": f"scene-{seed}", "image": scenes.reference(seed), "prompt": scenes.CAPTION_PROMPT}
                for seed in seeds]
    clip, clip_processor = load_clip(DEFAULT_CLIP, device=model.device), ClipProcessor(DEFAULT_CLIP)
    records, report = make_pairs(
        args.pairs or recipe.pairs, model, processor, clip, clip_processor,
        scene_seeds=seeds, seed=args.seed * SCENES_OF_A_SEED, folder=args.out / "pictures", root=args.out,
    )
    print(f"pairs: {json.dumps(report)}", flush=True)
    return records


def read_records(path: Path, recipe: Recipe) -> Data:
    """Validated records with what this loss reads; pictures and questions only if it samples everything."""
    command = f"python generate_pairs.py --method {recipe.pairs}"
    hints = {"rejected": f"{command} --images {path} makes pairs",
             "rejected_image": f"{command} --pairs {path} adds one"}
    needs = fields_of(recipe.sequences) - {"generated"} if recipe.pairs else ()
    return load(path, needs=needs, hints=hints, answers=bool(recipe.pairs))


def check_texts(args, recipe: Recipe, processor, data: Data, path: Path, rank: int) -> None:
    """Name all records that the tokenizer or the decoder's window would refuse later. Raises BadInput."""
    samples = recipe.online or recipe.advantages
    about = dict(root=data.root, source=path, progress="checking texts" * (rank == 0))
    check_records(data.records, processor, **about, sequences=recipe.sequences if recipe.pairs else None,
                  end=recipe.asks_for("chosen_rewards"),
                  new_tokens=args.max_new_tokens if samples else 0)
    if getattr(args, "judge", "") == "reward":  # reads each answer with one more token behind it
        check_records(data.records, reward_processor(args), **about, new_tokens=args.max_new_tokens + 1)


def make_scorer(args, recipe: Recipe, model) -> torch.nn.Module:
    """What turns a batch into the numbers that the loss asks for, with all that trains inside."""
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    if recipe.asks_for("chosen_rewards"):
        return RewardModel(model, autocast)
    return Scorer(model, autocast, critic=recipe.asks_for("values"))


def make_judge(args, model, processor, root: Path):
    """(records, answers) -> a judgement for each answer (pairs/rank.py)."""
    if args.judge == "scene":
        return one_by_one(judge_scene)
    if args.judge == "clip":
        return clip_judge(load_clip(args.clip_model, device=model.device), ClipProcessor(args.clip_model),
                          root=root)
    if args.judge == "reward":
        half = torch.bfloat16 if args.precision == "bf16" else None
        reward = load_reward_model(args.reward, half or torch.float32, model.device, autocast=half)
        return reward_judge(reward, reward_processor(args), root)
    server = server_model(Server(args.server, args.server_model), cache=args.out / "replies", root=root)
    return model_judge(server, seed=args.seed)


def reward_processor(args) -> Processor:
    """How the reward model of --reward reads pictures and texts."""
    config = read_json(args.reward / "config.json")
    if not all(isinstance(config.get(key, 0), str | None) for key in ("template", "aspect")):
        raise BadInput(f"{args.reward / 'config.json'}: template and aspect are to be names, or null")
    return Processor(args.reward / "model", template=config["template"], aspect=config["aspect"])


@dataclass
class Run:
    """What every step needs."""

    args: argparse.Namespace
    recipe: Recipe
    model: torch.nn.Module
    processor: Processor
    records: list[dict]
    root: Path
    rank: int
    world: int
    device: torch.device
    scorer: torch.nn.Module  # wrapped in DDP with several processes
    reference: Reference | None
    optimizer: torch.optim.Optimizer
    cache: dict | None = None  # the reference's log-probs by record, if they are kept on disk
    helper: Callable | None = None  # judge, verifier or similarity of the losses that sample
    state: dict = field(default_factory=dict)  # plain numbers that belong to the checkpoint
    identity: dict = field(default_factory=dict)  # of records and model: a resumed run must have the same

    @property
    def plain(self) -> torch.nn.Module:
        """The scorer itself."""
        return self.scorer.module if isinstance(self.scorer, DistributedDataParallel) else self.scorer

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.plain.parameters() if p.requires_grad]

    def options(self, function: Callable) -> dict:
        """The settings that are keyword arguments of a function."""
        return {name: getattr(self.args, name) for name in loss_options(function)}


# ------------------------------------------------------------------------------------------------ one step


def score(run: Run, batch: Batch) -> dict[str, torch.Tensor]:
    """All that a loss may ask for, by argument name: `policy_chosen_logps`, `chosen_mask`, `chosen_rewards`."""
    packed = batch.packed.to(run.device)
    features = run.model.vision_features(batch.pixels.to(run.device, non_blocking=True))  # (tiles, P, C)
    if isinstance(run.plain, RewardModel):
        rows = run.scorer(packed, features).chunk(len(batch.names))
        return {f"{name}_rewards": rewards for name, rewards in zip(batch.names, rows)}
    if batch.noisy is not None:
        choose_labels(run, batch, packed, features)
    offer = batch.changed() if run.recipe.asks_for("chosen_changed") else {}
    offer = {name: rows.to(run.device) for name, rows in offer.items()}
    if run.reference is not None:
        if run.cache is not None:
            rows = [run.cache[f"{name}/{i}"] for name in batch.names for i in batch.ids]
            expected = pad_sequence(rows, batch_first=True).to(run.device)
        else:
            with run.reference():
                if batch.noisy is not None and batch.noisy_own:
                    mine = packed.labels.clone()
                    choose_labels(run, batch, packed, features)
                expected = run.plain(packed, features)[0]
                if batch.noisy is not None and batch.noisy_own:
                    packed.labels = mine
        offer |= by_name("reference", batch.names, expected)
    policy, mask, *_ = run.scorer(packed, features)
    offer |= by_name("policy", batch.names, policy)
    return offer | {f"{name}_mask": rows for name, rows in zip(batch.names, mask.chunk(len(batch.names)))}


def choose_labels(run: Run, batch: Batch, packed, features: torch.Tensor) -> None:
    """Make the tokens that the model likes best under the noisy picture the labels of the noisy sequence."""
    run.model.eval()  # the choice is the model's, not its dropout's
    packed.labels[batch.noisy_labels] = run.plain.likeliest(batch.noisy.to(run.device), features)
    run.model.train()


def pairs_step(run: Run, batches: list[Batch], log: Log) -> torch.Tensor:
    """Forward, loss and backward of each micro-batch, then one update. Returns the gradient norm."""
    options = run.options(run.recipe.loss)
    for i, batch in enumerate(batches):
        hold_back(run, i + 1 < len(batches))
        losses, metrics = run.recipe.loss(**asked(run.recipe.loss, score(run, batch)), **options)
        weights = batch.weights.to(run.device) if batch.weights is not None else None
        mean = losses.mean() if weights is None else (losses * weights).mean()
        (mean / len(batches)).backward()
        log.add({"loss": losses, **metrics}, len(batch.packed.ids), weights)
    return update(run)


def online_batches(run: Run, picked: list[list[tuple[dict, int]]]) -> list[Batch]:
    """Let the policy write the records of this step (pairs/online.py)."""
    batches, options = [], run.options(run.recipe.online)
    for part in picked:
        records, seeds = [record for record, _ in part], [seed for _, seed in part]
        made = run.recipe.online(records, seeds, run.model, run.processor, run.root, run.helper, **options)
        batches.append(collate(made, run.recipe.sequences, run.processor, run.root, seeds))
    return batches


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


# ------------------------------------------------------------------------------------------------ the run


def prepare(args, recipe: Recipe, model, processor, records, root, rank: int, world: int, device) -> Run:
    """Scorer, optimiser, reference and helpers around the model."""
    scorer = make_scorer(args, recipe, model)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    reference = Reference(model) if uses_reference(recipe) else None  # it may hold a copy of the weights
    run = Run(args, recipe, model, processor, records, root, rank, world, device,
              DistributedDataParallel(scorer) if world > 1 else scorer, reference, optimizer)
    run.identity = identity(args.model, records, processor)
    run.helper = make_helper(run)
    if args.reference_cache:
        run.cache = reference_cache(run)
    return run


def announce(run: Run, config: dict, saved: dict | None) -> None:
    """Say what runs, write it to config.json, and take away what an earlier run left."""
    args = run.args
    facts = {"processes": run.world, "device": str(run.device),
             "trained_parameters": sum(p.numel() for p in run.trained)}
    print(json.dumps({**config, **facts}, indent=1), flush=True)
    if saved and saved["config"]["steps"] != args.steps:
        print(f"steps {saved['config']['steps']} -> {args.steps}: the cosine now ends at {args.steps}", flush=True)
    if args.precision == "bf16" and emulates_bf16(run.device):
        print("warning: this CPU has no bf16 instructions, --precision fp32 is many times faster", file=sys.stderr)
    if saved and saved["path"].name == PREVIOUS:  # a damaged one must not become the former of the next
        os.replace(saved["path"], args.out / CHECKPOINT)
    save_json({**config, "versions": versions()}, args.out / "config.json")
    for name in ("result.json", *(() if saved else (CHECKPOINT, PREVIOUS))):
        (args.out / name).unlink(missing_ok=True)


def make_helper(run: Run) -> Callable | None:
    """Who judges the samples of this loss, if it samples: what its functions ask for by name."""
    args, device = run.args, run.device
    if run.recipe.asks_for("verifier"):
        return Verifier(load_clip(args.clip_model, device=device), ClipProcessor(args.clip_model),
                        run.processor, run.root, KnownObjects(args.objects))
    if run.recipe.asks_for("similarity"):
        return clip_similarity(load_clip(args.clip_model, device=device), ClipProcessor(args.clip_model))
    return make_judge(args, run.model, run.processor, run.root) if run.recipe.asks_for("judge") else None


def reference_cache(run: Run) -> dict[str, torch.Tensor]:
    """The reference's log-probs of every record that can be used, computed once and kept in --reference-cache."""
    args, path = run.args, run.args.reference_cache
    key = reference.fingerprint(args.model, run.records, run.recipe.sequences, run.processor, args.precision)
    rows = reference.read(path, key) if path.exists() else {}
    missing = [record for record in run.records
               if any(f"{name}/{record['id']}" not in rows for name in run.recipe.sequences)]
    if not missing:
        return rows
    run.model.eval()
    make = partial(collate_with, run.recipe, run.processor, run.root, seeds=None)
    share, bad, rows = missing[run.rank :: run.world], [], {} if run.rank else rows
    for start in tqdm(range(0, len(share), args.micro_batch_size), desc="reference",
                      disable=True if run.rank else None):
        batch, refused = without_bad(share[start : start + args.micro_batch_size], make)
        bad += refused
        if batch is None:
            continue
        with run.reference():
            features = run.model.vision_features(batch.pixels.to(run.device))
            logps, mask, *_ = run.plain(batch.packed.to(run.device), features)
        names = [f"{name}/{i}" for name in batch.names for i in batch.ids]
        rows |= {name: row[m].cpu() for name, row, m in zip(names, logps, mask)}
    reference.write(path, rows, key, run.rank, run.world)
    refuse(args, of_all(bad, run.world))
    return reference.read(path, key)


def of_all(bad: list[BadRecord], world: int) -> list[BadRecord]:
    """The bad records that any process has met, the same list in all. A collective call."""
    if world == 1:
        return bad
    count = torch.tensor([len(bad)])
    dist.all_reduce(count)
    if not count:
        return bad
    found: list = [None] * world
    dist.all_gather_object(found, bad)
    return sum(found, [])


def refuse(args, bad: list[BadRecord], advice: str = "mend it, or leave it out with --bad-records skip") -> None:
    """With --bad-records stop, raise one BadInput that lists these records and says how to go on."""
    if bad and args.bad_records == "stop":
        raise BadInput("\n".join(map(str, bad)) + f"; {advice}")


def draw(run: Run, loader, parts: int) -> tuple[list, list[BadRecord]]:
    """The micro-batches of a step, and the bad records that any process met. A collective call."""
    drawn = [next(loader) for _ in range(parts)]
    return [part.batch for part in drawn], of_all([record for part in drawn for record in part.bad], run.world)


def replaced(run: Run, bad: list[BadRecord]) -> bool:
    """With --bad-records skip, note whose places others have taken; False when nobody is left to take them."""
    known = run.state.setdefault("bad_records", {})
    for record in bad:
        if record.name not in known and run.rank == 0:
            tqdm.write(f"{record}; another record takes its place")
        known[record.name] = record.reason
    return len(known) < len(run.records)


def keep(run: Run, done: int, norm: torch.Tensor | None, config: dict, log: Log) -> None:
    """Save a checkpoint; BadInput when the last gradient, the same in every process, was not finite. A collective
    call."""
    if norm is not None and not math.isfinite(norm.item()):
        raise BadInput(f"step {done}: the gradient is not finite; {run.args.out / CHECKPOINT} keeps the last good"
                       " state")
    unfinished = log.unfinished()
    if run.rank == 0:
        save_checkpoint(run.args.out, run, done, config, unfinished)


def give_up(run: Run, bad: list[BadRecord], path: Path, done: int) -> None:
    """Raise BadInput in all processes, once the first has saved the checkpoint."""
    if run.world > 1:
        dist.barrier()  # torchrun ends all as soon as one has failed
    refuse(run.args, bad, f"{path} holds the {done} finished steps: go on with --resume, and with the image mended"
                          " or --bad-records skip")
    raise BadInput(f"none of the {len(run.records)} records can be used; {bad[-1]}")


def step_figures(run: Run, norm: torch.Tensor, done: int) -> dict[str, float]:
    """What the log says of a step beside its metrics."""
    bad = {"bad_records": len(run.state["bad_records"])} if "bad_records" in run.state else {}
    return {"grad_norm": norm.item(), "lr": learning_rate(run.args, done - 1), **bad}


def train(run: Run, config: dict, saved: dict | None) -> bool:
    """Run the steps that are left, all without `saved`. False when interrupted; the checkpoint then holds all that
    are done."""
    args, recipe = run.args, run.recipe
    start = saved["step"] if saved else 0
    if saved:
        restore(saved, run)
    parts = args.batch_size // (run.world * args.micro_batch_size)
    samples = recipe.online or recipe.advantages
    make = partial(collate_with, recipe, run.processor, run.root)
    data = MicroBatches(run.records, batch_size=args.batch_size, parts=parts, rank=run.rank, world=run.world,
                        seed=args.seed, steps=args.steps, skip=args.bad_records == "skip",
                        make=partial(with_seeds, root=run.root) if samples else make)
    if recipe.advantages and not start:
        reinforce.calibrate(run)
    log, stop, done, norm = Log(run, saved), StopRequest(run.world), start, None
    # Behind StopRequest, whose signal handlers the loader's processes inherit: Ctrl-C must not end them.
    loader = iter(DataLoader(data, batch_size=None, sampler=range(start * parts, len(data)),
                             num_workers=args.workers, pin_memory=run.device.type == "cuda" and not samples))
    run.model.train(not recipe.advantages)  # pi_old and pi must be the same function: no dropout
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.loss,
                     disable=True if run.rank else None):
        torch.manual_seed(hash((args.seed, step, run.rank)))  # dropout; integers always hash alike
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        drawn, bad = draw(run, loader, parts)
        if bad and (args.bad_records == "stop" or not replaced(run, bad)):
            keep(run, done, norm, config, log)
            stop.close()
            give_up(run, bad, args.out / CHECKPOINT, done)
        if recipe.advantages:
            norm = reinforce.reinforce_step(run, drawn, step, log)
        else:
            norm = pairs_step(run, online_batches(run, drawn) if recipe.online else drawn, log)
        done = step + 1
        halt = stop.asked()
        if done % args.log_every == 0 or done == args.steps:
            log.write(done, step_figures(run, norm, done))
        if halt or done % args.save_every == 0 or done == args.steps:
            keep(run, done, norm, config, log)
        if halt and done < args.steps:
            break
    stop.close()
    run.model.eval()
    return done == args.steps


def collate_with(recipe: Recipe, processor, root, records: list[dict], seeds: list[int]) -> Batch:
    """`collate` for a loss; at the top level, so that the loader's processes can have it."""
    return collate(records, recipe.sequences, processor, root, seeds,
                   end=recipe.asks_for("chosen_rewards"))


def measure(args, model, processor) -> dict[str, float]:
    """Hallucination on held-out scenes; every figure in percent, `words` the mean length of a caption."""
    first = evaluate.FIRST_SEED[args.eval_split]
    seeds = range(first, first + args.eval_scenes)
    captions = evaluate.evaluate_chair(model, processor, seeds, progress="captions")
    asked = [row for row in evaluate.pope_scenes(seeds) if row["split"] not in evaluate.CONTROLS]
    yes_no = evaluate.evaluate_pope(model, processor, asked, progress="POPE")
    figures = {"CHAIR_s": 100 * captions["chair_s"], "CHAIR_i": 100 * captions["chair_i"],
               "recall": 100 * captions["recall"], "words": captions["words"]}
    return figures | {f"POPE {name}": 100 * split["accuracy"] for name, split in yes_no["splits"].items()}


def measure_rewards(run: Run, held: list[dict]) -> dict[str, float]:
    """How often, in percent, the reward model scores the chosen answer of a held-out pair higher."""
    right = []
    make = partial(collate_with, run.recipe, run.processor, run.root, seeds=None)
    for start in range(0, len(held), run.args.micro_batch_size):
        batch, bad = without_bad(held[start : start + run.args.micro_batch_size], make)
        refuse(run.args, bad)
        if batch is None:
            continue
        with torch.no_grad():
            features = run.model.vision_features(batch.pixels.to(run.device))
            chosen, rejected = run.plain(batch.packed.to(run.device), features).chunk(2)
        right += (chosen > rejected).tolist()
    return {"accuracy": 100 * sum(right) / max(1, len(right))}


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, side by side."""
    lines = [f"{'':18}{'before':>9}{'after':>9}"]
    return "\n".join(lines + [f"{name:18}{before[name]:9.1f}{after[name]:9.1f}" for name in before])


def main(argv: list[str] | None = None) -> int:
    """From the command line to --out; 0 when finished, 1 when interrupted. Raises BadInput on bad input."""
    args, started = read_arguments(argv), time.perf_counter()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(args, world)  # before processes wait for each other
    check_places(args)
    recipe = LOSSES[args.loss]
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
              if k not in ("resume", "overwrite")}
    saved = read_checkpoint(args.out, config, rank) if args.resume else None
    device = start_processes(world)
    processor = Processor(args.model, template=args.template, aspect=args.aspect)
    if args.data:  # bad records are named before a large model is loaded
        check_texts(args, recipe, processor, read_records(args.data, recipe), args.data, rank)
    model = load_policy(args, device)
    records, root = find_records(args, recipe, model, processor, rank, world)
    held, rewards = [], recipe.asks_for("chosen_rewards")
    if rewards:
        count = max(1, len(records) // 10)
        held, records = records[:count], records[count:]
    run = prepare(args, recipe, model, processor, records, root, rank, world, device)
    if saved:
        refuse_other(saved, run)
    if rank == 0:
        announce(run, config, saved)
    scene_world = args.eval_scenes > 0 and all(r["image"].startswith("scene:") for r in records)
    figures = (partial(measure_rewards, run, held) if held else
               partial(measure, args, model, processor) if scene_world else dict)
    before = figures() if rank == 0 else {}
    finished = train(run, config, saved)
    if rank == 0 and finished:
        save_llava(model, args.out / "model", args.model)
        if args.lora_rank:
            save_adapters(model, args.out / "adapters", args.model)
        if rewards:
            save_reward_head(run.plain, args.out)
        if "scores" in run.state:
            panels = reinforce.panels(run.state["scores"], reinforce.look_at_scores(run), run.helper.unit)
            if panels:  # answers without object words give no scores to draw
                write_histograms(args.out / "scores.svg", panels)
        after = figures()
        minutes = (time.perf_counter() - started) / 60
        result = {"config": config, "before": before, "after": after, "minutes": minutes}
        if bad := run.state.get("bad_records"):
            result["bad_records"] = bad
            print(f"bad records, whose places others took: {len(bad)}; result.json lists them")
        save_json(result, args.out / "result.json")
        print(table(before, after) if before else "")
        print(f"{args.out}/model written, {minutes:.1f} minutes")
    elif rank == 0:
        print(f"interrupted; go on with --resume --out {args.out}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0 if finished else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BadInput, ConnectionError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
