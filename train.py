"""Align a LLaVA-type model with preference pairs.

    torchrun train.py --loss adavip                                     the embedded model, one process
    torchrun --nproc-per-node 2 train.py --loss dpo                     two processes, same losses
    python train.py --loss rdpo --steps 20                              without torchrun
    python train.py --loss adavip --data pairs.jsonl --model DIR        your pairs, your llava-hf checkpoint
    python train.py --loss adavip --out runs/adavip --resume            go on after an interruption
    python train.py --loss dpo --help                                   the options of one loss

With no --data it makes its pairs from the scene world (data/scenes.py), with the method that fits the loss,
and as long as the pictures are scenes it measures hallucination on held-out scenes before and after: CHAIR_s
(share of captions that mention an absent object), CHAIR_i (share of mentions that are of absent objects),
recall (share of present objects that are mentioned) and POPE (accuracy of yes / no answers).

One step: records -> batch (data/batch.py) -> token log-probs of policy and reference (model/logprobs.py) ->
loss (losses/) -> AdamW. The reference is the model itself with its adapters off. A loss is a pure function;
its argument names say which log-probs it gets, its keyword arguments become options here (--beta, ...).

--out receives: config.json (the resolved configuration), pairs.jsonl (if made here), metrics.jsonl (one line
an interval), checkpoint.pt (to resume), model/ (llava-hf folder, adapters merged), result.json (before and
after).
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import typing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import evaluate
import generate_pairs
from data import scenes
from data.batch import MicroBatches, fields_of
from data.processor import ClipProcessor, Processor
from data.records import read_pairs, write_jsonl
from losses import adavip, dpo, rdpo, sft
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava, save_json, save_llava
from model.logprobs import Scorer
from model.lora import Reference, add_lora

# name -> (loss function, sequences it needs scored, method of pairs/ that makes fitting data)
LOSSES = {
    "sft": (sft.sft_loss, sft.SEQUENCES, "rank"),
    "dpo": (dpo.dpo_loss, dpo.SEQUENCES, "rank"),
    "rdpo": (rdpo.rdpo_loss, rdpo.SEQUENCES, "realign"),
    "rdpo_released": (rdpo.rdpo_loss, rdpo.SEQUENCES_RELEASED, "realign"),
    "adavip": (adavip.adavip_loss, adavip.SEQUENCES, "adavip"),
}
# The embedded model is small and its answers are short, so it takes larger steps and a stronger pull towards
# the reference than the models of the papers; chosen on the dev split. With --model the defaults are those in
# brackets.
EMBEDDED = {"lr": 1e-3, "beta": 1.0}

# Settings that may change when a run is resumed: they touch nothing that is computed.
HARMLESS = {"out", "workers", "log_every", "save_every", "eval_scenes", "eval_split"}
SCENES_OF_A_SEED = 100_000  # pairs of ten seeds fit below the scenes of the dev and test splits


# -------------------------------------------------------------------------------------------------- arguments


def read_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line -> settings. The options of the chosen loss are those of its function."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", choices=LOSSES, default="adavip", help="(default: %(default)s)")
    first.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR",
                       help="llava-hf folder (default: model/tiny)")
    known, _ = first.parse_known_args(argv)
    embedded = EMBEDDED if known.model.resolve() == DEFAULT_MODEL.resolve() else {}
    parser = argparse.ArgumentParser(
        description=__doc__, parents=[first], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="pair records; left out, pairs are made from scenes")
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/LOSS)")
    add("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    add("--steps", type=int, default=60, help="optimiser steps (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="pairs a step, over all processes (default: %(default)s)")
    add("--micro-batch-size", type=int, help="pairs a forward pass and process (default: all of the process)")
    add("--lr", type=float, default=1e-6, help="peak learning rate (default: 1e-3, with --model 1e-6)")
    add("--warmup", type=float, default=0.1, help="share of steps with rising rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--lora-rank", type=int, default=32, help="0: decoder and projector in full (default: %(default)s)")
    add("--lora-alpha", type=float, help="(default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, help="(default: %(default)s)")
    add("--train-projector", action="store_true", help="with LoRA, train the projector too")
    add("--precision", choices=("fp32", "bf16"), help="(default: bf16 on CUDA, else fp32)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--seed", type=int, default=0, help="of scenes, sampling, adapters and order (default: %(default)s)")
    add("--scenes", type=int, default=600, help="scenes that pairs are made from (default: %(default)s)")
    add("--eval-scenes", type=int, default=300, help="held-out scenes, 0 for none (default: %(default)s)")
    add("--eval-split", choices=("test", "dev"), default="test",
        help="choose settings on dev (default: %(default)s)")
    add("--log-every", type=int, default=5, help="steps between log lines (default: %(default)s)")
    add("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches (default: %(default)s)")
    options = parser.add_argument_group(f"options of {known.loss}")
    own = loss_options(LOSSES[known.loss][0])
    for name, (kind, default) in own.items():
        tuned = f"{embedded[name]}, with --model {default}" if name in embedded else default
        options.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default,
                             help=f"(default: {tuned})")
    parser.set_defaults(**{name: value for name, value in embedded.items() if name in {"lr", *own}})
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.loss
    args.lora_alpha = args.lora_alpha or 2.0 * args.lora_rank
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    return args


def loss_options(function) -> dict[str, tuple[type, object]]:
    """Keyword-only arguments of a loss: name -> (type, default)."""
    types = typing.get_type_hints(function)
    keywords = (p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY)
    return {p.name: (types[p.name], p.default) for p in keywords}


def check(args: argparse.Namespace, world: int) -> None:
    """Refuse impossible settings before anything is loaded. Raises ValueError."""
    if args.micro_batch_size is None:
        args.micro_batch_size = max(1, args.batch_size // world)
    for name in ("steps", "batch_size", "micro_batch_size", "log_every", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch_size % (world * args.micro_batch_size):
        raise ValueError(f"--batch-size {args.batch_size} is not a multiple of {world} processes"
                         f" x micro-batch {args.micro_batch_size}")
    if args.data is None and args.scenes > SCENES_OF_A_SEED:
        raise ValueError(f"--scenes {args.scenes} is more than the {SCENES_OF_A_SEED} of a seed")
    if args.resume and not (args.out / "checkpoint.pt").is_file():
        raise ValueError(f"--resume: there is no {args.out / 'checkpoint.pt'}")


# ------------------------------------------------------------------------------------------------ set-up


def start_processes() -> tuple[int, int, torch.device]:
    """(rank, number of processes, device); joins the process group when torchrun started us."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:  # rank 0 may spend a while making pairs or evaluating
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))
    return rank, world, device


