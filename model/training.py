"""What keeps a training run whole: its log, its checkpoint, and how it is stopped.

    Log              metrics are summed on the device; one JSON line and one console line an interval
    save_checkpoint  everything that a resumed run needs, written atomically, the one before it kept
    read_checkpoint  the newest one that is undamaged, refused if it belongs to another run
    StopRequest      Ctrl-C or SIGTERM ends the run after the current step, in all processes at the same one

A run stopped or killed anywhere and resumed gives the same weights and the same log (but for its times) as an
uninterrupted one, bit for bit: the order of the data, samples and dropout follow from seed and step, so none of
them is part of the checkpoint; the sums since the last log line are. `run` is train.py's Run.

torch.save writes a zip archive with a checksum of each member, which torch.load does not look at; here it is
verified before anything is read, with weights_only=True.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import BadInput, written_whole

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
CONTENT = {  # of a checkpoint
    "step": int,  # how many are done
    "config": dict,  # the settings
    "identity": dict,  # of records, model files and image handling (model/reference.py)
    "trained": dict,  # parameter name -> tensor
    "optimizer": dict,
    "state": dict,  # of the run: plain numbers
    "log": dict,  # the interval that no line has been written for (`Log.unfinished`)
}
# Settings that may change when a run is resumed: they touch nothing that is computed, but for the number of
# steps, which the learning rate of those that are left then follows.
CHANGEABLE = {"out", "workers", "log_every", "save_every", "eval_scenes", "eval_split", "bad_records",
              "steps"}


def save_checkpoint(out: Path, run, step: int, config: dict, log: dict) -> None:
    """Write checkpoint.pt; the former one becomes checkpoint-previous.pt."""
    trained = {name: p.detach() for name, p in trained_by_name(run).items()}
    state = {"step": step, "config": config, "identity": run.identity, "trained": trained,
             "optimizer": run.optimizer.state_dict(), "state": run.state, "log": log}
    with written_whole(out / CHECKPOINT) as temporary:
        torch.save(state, temporary)
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


def refuse_other(saved: dict, run) -> None:
    """Raises BadInput if a checkpoint is of other records, model files or image handling, or its tensors of other
    names or shapes than those that train here."""
    other = [name for name, key in run.identity.items() if saved["identity"].get(name) != key]
    if other:
        raise BadInput(f"{saved['path']} belongs to another run: other {' and other '.join(other)}")
    trained = trained_by_name(run)
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


def restore(saved: dict, run) -> None:
    """Move a checkpoint's weights, optimiser state and numbers into the run."""
    trained = saved.pop("trained")  # popped, as they may be large
    with torch.no_grad():
        for name, parameter in trained_by_name(run).items():
            parameter.copy_(trained[name])
    run.optimizer.load_state_dict(saved.pop("optimizer"))
    run.state |= saved["state"]


def trained_by_name(run) -> dict[str, torch.nn.Parameter]:
    """What trains, in the optimiser's order."""
    return {name: p for name, p in run.plain.named_parameters() if p.requires_grad}


class Log:
    """Sums metrics on the device, and once an interval writes one JSON line and one console line (rank 0).

    Args:
        saved: the checkpoint that the run goes on from. Lines behind it are dropped, and its interval continues;
            with another number of processes the first line covers only the steps since the checkpoint.
    """

    def __init__(self, run, saved: dict | None = None):
        self.run, self.path = run, run.args.out / "metrics.jsonl"
        self.first = saved["step"] if saved else 0
        self.started = time.perf_counter()
        self.begin()
        if saved and saved["log"]["processes"] == run.world:
            log = saved["log"]
            self.sums = {name: rows[run.rank].to(run.device) for name, rows in log["sums"].items()}
            self.counts, self.tokens = dict(log["counts"]), log["tokens"]
            self.since -= log["seconds"]
        if run.rank == 0:
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
        if self.run.world > 1 and self.sums:
            rows = [torch.empty_like(mine) for _ in range(self.run.world)]
            dist.all_gather(rows, mine)
        return {"processes": self.run.world, "sums": dict(zip(self.sums, torch.stack(rows, 1).cpu())),
                "counts": self.counts, "tokens": self.tokens, "seconds": time.perf_counter() - self.since}

    def add(self, metrics: dict[str, Tensor], tokens: int = 0, weights: Tensor | None = None) -> None:
        """Count metrics (B,) or scalars, by their mean, or where examples have weights (B,) by the weighted one."""
        for name, value in metrics.items():
            value = value.detach().float().to(self.run.device)  # figures of rollouts may be on the CPU
            if weights is not None:
                value = (value * weights).sum() / weights.sum().clamp(min=1)
            self.sums[name] = self.sums.get(name, 0) + value.mean()
            self.counts[name] = self.counts.get(name, 0) + 1
        if weights is not None:
            self.add({"used": weights})
        self.tokens += tokens

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Average over steps and processes since the last call."""
        run = self.run
        values = torch.stack([self.sums[name] / self.counts[name] for name in self.sums])
        if run.world > 1:
            dist.all_reduce(values)
        line = dict(zip(self.sums, (values / run.world).tolist()))
        now = time.perf_counter()
        line |= extra | {
            "tokens/s": self.tokens * run.world / (now - self.since),
            "eta_s": (now - self.started) / (step - self.first) * (run.args.steps - step),
            "peak_gib": peak_memory(run.device),
        }
        self.begin()
        if run.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that has forgotten this interval
            text = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            tqdm.write(f"step {step}/{run.args.steps}  {text}")


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


def by_name(who: str, names: list[str], logps: Tensor) -> dict[str, Tensor]:
    """Rows (names x B, L) -> `who_NAME_token_logps` (B, L) and `who_NAME_logps` (B,)."""
    offer = {}
    for name, rows in zip(names, logps.chunk(len(names))):
        offer[f"{who}_{name}_token_logps"] = rows
        offer[f"{who}_{name}_logps"] = rows.sum(-1)
    return offer


def asked(function: Callable, offer: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the signature of a loss asks for; an argument with a default may be absent."""
    wanted = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return {p.name: offer[p.name] for p in wanted if p.name in offer or p.default is p.empty}


def hold_back(run, more: bool) -> None:
    """With several processes, exchange gradients only in the last backward of an update."""
    if isinstance(run.scorer, DistributedDataParallel):
        run.scorer.require_backward_grad_sync = not more


def update(run) -> Tensor:
    """Clip, step, forget the gradients. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(run.trained, run.args.clip_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm
