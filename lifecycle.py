"""A run of train.py around its steps: what its functions share, where it starts, checkpoints, records it cannot use.

    Run                     what the functions of train.py, lifecycle.py and results.py share
    go_on_after_a_crash     torchrun --max-restarts repeats a command: go on, whatever it says
    announce                what runs, to the console and config.json
    save                    a checkpoint of all that a resumed run needs
    draw, replaced          the micro-batches of a step, and other records in the places of bad ones
    give_up, end_at_...     ends that all processes share
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from common import BadInput, remove_unfinished, versions
from data.batch import BadRecord, Batch, collate
from data.order import Drawn
from data.processor import Processor
from model import resume, training
from model.checkpoint import save_json
from model.log import Log
from model.resume import Writer, checkpoints
from model.training import Policy
from options import PAIRS, Recipe
from pairs.progress import forget
from reinforce import Reinforcement

BAD_BATCH = "bad-batch.json"
STARTING = ".starting"  # in --out from when a run is launched until `announce` has taken away what an earlier one left


@dataclass
class Run:
    """What the functions of train.py, lifecycle.py and results.py share."""

    args: argparse.Namespace
    recipe: Recipe
    policy: Policy
    processor: Processor
    records: list[dict]
    root: Path | None  # that the records' paths start from
    device: torch.device
    rank: int = 0
    world: int = 1
    judges: dict[str, Callable] = field(default_factory=dict)  # of samples, by the names that functions ask for
    config: dict = field(default_factory=dict)  # the settings, plain
    identity: dict[str, str] = field(default_factory=dict)  # of records and model: a resumed run must have the same
    lengths: list[int] | None = None  # tokens of each record, where batches go by them
    cache: dict[str, Tensor] | None = None  # the reference's log-probs by record, if they are kept on disk
    learner: Reinforcement | None = None  # of a loss with advantages
    bad_records: dict[str, str] = field(default_factory=dict)  # name -> reason, of those that others replace
    writer: Writer = field(default_factory=Writer)  # of checkpoints

    @property
    def collate(self) -> Callable[..., Batch]:
        """(records, seeds=...) -> batch, as the loss needs it. It holds no weights: the loader's processes can have it.
        """
        return partial(collate, sequences=self.recipe.sequences, processor=self.processor, root=self.root,
                       end=self.recipe.rewards)


def go_on_after_a_crash(args: argparse.Namespace) -> None:
    """Whatever the command says that torchrun --max-restarts repeats: go on with the checkpoints of the attempts
    before, or start again. Only if none of them came as far as `announce`, do as it says."""
    if training.restarts() and not (args.out / STARTING).exists():
        args.resume = bool(checkpoints(args.out))
        args.overwrite = not args.resume


def refuse_different_steps(saved: dict | None, out: Path, world: int) -> None:
    """Raises BadInput in all processes if they do not go on from the same step. A collective call."""
    steps = training.gather_all([saved["step"] if saved else 0], world)
    if len(set(steps)) > 1:
        raise BadInput(f"{out}: the processes see different checkpoints, of steps {', '.join(map(str, steps))};"
                       " all need the same folder")


def announce(run: Run, saved: dict | None) -> None:
    """Say what runs, write it to config.json, and take away what an earlier run left, or newer checkpoints that are
    damaged."""
    args = run.args
    facts = {"processes": run.world, "device": str(run.device),
             "trained_parameters": sum(p.numel() for p in run.policy.trained.values())}
    print(json.dumps({**run.config, **facts}, indent=1), flush=True)
    if saved and saved["config"]["steps"] != args.steps:
        print(f"steps {saved['config']['steps']} -> {args.steps}: the {args.schedule} schedule now ends at"
              f" {args.steps}", flush=True)
    if args.precision == "bf16" and training.emulates_bf16(run.device):
        print("warning: this CPU has no bf16 instructions, --precision fp32 is many times faster", file=sys.stderr)
    remove_unfinished(args.out)
    found = checkpoints(args.out)
    damaged = found[: found.index(saved["path"]) if saved else None]  # or of an earlier run
    for path in (*damaged, *(args.out / name for name in ("result.json", BAD_BATCH, STARTING))):
        resume.forget(path)
    about = {"command": shlex.join(sys.argv), "identity": run.identity, "versions": versions()}
    save_json({**run.config, **facts, **about}, args.out / "config.json")


def save(run: Run, done: int, log: Log) -> None:
    """Start to write a checkpoint, of sharded weights write it. A collective call."""
    if run.rank == 0:
        forget(run.args.out / PAIRS)  # from now on it is pairs.jsonl that counts
    content = dict(step=done, config=run.config, identity=run.identity, log=log.unfinished(),
                   bad_records=dict(run.bad_records),
                   reinforcement=asdict(run.learner.memory) if run.learner else {})
    if run.args.shard:
        run.policy.save_checkpoint(run.args.out, run.args.keep_checkpoints, **content)
    elif run.rank == 0:
        run.writer.save(run.args.out, run.args.keep_checkpoints, run.policy, **content)


def draw(run: Run, micro_batches: Iterator[list[Drawn]]) -> tuple[list, list[BadRecord]]:
    """The micro-batches of a step, and the bad records that any process met. A collective call."""
    drawn = next(micro_batches)
    bad = [record for part in drawn for record in part.bad]
    return [part.batch for part in drawn], training.gather_all(bad, run.world)


def replaced(run: Run, bad: list[BadRecord]) -> bool:
    """With --bad-records skip, note that others take their places; False with stop, or when no others are left."""
    if run.args.bad_records == "stop":
        return False
    for record in bad:
        if record.name not in run.bad_records and run.rank == 0:
            tqdm.write(f"{record}; another record takes its place")
        run.bad_records[record.name] = record.reason
    return len(run.bad_records) < len(run.records)


def stop_at(bad: list[BadRecord], mode: str, advice: str = "mend it, or leave it out with --bad-records skip") -> None:
    """With --bad-records stop, raise one BadInput that lists these records and says how to go on."""
    if bad and mode == "stop":
        raise BadInput("\n".join(map(str, bad)) + f"; {advice}")


def give_up(run: Run, bad: list[BadRecord], done: int) -> None:
    """Raise BadInput in all processes, once the first has saved the checkpoint."""
    if run.world > 1:
        dist.barrier()  # torchrun ends all as soon as one has failed
    stop_at(bad, run.args.bad_records, f"a checkpoint in {run.args.out} holds the {done} finished steps: go on with"
                                       " --resume, and with the image mended or --bad-records skip")
    raise BadInput(f"none of the {len(run.records)} records can be used; {bad[-1]}")


def end_at_bad_batch(run: Run, drawn: list, step: int, log: Log) -> None:
    """Write bad-batch.json, the ids and metrics of a step whose gradient is not finite, and raise BadInput in all
    processes. A collective call."""
    ids = [[record["id"] for record, _ in part] if run.recipe.samples else part.ids for part in drawn]
    ids = training.gather_all(sum(ids, []), run.world)
    metrics = [{name: printable(value) for name, value in added.items()} for added in log.latest]
    metrics = training.gather_all(metrics, run.world)
    what = "loss" if any(type(value) is str for added in metrics for value in added.get("loss", [])) else "gradient"
    path = run.args.out / BAD_BATCH
    if run.rank == 0:
        save_json({"step": step, "not finite": what, "ids": ids, "metrics": metrics}, path)
    if run.world > 1:
        dist.barrier()  # torchrun ends all as soon as one has failed
    raise BadInput(f"step {step}: the {what} is not finite, and did not change the weights; {path} has the records and"
                   f" metrics. Try a lower --lr or a smaller --clip-norm; the checkpoints are as they were")


def printable(values: Tensor) -> list:
    """Numbers for JSON, which has no NaN and no infinity: these become text."""
    return [value if math.isfinite(value) else str(value) for value in values.float().flatten().tolist()]