def load_policy(args: argparse.Namespace, device: torch.device):
    """The model, with what trains marked: adapters (and the projector), or decoder and projector in full."""
    full = args.lora_rank == 0
    dtype = torch.bfloat16 if args.precision == "bf16" and not full else torch.float32
    model = load_llava(args.model, dtype, device)
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


def find_pairs(
    args, method: str, needs: set[str], model, processor, rank: int, world: int
) -> tuple[list[dict], Path]:
    """(records, folder that their paths start from): those of --data, or made from scenes and kept in --out.

    Only a resumed run uses what --out holds: a new one may have another seed, method or model.
    """
    path = args.data or args.out / "pairs.jsonl"
    if args.data is None and not (args.resume and path.exists()) and rank == 0:
        first = scenes.PAIRS + args.seed % 10 * SCENES_OF_A_SEED  # never reaches the scenes of dev and test
        clip, clip_processor = load_clip(DEFAULT_CLIP, device=model.device), ClipProcessor(DEFAULT_CLIP)
        records, report = generate_pairs.make_pairs(
            method, model, processor, clip, clip_processor,
            scene_seeds=range(first, first + args.scenes), seed=args.seed * SCENES_OF_A_SEED,
        )
        write_jsonl(path, records)
        print(f"pairs: {json.dumps(report)}", flush=True)
    if world > 1:
        dist.barrier()
    records = read_pairs(path, needs)
    if len(records) < args.batch_size:
        raise ValueError(f"{path}: {len(records)} pairs are fewer than one batch of {args.batch_size}")
    return records, path.parent


# ------------------------------------------------------------------------------------------------ one step


