"""Checkpoints: everything that a resumed run needs.

    save_checkpoint  written atomically, the one before it kept
    read_checkpoint  the newest one that is undamaged, refused if it belongs to another run
    restore          its weights and optimiser state into the policy

A run stopped or killed anywhere and resumed gives the same weights and the same log (but for its times) as an
uninterrupted one, bit for bit: the order of the data, samples and dropout follow from seed and step, so none of
them is part of the checkpoint; the sums since the last log line are.

torch.save writes a zip archive with a checksum of each member, which torch.load does not look at; here it is
verified before anything is read, with weights_only=True.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch

from common import BadInput, written_whole
from model.training import Policy

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"
FOLDER, FOLDER_PREVIOUS = "checkpoint", "checkpoint-previous"  # of a run with --shard (model/shard.py)
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


def names(sharded: bool) -> tuple[str, str]:
    """Of a run's newest checkpoint and of the former one."""
    return (FOLDER, FOLDER_PREVIOUS) if sharded else (CHECKPOINT, PREVIOUS)


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
    for path in (out / name for name in names(config["shard"])):
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
    if wrong or groups != [list(moments)]:
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
