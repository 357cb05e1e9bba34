"""--shard: a policy whose weights, gradients and optimiser state are spread over the processes, by PyTorch's FSDP2.

Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277; Rajbhandari et al. 2020, "ZeRO", arXiv 1910.02054 (stage 3).

    unit             held                          gathered for a forward or backward pass in
    decoder layer    1/n of it: what trains in     the precision of the run: what autocast would cast it to
                     fp32, else as the run has it
    the root         likewise                      the precision that it is held in
    vision tower     whole, frozen                 -

The root is all else: embeddings, final norm, head, projector, heads of critic and reward model. The scoring core reads
`lm_head.weight` without running that layer, which is right as long as the root's forward runs. So a sharded run
computes what an unsharded one does. Gradients are averaged in fp32, and accumulate in shards: between micro-batches no
process holds a whole gradient.

n is the number of processes on a node (LOCAL_WORLD_SIZE); nodes hold the same shards and exchange gradients once an
update (HSDP). Every process must run the scorer equally often. To sample, each process gathers all weights for a while;
to measure and to save, the first one does.

A checkpoint is a folder that appears whole or not at all: state.pt, and of each of n processes part-I-of-n.pt with its
rows of every tensor. They are torch.save's zip archives, checksums verified, read with weights_only=True. The format of
torch.distributed.checkpoint is not used: it has no checksums, and its reader unpickles `.metadata` without a check.

Shapes: rows are a tensor's first dimension; process i of n holds those from i ceil(rows / n) on.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common import BadInput
from model import lora
from model.resume import forget, keep_newest, load_whole, read_archive, write_archive
from model.training import Policy, gather_all, ranks
from model.vlm import VLM

UNFINISHED, STATE = "checkpoint-unfinished", "state.pt"


# ------------------------------------------------------------------------------------------------- the shards


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes; of several nodes (replicate, shard). Raises BadInput when nodes have unequal numbers."""
    _, world = ranks()
    if world == 1 and not dist.is_initialized():  # also without torchrun
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % local:
        raise BadInput(f"--shard: {world} processes are not a multiple of the {local} on this node")
    if world > local:
        return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))


def shard(scorer: nn.Module, model: VLM, dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None,
          ) -> "Callable[..., ShardedPolicy]":
    """Spread the weights of a scorer over the processes, in place, one decoder layer after another; the model's code
    does not know it.

    Args:
        model: the VLM inside the scorer. What it was loaded to may be mapped files: a layer at a time is converted.
        dtype: of frozen weights; those that train are fp32.
        autocast: dtype of mixed-precision compute, or None.
    Returns: what makes its policy, of Policy's arguments.
    """
    mesh, fp32, empty = make_mesh(device), torch.float32, skeleton(model, scorer)
    tower = {p for p in model.get_submodule(model.TOWER).parameters() if not p.requires_grad}
    for layer in model.language_model.model.layers:
        _place(layer, dtype, device)
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(autocast, fp32, cast_forward_inputs=False))
    _place(scorer, dtype, device)
    # By default the root stays gathered after a forward pass: one without a backward would leave weights that later
    # miss what an optimiser step, `Reference` or a checkpoint puts into the shards.
    fully_shard(scorer, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, fp32, cast_forward_inputs=False),
                reshard_after_forward=True, ignored_params=tower)
    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # rewards; nothing changes them in place
    if hasattr(scorer, "likeliest"):
        register_fsdp_forward_method(scorer, "likeliest")
    return partial(ShardedPolicy, mesh=mesh, skeleton=empty, autocast=autocast)