def score(scorer, model, reference: Reference, batch, device, needs_reference: bool) -> tuple:
    """Token log-probs (N, L) of policy and, if needed, reference, and their mask; one vision tower pass."""
    packed = batch.packed.to(device)
    features = model.vision_features(batch.pixels.to(device, non_blocking=True))  # (M, P, C)
    expected = None
    if needs_reference:
        plain = scorer.module if isinstance(scorer, DistributedDataParallel) else scorer
        with reference():
            expected, _ = plain(packed, features)
    policy, mask = scorer(packed, features)
    return policy, expected, mask


def loss_arguments(function, names: list[str], policy, reference, mask) -> dict:
    """What the signature of a loss asks for, by name: `policy_chosen_logps`, `chosen_mask`, ..."""
    offer = {}
    for who, logps in (("policy", policy), ("reference", reference)):
        if logps is None:
            continue
        for name, rows in zip(names, logps.chunk(len(names))):
            offer[f"{who}_{name}_token_logps"] = rows  # (B, L)
            offer[f"{who}_{name}_logps"] = rows.sum(-1)  # (B,)
    for name, rows in zip(names, mask.chunk(len(names))):
        offer[f"{name}_mask"] = rows  # (B, L)
    asked = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return {name: offer[name] for name in asked}


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = max(1, round(args.warmup * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup)))


# ---------------------------------------------------------------------------------------------- state on disk


