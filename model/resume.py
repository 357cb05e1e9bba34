"""Checkpoints: everything that a resumed run needs.

Of sharded weights a checkpoint is a folder, checkpoint-STEP, which model/shard.py writes, else checkpoint-STEP.pt.

A run stopped or killed anywhere and resumed gives the same weights and the same log (but for its times) as an
uninterrupted one, bit for bit: the order of the data, samples and dropout follow from seed and step, so none of
them is part of the checkpoint; the sums since the last log line are.

Training waits for a copy in host memory, not for the disk: of 160 MB a copy takes a fifth of the time of a write.
A full fine-tuning needs as much host memory again as weights and optimiser state take.

torch.save writes a zip archive with a checksum of each member, which torch.load does not look at; here it is
verified before anything is read, with weights_only=True.
"""

import re
import shutil
import sys
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from common import BadInput, written_whole
from model.training import Policy

NAME = re.compile(r"checkpoint-(\d{1,12})(\.pt)?")
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
              "steps", "keep_checkpoints"}


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first; none where there is no folder."""
    found = {int(match[1]): path for path in out.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


class Writer:
    """Writes checkpoints one at a time in a thread. A context manager, so that no run ends before its last one is
    on the disk."""

    def __init__(self):
        self.thread, self.pending = ThreadPoolExecutor(1), Future()
        self.pending.set_result(None)

    def save(self, out: Path, keep: int, policy: Policy, **content) -> None:
        """Start to write the state as it is now.

        Args:
            keep: how many checkpoints stay in `out`, the newest.
            content: the rest of CONTENT, which nothing changes later.
        Raises what the write before it ran into, such as BadInput of a full disk.
        """
        self.pending.result()
        optimizer = policy.optimizer.state_dict()
        state = {i: in_host_memory(tensors) for i, tensors in optimizer["state"].items()}
        content |= {"trained": in_host_memory(policy.trained), "optimizer": {**optimizer, "state": state}}
        self.pending = self.thread.submit(write_checkpoint, out, content, keep)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.thread.shutdown()  # waits
        if kind is None:  # else the error that ends the run is the one to see
            self.pending.result()


def in_host_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy that training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def write_checkpoint(out: Path, content: dict, keep: int) -> None:
    """Write checkpoint-STEP.pt, whole or not at all, and then delete all but the newest `keep`. BadInput where the
    disk is full or cannot be written; the checkpoints that are there then stay."""
    write_archive(out / f"checkpoint-{content['step']}.pt", content)
    keep_newest(out, keep)


def write_archive(path: Path, content: dict) -> None:
    """torch.save, whole or not at all. Raises BadInput as `written_whole`."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # its zip writer hides what the file said
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def keep_newest(out: Path, count: int) -> None:
    """Delete all checkpoints but the newest."""
    for path in checkpoints(out)[count:]:
        forget(path)


def read_checkpoint(out: Path, config: dict, rank: int = 0) -> dict:
    """The newest undamaged checkpoint of a folder, on the CPU, with its `path`.

    Rank 0 names newer ones that are damaged. Raises BadInput, one line naming the files, if none is whole or it
    belongs to a run of other settings.
    """
    problems = []
    for path in checkpoints(out):
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
        print(f"warning: {'; '.join(problems)}; going on from step {saved['step']} in {path}", file=sys.stderr)
    return saved


def load_whole(path: Path) -> dict:
    """A checkpoint whose every bit is as it was written. Raises BadInput, one line that names the file."""
    if path.is_dir():
        from model import shard  # not at the top: importing FSDP takes a second
        return shard.load(path)
    saved = read_archive(path)
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), kind) for k, kind in CONTENT.items()):
        raise BadInput(f"{path}: no checkpoint of this version of train.py, which holds {', '.join(CONTENT)}")
    return saved


def read_archive(path: Path, mmap: bool = False) -> object:
    """What torch.save wrote, on the CPU, or mapped. Raises BadInput as `load_whole`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise BadInput(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise BadInput(f"{path}: not found") from None
    except Exception as error:  # damage has many faces: BadZipFile, RuntimeError, UnpicklingError, EOFError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{path}: damaged or no checkpoint ({reason[:200]})") from None


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
    if wrong or groups != [group["params"] for group in policy.optimizer.state_dict()["param_groups"]]:
        what = ", ".join(wrong[:3]) or "parameter groups"
        raise BadInput(f"{saved['path']}: weights or optimiser state of another model: {what}")


def shapes(trained: dict, moments: dict) -> dict[str, tuple]:
    """Name -> shape, of trained weights and of the optimiser's tensors for each of them."""
    named = {f"optimizer {i} {name}": tensor for i, state in moments.items() for name, tensor in state.items()}
    return {name: tuple(tensor.shape) for name, tensor in (trained | named).items()}


def forget(path: Path) -> None:
    """Remove a checkpoint, be it a file or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def restore(saved: dict, policy: Policy) -> None:
    """Move a checkpoint's weights and optimiser state into the policy."""
    trained = saved.pop("trained")  # popped, as they may be large
    with torch.no_grad():
        for name, parameter in policy.trained.items():
            parameter.copy_(trained[name])
    policy.optimizer.load_state_dict(saved.pop("optimizer"))
