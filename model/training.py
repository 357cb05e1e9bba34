"""What every training run needs: its processes, the policy and its update, its log, its checkpoint, its orderly end.

    Policy           the model that trains, what scores with it, what it is compared with, its optimiser
    named, pick      log-probs by the names of a loss's arguments, and those that it asks for
    Log              metrics are summed on the device; one JSON line and one console line an interval
    save_checkpoint  everything that a resumed run needs, written atomically, the one before it kept
    read_checkpoint  the newest one that is undamaged, refused if it belongs to another run
    StopRequest      Ctrl-C or SIGTERM ends the run after the current step, in all processes at the same one

A run stopped or killed anywhere and resumed gives the same weights and the same log (but for its times) as an
uninterrupted one, bit for bit: the order of the data, samples and dropout follow from seed and step, so none of
them is part of the checkpoint; the sums since the last log line are.

torch.save writes a zip archive with a checksum of each member, which torch.load does not look at; here it is
verified before anything is read, with weights_only=True.

Shapes: B examples, L longest response, N = names x B sequences, n labels (model/logprobs.py).
"""

from __future__ import annotations

import inspect
import json
import math
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import BadInput, written_whole
from model.lora import Reference

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
CONTENT = {  # of a checkpoint
    "step": int,  # how many are done
    "config": dict,  # the settings
    "identity": dict,  # of records, model files and image handling (model/reference.py)
    "trained": dict,  # parameter name -> tensor
    "optimizer": dict,
    "bad_records": dict,  # name -> reason, of records that others have taken the place of
    "reinforcement": dict,  # what reinforcement remembers: plain numbers
    "log": dict,  # the interval that no line has been written for (`Log.unfinished`)
}
# Settings that may change when a run is resumed: they touch nothing that is computed, but for the number of
# steps, which the learning rate of those that are left then follows.
CHANGEABLE = {"out", "workers", "log_every", "save_every", "eval_scenes", "eval_split", "bad_records",
              "steps"}


# ---------------------------------------------------------------------------------------------- processes


def ranks() -> tuple[int, int]:
    """(this process's number, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start_processes(world: int) -> torch.device:
    """The device; joins the process group when torchrun started several of us."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # they may meet after days of making pairs or evaluating
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=30))
    return device


def gather_all(items: list, world: int) -> list:
    """The items of all processes, the same list in each. A collective call."""
    if world == 1:
        return items
    count = torch.tensor([len(items)])
    dist.all_reduce(count)
    if not count:  # as nearly always
        return items
    found: list = [None] * world
    dist.all_gather_object(found, items)
    return sum(found, [])


def emulates_bf16(device: torch.device) -> bool:
    """Whether it is an x86 CPU without instructions for bf16, where fp32 is many times faster."""
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return device.type == "cpu" and x86 and not (torch.cpu._is_avx512_bf16_supported()
                                                 or torch.cpu._is_amx_tile_supported())


# ------------------------------------------------------------------------------------ the policy, one step


@dataclass
class Policy:
    """The model that trains, and how it is scored, compared and updated."""

    model: nn.Module  # model.llava.Llava
    scorer: nn.Module  # model.logprobs.Scorer or model.reward.RewardModel, in DDP where there are several processes
    reference: Reference | None  # `with reference():` the model is as it was; None where nothing is compared
    optimizer: torch.optim.Optimizer
    clip_norm: float

    @property
    def plain(self) -> nn.Module:
        """The scorer itself."""
        return self.scorer.module if isinstance(self.scorer, DistributedDataParallel) else self.scorer

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name, in the optimiser's order."""
        return {name: p for name, p in self.plain.named_parameters() if p.requires_grad}

    def no_sync(self, more: bool) -> AbstractContextManager:
        """With several processes, exchange gradients only in the last backward of an update, that without `more`."""
        return self.scorer.no_sync() if more and isinstance(self.scorer, DistributedDataParallel) else nullcontext()

    def update(self) -> Tensor:
        """Clip, step, zero the gradients. Returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def named(who: str, names: list[str], scored: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a scorer returns, by the names of a loss's arguments.

    Args:
        who: "policy" or "reference".
        names: of the sequences; each is a block of rows.
        scored: token log-probs (N, L), and perhaps their mask and a critic's values, (N, L) each; or rewards (N,).
    Returns: `who_NAME_token_logps` (B, L), `who_NAME_logps` (B,), `NAME_mask` (B, L), `values` (N, L); or
        `NAME_rewards` (B,).
    """
    if isinstance(scored, Tensor):
        return {f"{name}_rewards": rewards for name, rewards in zip(names, scored.chunk(len(names)))}
    logps, *rest = scored
    inputs = {}
    for name, rows in zip(names, logps.chunk(len(names))):
        inputs[f"{who}_{name}_token_logps"] = rows
        inputs[f"{who}_{name}_logps"] = rows.sum(-1)
    if rest:
        inputs |= {f"{name}_mask": rows for name, rows in zip(names, rest[0].chunk(len(names)))}
    return inputs | ({"values": rest[1]} if len(rest) > 1 else {})