def save_checkpoint(path: Path, model, optimizer, step: int, config: dict) -> None:
    """Everything that a resumed run needs; order of data and dropout follow from seed and step."""
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    temporary = path.with_name(path.name + ".tmp")
    state = {"step": step, "trained": trained, "optimizer": optimizer.state_dict(), "config": config}
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, model, optimizer, config: dict, device) -> int:
    """Restore weights and optimiser; returns the next step. ValueError if the run was set up differently."""
    state = torch.load(path, map_location=device, weights_only=True)
    different = [k for k in config if k not in HARMLESS and config[k] != state["config"].get(k)]
    if different:
        pairs = ", ".join(f"{k} was {state['config'].get(k)!r}, is {config[k]!r}" for k in different)
        raise ValueError(f"{path} belongs to another run: {pairs}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state["trained"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


class Log:
    """Sums metrics on the device, and once an interval writes one JSON line and one console line (rank 0)."""

    def __init__(self, args: argparse.Namespace, rank: int, world: int, device: torch.device, start: int):
        self.args, self.rank, self.world, self.device = args, rank, world, device
        self.path = args.out / "metrics.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.count = self.tokens = 0
        self.started, self.first = time.perf_counter(), start
        self.since = self.started
        if rank == 0:  # drop lines behind the checkpoint that this run goes on from
            old = self.path.read_text().splitlines() if start and self.path.exists() else []
            self.path.write_text("".join(f"{x}\n" for x in old if json.loads(x)["step"] <= start))

    def add(self, metrics: dict[str, torch.Tensor], tokens: int) -> None:
        for name, value in metrics.items():
            value = value.detach().float().mean()
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1
        self.tokens += tokens

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Average over steps and processes since the last call."""
        values = torch.stack(list(self.sums.values())) / self.count
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(self.sums, (values / self.world).tolist()))
        now = time.perf_counter()
        line |= extra | {
            "tokens/s": self.tokens * self.world / (now - self.since),
            "eta_s": (now - self.started) / (step - self.first) * (self.args.steps - step),
            "peak_gib": peak_memory(self.device),
        }
        self.sums, self.count, self.tokens, self.since = {}, 0, 0, now
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
            text = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            tqdm.write(f"step {step}/{self.args.steps}  {text}")


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ------------------------------------------------------------------------------------------------ the run


def train(args, model, processor, records, root, rank: int, world: int, device, config: dict) -> bool:
    """Run the steps that are left. False when interrupted; the checkpoint then holds all finished steps."""
    function, sequences, _ = LOSSES[args.loss]
    hyper = {name: getattr(args, name) for name in loss_options(function)}
    needs_reference = any(name.startswith("reference_") for name in inspect.signature(function).parameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay)
    reference = Reference(model) if needs_reference else None  # it may hold a copy of the weights
    path = args.out / "checkpoint.pt"
    start = load_checkpoint(path, model, optimizer, config, device) if args.resume else 0
    scorer = Scorer(model, torch.bfloat16 if args.precision == "bf16" else None)
    if world > 1:
        scorer = DistributedDataParallel(scorer)
    parts = args.batch_size // (world * args.micro_batch_size)
    data = MicroBatches(records, sequences, processor, root, batch_size=args.batch_size, parts=parts,
                        rank=rank, world=world, seed=args.seed, steps=args.steps)
    log, stop, done = Log(args, rank, world, device, start), StopRequest(world), start
    # Behind StopRequest, whose signal handlers the loader's processes inherit: Ctrl-C must not end them.
    loader = iter(DataLoader(data, batch_size=None, sampler=range(start * parts, len(data)),
                             num_workers=args.workers, pin_memory=device.type == "cuda"))
    model.train()
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.loss,
                     disable=True if rank else None):
        torch.manual_seed(hash((args.seed, step, rank)))  # dropout; integers always hash alike
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        for part in range(parts):
            batch = next(loader)
            if world > 1:
                scorer.require_backward_grad_sync = part == parts - 1
            policy, expected, mask = score(scorer, model, reference, batch, device, needs_reference)
            logps = loss_arguments(function, batch.names, policy, expected, mask)
            losses, metrics = function(**logps, **hyper)
            (losses.mean() / parts).backward()
            log.add({"loss": losses, **metrics}, len(batch.packed.ids))
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            log.write(done, {"grad_norm": norm.item(), "lr": learning_rate(args, step)})
        halt = stop.asked()
        if halt or done % args.save_every == 0 or done == args.steps:
            if not math.isfinite(norm.item()):  # the same in every process
                raise ValueError(f"step {done}: the gradient is not finite; {path} keeps the last good state")
            if rank == 0:
                save_checkpoint(path, model, optimizer, done, config)
        if halt and done < args.steps:
            break
    stop.close()
    model.eval()
    return done == args.steps


class StopRequest:
    """Ctrl-C or SIGTERM ends the run after the current step, in all processes at the same one."""

    def __init__(self, world: int):
        self.world, self.flag = world, torch.zeros(1)
        handler = lambda *_: self.flag.fill_(1)  # noqa: E731
        self.before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def asked(self) -> bool:
        """A collective call: every process must make it."""
        if self.world > 1:
            dist.all_reduce(self.flag, dist.ReduceOp.MAX)  # a CPU tensor: no device synchronisation
        return bool(self.flag)

    def close(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


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


def table(before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, side by side."""
    lines = [f"{'':18}{'before':>9}{'after':>9}"]
    return "\n".join(lines + [f"{name:18}{before[name]:9.1f}{after[name]:9.1f}" for name in before])


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    rank, world, device = start_processes()
    started = time.perf_counter()
    check(args, world)
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "resume"}
    args.out.mkdir(parents=True, exist_ok=True)
    _, sequences, method = LOSSES[args.loss]
    if args.data:
        read_pairs(args.data, fields_of(sequences))  # bad records are named before a large model is loaded
    model, processor = load_policy(args, device), Processor(args.model)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        facts = {"processes": world, "device": str(device), "trained_parameters": count}
        print(json.dumps({**config, **facts}, indent=1))
        save_json(config, args.out / "config.json")
    records, root = find_pairs(args, method, fields_of(sequences), model, processor, rank, world)
    measured = args.eval_scenes > 0 and all(r["image"].startswith("scene:") for r in records)
    before = measure(args, model, processor) if measured and rank == 0 else {}
    finished = train(args, model, processor, records, root, rank, world, device, config)
    if rank == 0 and finished:
        save_llava(model, args.out / "model", args.model)
        after = measure(args, model, processor) if measured else {}
        minutes = (time.perf_counter() - started) / 60
        result = {"config": config, "before": before, "after": after, "minutes": minutes}
        save_json(result, args.out / "result.json")
        print(table(before, after) if measured else "")
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
    except ValueError as error:
        sys.exit(f"train.py: {error}")