def _place(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Move what is not sharded yet to the device, in its final precision."""
    for p in module.parameters():
        if not isinstance(p, DTensor):
            p.data = p.data.to(device, torch.float32 if p.requires_grad else dtype)


def skeleton(model: VLM, scorer: nn.Module) -> tuple[VLM, nn.Module]:
    """Both once more, before they are sharded, on the meta device: a structure without weights."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in scorer.parameters()}
    return copy.deepcopy((model, scorer), memo)


class Reference(lora.Reference):
    """The policy as it was, of sharded weights: FSDP gathers what its shards hold, so their content is exchanged."""

    def _exchange(self) -> None:
        for parameter, kept in zip(self.trained, self.frozen):
            now = parameter.detach().clone()
            parameter.detach().copy_(kept)
            kept.copy_(now)


# ------------------------------------------------------------------------------------------------- the policy


@dataclass
class ShardedPolicy(Policy):
    """A policy whose scorer is sharded. All its methods are collective calls."""

    mesh: DeviceMesh
    skeleton: tuple[VLM, nn.Module]  # of `skeleton`
    autocast: torch.dtype | None
    inside: Policy | None = None  # what `whole` has gathered, as long as it is used

    def no_sync(self, more: bool) -> AbstractContextManager:
        """Sum gradients over the processes of a node in each backward, over nodes in the last, that without `more`."""
        self.scorer.set_requires_all_reduce(not more)
        return nullcontext()

    def clip(self) -> Tensor:
        """Clip the gradients; their norm before, over all shards."""
        trained = [p for p in self.trained.values() if p.grad is not None]
        norm = get_total_norm([p.grad for p in trained]).full_tensor()
        clip_grads_with_norm_(trained, self.clip_norm, norm)
        return norm

    @contextmanager
    def whole(self, here: bool = True, stored: bool = False) -> Iterator[Policy]:
        """A policy of gathered weights, a copy that cannot train: what is done with it is no collective call.

        Args:
            here: keep them in this process; else it holds one tensor at a time.
            stored: on the CPU and in the precision they are held in, to be saved; else as a forward pass gathers them,
                with autocast on.
        Inside another `with`, it is that one's.
        """
        if self.inside is not None:
            yield self.inside
            return
        dist.barrier()  # others may have been busy for hours; of all groups, only the default one waits that long
        model, scorer = copy.deepcopy(self.skeleton)
        found = self._gather(here, stored)
        if here:
            scorer.load_state_dict(found, assign=True)
        self.inside = Policy(model.eval(), scorer, None, self.optimizer, self.clip_norm)
        device, half = self.model.device.type, None if stored else self.autocast
        model.vision_features = torch.autocast(device, enabled=False)(model.vision_features)  # as in training
        try:
            with torch.autocast(device, half, enabled=half is not None):
                yield self.inside
        finally:
            self.inside = None

    @torch.no_grad()
    def _gather(self, here: bool, stored: bool) -> dict[str, Tensor]:
        """Name -> whole tensor, one tensor after another; none if not `here`."""
        layers, found = set(self.model.language_model.model.layers.parameters()), {}
        for name, p in self.scorer.state_dict(keep_vars=True).items():
            cast = self.autocast if p in layers and not stored else None
            tensor = p.detach().to(cast or p.dtype)
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if here:
                found[name] = tensor.cpu() if stored else tensor
        return found

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, out: Path, keep: int, **content) -> None:
        """Write checkpoint-STEP, each process its part; of all, the newest `keep` stay."""
        here, rank, parts = out / UNFINISHED, dist.get_rank(), self.mesh["shard"].size()
        if rank == 0:
            forget(here)
            here.mkdir()
        dist.barrier()
        if rank < parts:  # of several nodes, the first
            trained = {name: _mine(p.detach()) for name, p in self.trained.items()}
            moments = {i: {name: _mine(value) for name, value in state.items()}
                       for i, state in self.optimizer.state_dict()["state"].items()}
            write_archive(here / _part(rank, parts), {"trained": trained, "moments": moments})
        dist.barrier()
        if rank == 0:
            groups = self.optimizer.state_dict()["param_groups"]
            state = {**content, "trained": {}, "optimizer": {"param_groups": groups}, "parts": parts}
            write_archive(here / STATE, state)
            done = out / f"checkpoint-{content['step']}"
            forget(done)  # a damaged one of an earlier attempt
            os.replace(here, done)
            keep_newest(out, keep)
        dist.barrier()

    def restore(self, saved: dict) -> None:
        """Move this process's rows of a checkpoint's weights and optimiser state into the policy."""
        trained, optimizer = saved.pop("trained"), saved.pop("optimizer")
        for name, parameter in self.trained.items():
            self._fill(parameter.detach(), trained[name])
        parameters = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        moments = {i: {name: value if value.dim() == 0 else self._fill(torch.empty_like(p), value)
                       for name, value in optimizer["state"][i].items()} for i, p in enumerate(parameters)}
        self.optimizer.load_state_dict({**optimizer, "state": moments})

    def _fill(self, tensor: DTensor, rows: "Rows") -> DTensor:
        """Copy this process's rows into a tensor."""
        mine, shards = tensor.to_local(), self.mesh["shard"]
        first = shards.get_local_rank() * -(-len(tensor) // shards.size())
        if len(mine):
            mine.copy_(rows.take(first, len(mine)))
        return tensor


# ------------------------------------------------------------------------------------------------ checkpoints


class Rows(NamedTuple):
    """A tensor that lies in parts, one after another along its first dimension."""

    parts: list[Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (sum(map(len, self.parts)), *self.parts[0].shape[1:])

    def dim(self) -> int:
        """Of the whole."""
        return self.parts[0].dim()

    def take(self, first: int, count: int) -> Tensor:
        """Rows `first` to `first + count`; of the others nothing is read."""
        found, start = [], 0
        for part in self.parts:
            found.append(part[max(0, first - start) : max(0, first + count - start)])
            start += len(part)
        return torch.cat([part for part in found if len(part)])


def load(folder: Path) -> dict:
    """A checkpoint, its tensors mapped: `Rows` where they are sharded; the processes may be more or fewer than those
    that wrote it. Raises BadInput, one line, if a file is missing or not as it was written. A collective call: each
    process verifies its share of the files."""
    saved, (rank, world) = load_whole(folder / STATE), ranks()
    paths = [folder / _part(i, saved["parts"]) for i in range(saved["parts"])]
    problems = []
    for path in paths[rank::world]:
        try:
            read_archive(path, mmap=True)
        except BadInput as error:
            problems.append(str(error))
    if problems := gather_all(problems, world):
        raise BadInput("; ".join(problems))
    parts = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    saved["trained"] = {name: Rows([part["trained"][name] for part in parts]) for name in parts[0]["trained"]}
    saved["optimizer"]["state"] = {
        i: {name: value if value.dim() == 0 else Rows([part["moments"][i][name] for part in parts])
            for name, value in state.items()}
        for i, state in parts[0]["moments"].items()}
    return saved


def _part(i: int, parts: int) -> str:
    return f"part-{i}-of-{parts}.pt"


def _mine(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