def pick(function: Callable, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the signature of a loss asks for; an argument with a default may be absent."""
    wanted = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return {p.name: inputs[p.name] for p in wanted if p.name in inputs or p.default is p.empty}


# -------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(out: Path, policy: Policy, **content) -> None:
    """Write checkpoint.pt; the former one becomes checkpoint-previous.pt. `content`: the rest of CONTENT."""
    trained = {name: p.detach() for name, p in policy.trained.items()}
    with written_whole(out / CHECKPOINT) as temporary:
        torch.save({**content, "trained": trained, "optimizer": policy.optimizer.state_dict()}, temporary)
        if (out / CHECKPOINT).exists():  # killed after this line: the former one is then the newest
            os.replace(out / CHECKPOINT, out / PREVIOUS)


def read_checkpoint(out: Path, config: dict, rank: int = 0) -> dict:
    """The newest undamaged checkpoint of a folder, on the CPU, with its `path`.

    Where checkpoint.pt is damaged, that is checkpoint-previous.pt, and rank 0 says so. Raises BadInput, one line
    naming the files, if none is whole or it belongs to a run of other settings.
    """
    problems = []
    for path in (out / CHECKPOINT, out / PREVIOUS):
        try:
            saved = load_whole(path) | {"path": path}
            break
        except BadInput as error:
            problems.append(str(error))
    else:
        raise BadInput("; ".join(problems))
    different = [k for k in config if k not in CHANGEABLE and config[k] != saved["config"].get(k)]
    if different:
        pairs = ", ".join(f"{k} was {saved['config'].get(k)!r}, is {config[k]!r}" for k in different)
        raise BadInput(f"{path} belongs to another run: {pairs}")
    if config["steps"] < saved["step"]:
        raise BadInput(f"--steps {config['steps']}: {saved['step']} are done already, says {path}")
    if problems and rank == 0:
        print(f"warning: {problems[0]}; going on from step {saved['step']} in {path}", file=sys.stderr)
    return saved


def load_whole(path: Path) -> dict:
    """A checkpoint whose every bit is as it was written. Raises BadInput, one line that names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise BadInput(f"the checksum of {damaged} is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except Exception as error:  # damage has many faces: BadZipFile, RuntimeError, UnpicklingError, EOFError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: damaged or no checkpoint ({reason[:200]})") from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), kind) for k, kind in CONTENT.items()):
        raise BadInput(f"{path}: no checkpoint of this version of train.py, which holds {', '.join(CONTENT)}")
    return saved


