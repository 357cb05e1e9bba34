"""What a step costs, counted on tensors without numbers: floating-point operations and memory.

The real code runs once, under torch's FakeTensorMode: every operation gives a tensor with a shape, a dtype and a
lifetime, and nothing is computed or allocated. Counted are

    operations   2 for each multiply-add of matrix products, convolutions and attention (torch.utils.flop_counter, for
                 which causal attention sees all): forward, backward, and again where --checkpointing recomputes
    memory       bytes of the storages that the step makes, the most that are alive at a time

so both follow the code, whatever it is. Fused attention is that of torch on a CPU, which like CUDA's keeps no weights;
what an allocator loses between blocks is not known here.
"""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
FLOPS = flop_registry | {  # and those that it does not know
    aten.addmm_: lambda total, a, b, *_, **__: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}


class Cost(NamedTuple):
    """Of a function that was called: floating-point operations, and bytes alive at its peak that it made itself."""

    flops: int
    peak: int


def cost_of(function: Callable[[], object]) -> Cost:
    """Call the function and count, on real tensors as on those of `hollow`."""
    with Counter() as counter:
        function()
    return Cost(counter.flops, counter.peak)


class Counter(TorchDispatchMode):
    """Inside, the floating-point operations, the bytes of storages that are made and alive, and the most of these.

    Not a FlopCounterMode: that one's hooks on modules keep tensors alive which checkpointing would free.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = self.peak = 0
        self.known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.known.update(storages((args, kwargs)))  # made before, or counted
        result = function(*args, **kwargs)
        if count := FLOPS.get(function._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        for storage in storages(result):
            if storage not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size: int) -> None:
        """Of a storage that is made or freed."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def storages(tree: object) -> list[torch.UntypedStorage]:
    """Of all tensors in nested lists and dictionaries."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def hollow(module: nn.Module) -> FakeTensorMode:
    """Give a module on the meta device parameters without numbers. Returns the mode under which it runs."""
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), {}
    with mode:
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter not in made:  # tables may be tied
                    made[parameter] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype),
                                                   parameter.requires_grad)
                setattr(owner, name, made[parameter])
    return mode


def kept(module: nn.Module) -> dict[str, int]:
    """Bytes that are there all the time, of a module and its training with AdamW: term -> bytes.

    The copy for the reference is that of `model.lora.Reference`: of all that trains without an adapter.
    """
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    size = sum(p.nbytes for p in trained.values())
    return {"weights": sum(p.nbytes for p in module.parameters()), "gradients": size, "AdamW": 2 * size,
            "reference": sum(p.nbytes for n, p in trained.items() if not n.endswith(("lora_A", "lora_B")))}
