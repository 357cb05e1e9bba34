"""The log of a run: metrics.jsonl and the console.

Where the package `tensorboard` is installed, the same numbers go into its events, below tensorboard/ next to
metrics.jsonl.
"""

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import writing, written_whole
from model import watch

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


class Log:
    """Sums metrics on the device, and once an interval writes one JSON line and one console line (rank 0).

    Args:
        path: of metrics.jsonl.
        steps: of the whole run, for the time that is left.
        saved: the checkpoint that the run goes on from. Lines after it are dropped, and its interval continues;
            with another number of processes the first line covers only the steps since the checkpoint.
        watched: warn of what model/watch.py knows, each once.
    """

    def __init__(self, path: Path, steps: int, device: torch.device, rank: int = 0, world: int = 1,
                 saved: dict | None = None, watched: bool = False):
        self.latest: list[dict[str, Tensor]] = []  # what `add` was given since the last `begin_step`
        self.watched, self.warned = watched, set()
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
        self.board = make_board(path.with_name("tensorboard"), self.first) if rank == 0 else None

    def begin_step(self) -> None:
        """Forget what the step before has added."""
        self.latest.clear()

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
                "counts": dict(self.counts), "tokens": self.tokens, "seconds": time.perf_counter() - self.since}

    def add(self, metrics: dict[str, Tensor], tokens: int = 0, weights: Tensor | None = None) -> None:
        """Count metrics (B,) or scalars, by their mean, or where examples have weights (B,) by the weighted one."""
        self.latest.append({name: value.detach() for name, value in metrics.items()})
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
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint that has forgotten this interval
            text = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            tqdm.write(f"step {step}/{self.steps}  {text}")
            for name, value in line.items() if self.board else ():
                self.board.add_scalar(name, value, step)
            if self.board:
                self.board.flush()
            for sign, text in watch.signs(line).items() if self.watched else ():
                if sign not in self.warned:
                    tqdm.write(f"warning: step {step}: {text}", file=sys.stderr)
                self.warned.add(sign)


def make_board(folder: Path, step: int):
    """TensorBoard's writer, which hides what an earlier attempt wrote of later steps; None without the package."""
    if SummaryWriter is None:
        return None
    if not step:
        shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(folder, purge_step=step + 1)


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