def refuse_other(saved: dict, policy: Policy, identity: dict[str, str]) -> None:
    """Raises BadInput if a checkpoint is of other records, model files or image handling, or its tensors of other
    names or shapes than those that train here."""
    other = [name for name, key in identity.items() if saved["identity"].get(name) != key]
    if other:
        raise BadInput(f"{saved['path']} belongs to another run: other {' and other '.join(other)}")
    trained = policy.trained
    moments = {i: {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(trained.values())}
    wanted, found = shapes(trained, moments), shapes(saved["trained"], saved["optimizer"].get("state", {}))
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    groups = [group.get("params") for group in saved["optimizer"].get("param_groups", [])]
    if wrong or groups != [list(moments)]:
        what = ", ".join(wrong[:3]) or "parameter groups"
        raise BadInput(f"{saved['path']}: weights or optimiser state of another model: {what}")


def shapes(trained: dict, moments: dict) -> dict[str, tuple]:
    """Name -> shape, of trained weights and of the optimiser's tensors for each of them."""
    named = {f"optimizer {i} {name}": tensor for i, state in moments.items() for name, tensor in state.items()}
    return {name: tuple(tensor.shape) for name, tensor in (trained | named).items()}


def restore(saved: dict, policy: Policy) -> None:
    """Move a checkpoint's weights and optimiser state into the policy."""
    trained = saved.pop("trained")  # popped, as they may be large
    with torch.no_grad():
        for name, parameter in policy.trained.items():
            parameter.copy_(trained[name])
    policy.optimizer.load_state_dict(saved.pop("optimizer"))


# ---------------------------------------------------------------------------------------------------- log


class Log:
    """Sums metrics on the device, and once an interval writes one JSON line and one console line (rank 0).

    Args:
        path: of metrics.jsonl.
        steps: of the whole run, for the time that is left.
        saved: the checkpoint that the run goes on from. Lines after it are dropped, and its interval continues;
            with another number of processes the first line covers only the steps since the checkpoint.
    """

    def __init__(self, path: Path, steps: int, device: torch.device, rank: int = 0, world: int = 1,
                 saved: dict | None = None):
        self.path, self.steps, self.device, self.rank, self.world = path, steps, device, rank, world
        self.first = saved["step"] if saved else 0
        self.started = time.perf_counter()
        self.begin()
        if saved and saved["log"]["processes"] == world:
            log = saved["log"]
            self.sums = {name: rows[rank].to(device) for name, rows in log["sums"].items()}
            self.counts, self.tokens = dict(log["counts"]), log["tokens"]
            self.since -= log["seconds"]
        if rank == 0:
            kept = lines_until(self.path, self.first)
            with written_whole(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))

    def begin(self) -> None:
        """Start an interval."""
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.tokens, self.since = 0, time.perf_counter()

    def unfinished(self) -> dict:
        """The interval so far, for the checkpoint; each sum is (processes,). A collective call."""
        mine = torch.stack([*self.sums.values()]) if self.sums else torch.zeros(0)
        rows = [mine]
        if self.world > 1 and self.sums:
            rows = [torch.empty_like(mine) for _ in range(self.world)]
            dist.all_gather(rows, mine)
        return {"processes": self.world, "sums": dict(zip(self.sums, torch.stack(rows, 1).cpu())),
                "counts": self.counts, "tokens": self.tokens, "seconds": time.perf_counter() - self.since}

    def add(self, metrics: dict[str, Tensor], tokens: int = 0, weights: Tensor | None = None) -> None:
        """Count metrics (B,) or scalars, by their mean, or where examples have weights (B,) by the weighted one."""
        for name, value in metrics.items():
            value = value.detach().float().to(self.device)  # metrics of rollouts may be on the CPU
            if weights is not None:
                value = (value * weights).sum() / weights.sum().clamp(min=1)
            self.sums[name] = self.sums.get(name, 0) + value.mean()
            self.counts[name] = self.counts.get(name, 0) + 1
        if weights is not None:
            self.add({"used": weights})
        self.tokens += tokens

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Average over steps and processes since the last call."""
        values = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        if self.world > 1:
            dist.all_reduce(values)
        line = dict(zip(self.sums, (values / self.world).tolist()))
        now = time.perf_counter()
        line |= extra | {
            "tokens/s": self.tokens * self.world / (now - self.since),
            "eta_s": (now - self.started) / (step - self.first) * (self.steps - step),
            "peak_gib": peak_memory(self.device),
        }
        self.begin()
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that has forgotten this interval
            text = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            tqdm.write(f"step {step}/{self.steps}  {text}")


def lines_until(path: Path, step: int) -> list[bytes]:
    """The lines of a log up to a step. What a kill has torn, or is no line of a log, is left out and named."""
    lines = path.read_bytes().splitlines() if step and path.exists() else []
    steps = [step_of(line) for line in lines]
    if None in steps:
        print(f"{path}: line {steps.index(None) + 1} is no whole log line and is dropped", file=sys.stderr)
    return [line + b"\n" for line, found in zip(lines, steps) if found is not None and found <= step]


def step_of(line: bytes) -> int | None:
    """The step of a log line; None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = row.get("step") if isinstance(row, dict) else None
    return found if type(found) is int else None


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --------------------------------------------------------------------------------------------------- end


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
