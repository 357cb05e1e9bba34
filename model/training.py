"""What keeps a training run whole: its log, its checkpoint, and how it is stopped.

    Log              metrics are summed on the device; one JSON line and one console line an interval
    save_checkpoint  everything that a resumed run needs, written atomically, read with weights_only=True
    StopRequest      Ctrl-C or SIGTERM ends the run after the current step, in all processes at the same one

A run stopped anywhere and resumed gives the same weights as an uninterrupted one, bit for bit: the order of
the data, samples and dropout follow from seed and step, so none of them is part of the checkpoint. `run` is
train.py's Run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

# Settings that may change when a run is resumed: they touch nothing that is computed, or what comes next only.
HARMLESS = {"out", "workers", "log_every", "save_every", "eval_scenes", "eval_split", "bad_records"}


def save_checkpoint(path: Path, run, step: int, config: dict) -> None:
    """Everything that a resumed run needs. Order of data, samples and dropout follow from seed and step."""
    trained = {n: p.detach() for n, p in run.plain.named_parameters() if p.requires_grad}
    state = {"step": step, "trained": trained, "optimizer": run.optimizer.state_dict(), "config": config,
             "state": run.state}
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(path: Path, run, config: dict) -> int:
    """Restore weights, optimiser and state; returns the next step. ValueError if the set-up was another."""
    saved = torch.load(path, map_location=run.device, weights_only=True)
    different = [k for k in config if k not in HARMLESS and config[k] != saved["config"].get(k)]
    if different:
        pairs = ", ".join(f"{k} was {saved['config'].get(k)!r}, is {config[k]!r}" for k in different)
        raise ValueError(f"{path} belongs to another run: {pairs}")
    with torch.no_grad():
        for name, parameter in run.plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved["trained"][name])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.state |= saved["state"]
    return saved["step"]


class Log:
    """Sums metrics on the device, and once an interval writes one JSON line and one console line (rank 0)."""

    def __init__(self, run, start: int):
        self.run, self.path = run, run.args.out / "metrics.jsonl"
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.tokens = 0
        self.started, self.first = time.perf_counter(), start
        self.since = self.started
        if run.rank == 0:  # drop lines behind the checkpoint that this run goes on from
            old = self.path.read_text().splitlines() if start and self.path.exists() else []
            self.path.write_text("".join(f"{x}\n" for x in old
                                         if whole_line(x) and json.loads(x)["step"] <= start))

    def add(self, metrics: dict[str, torch.Tensor], tokens: int = 0, weights: torch.Tensor | None = None) -> None:
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
        self.sums, self.counts, self.tokens, self.since = {}, {}, 0, now
        if run.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **line}) + "\n")
            text = "  ".join(f"{k} {v:.4g}" for k, v in line.items())
            tqdm.write(f"step {step}/{run.args.steps}  {text}")


def whole_line(line: str) -> bool:
    """False for the torn last line of a run that was killed while writing."""
    return line.endswith("}")


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
