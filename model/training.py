"""What every training run needs: its processes, the policy and its update, its orderly end.

Shapes: B examples, L longest response, N = names x B sequences, n labels (model/logprobs.py).
"""

import inspect
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.lora import Reference

# ---------------------------------------------------------------------------------------------- processes


def ranks() -> tuple[int, int]:
    """(this process's number, how many there are), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def restarts() -> int:
    """How often torchrun --max-restarts has started all processes again, with the same command."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def start_processes(world: int) -> torch.device:
    """The device; joins the process group when torchrun started several of us."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():  # they may meet after days of making pairs or evaluating
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(days=30)
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt-{restarts()}", store)  # it may hold addresses of processes that have died
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
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
    reference: Reference | None  # `with reference():` the model is as it was; None where no copy of it is needed
    optimizer: torch.optim.Optimizer
    clip_norm: float

    @property
    def plain(self) -> nn.Module:
        """The scorer itself."""
        return self.scorer.module if isinstance(self.scorer, DistributedDataParallel) else self.scorer

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name, in the optimiser's order."""
        names = {p: name for name, p in self.plain.named_parameters()}
        return {names[p]: p for group in self.optimizer.param_groups for p in group["params"]}

    def no_sync(self, more: bool) -> AbstractContextManager:
        """With several processes, exchange gradients only in the last backward of an update, that without `more`."""
        return self.scorer.no_sync() if more and isinstance(self.scorer, DistributedDataParallel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, (). Where it is not finite they become NaN, so that `update` of all processes
        sees it."""
        (loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()

    @contextmanager
    def whole(self, here: bool = True, stored: bool = False) -> "Iterator[Policy]":
        """A policy whose weights are all in this process: itself (model/shard.py has another)."""
        yield self

    def clip(self) -> Tensor:
        """Clip the gradients; their norm before."""
        return nn.utils.clip_grad_norm_(list(self.trained.values()), self.clip_norm)

    def update(self) -> float:
        """Clip, step, zero the gradients. Returns the norm before clipping, the same in all processes; where it is
        not finite, nothing is updated."""
        norm = self.clip()
        # The one wait for the device in a step; the optimiser's kernels are all that could be queued without it.
        if math.isfinite(norm := norm.item()):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after the warm-up -> share of the peak
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "linear": lambda share: 1 - share,
    "constant": lambda share: 1.0,
}


def learning_rate(peak: float, step: int, steps: int, warmup: int, schedule: str = "cosine") -> float:
    """Linear warm-up over `warmup` steps, then by the schedule, which ends at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, steps - warmup))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all parameter groups; one with a `ratio` (`parameter_groups`) gets that many times the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("ratio", 1.0)


def parameter_groups(module: nn.Module, ratios: dict[str, float]) -> list[dict]:
    """What trains in a module, for its optimiser, in groups of one learning rate.

    Args:
        ratios: part of a parameter's name -> its rate, as a multiple of the rate of all others.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            ratio = next((ratio for part, ratio in ratios.items() if f".{part}." in f".{name}"), 1.0)
            groups.setdefault(ratio, []).append(parameter)
    return [{"params": parameters, "ratio": ratio} for ratio, parameters in groups.items()]


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


# --------------------------------------------------------------------------------------------------- end


class StopRequest:
    """Ctrl-C or SIGTERM ends the run after the current step, in all processes at the same one."""

    def __init__(self, world: int):
        self.world, self.flag = world, torch.zeros(1)
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number: int, _) -> None:
        """The signal handler."""
        if not self.flag and ranks()[0] == 0:  # print() must not be used in a handler
            os.write(2, f"\n{signal.Signals(number).name}: a checkpoint is written after this step\n".encode())
        self.flag.fill_(1)

    def asked(self) -> bool:
        """The same answer in all processes. A collective call."""
        flag = self.flag.clone()  # a signal that comes now counts at the next step, when all processes hear of it
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)  # a CPU tensor: no device synchronisation
        return bool(flag)

    def close(self) -> None:
        """Put the former signal handlers back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
