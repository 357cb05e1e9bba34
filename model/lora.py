"""LoRA: train a low-rank update of frozen weights; switched off, the model is its own reference policy.

Hu et al. 2021, arXiv 2106.09685.

            x ----------------> W (frozen) ---------+--> y = W x + (alpha / r) B A x
             \\                                     /
              dropout -> A (r, in) -> B (out, r) --/         A ~ Kaiming uniform, B = 0: at start y = W x

The reference policy of DPO-like losses is the model before training. With LoRA that is the same weights with
the adapters off, so no second model is kept: `adapters_off(model)` is the whole trick. Weights that train
without an adapter (the projector, or everything in full fine-tuning) need a frozen copy, which `Reference`
keeps and swaps in.

Shapes: T tokens, r rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops import compute_dtype

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Linear):
    """A linear layer that keeps its weight (same tensor name) and adds a trainable low-rank update.

    The adapters are fp32 whatever the base dtype; autocast, where on, casts them like any other weight.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate a second weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.enabled = alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (T, in) -> (T, out)."""
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        dtype = compute_dtype(x.device, self.weight.dtype)
        low = self.scale * F.linear(self.dropout(x).to(dtype), self.lora_A.to(dtype))  # (T, r)
        y = F.linear(low, self.lora_B.to(dtype), self.bias)
        # W x comes last: it is what a checkpoint need not recompute, as the backward reads no result of it.
        return y.addmm_(x.to(dtype), self.weight.T.to(dtype))

    def merged(self) -> Tensor:
        """W + (alpha / r) B A, (out, in): summed in fp32, in the weight's dtype."""
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def add_lora(module: nn.Module, rank: int, alpha: float, dropout: float = 0.0,
             targets: tuple[str, ...] = TARGETS) -> list[str]:
    """Freeze `module` and put an adapter on every linear layer whose last name is in `targets`.

    Returns the names of the adapted layers. Raises ValueError when a target matches nothing, when there are
    adapters already, and on `lm_head`, whose weight the scoring core reads without running the layer.
    """
    if "lm_head" in targets:
        raise ValueError("lm_head cannot carry an adapter; let its weight train instead")
    if lora_layers(module):
        raise ValueError("the module has adapters already; merge them first")
    found = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.split(".")[-1] in targets]
    missing = set(targets) - {n.split(".")[-1] for n in found}
    if missing:
        raise ValueError(f"LoRA targets match no linear layer: {sorted(missing)}")
    module.requires_grad_(False)
    for name in found:
        module.set_submodule(name, LoRALinear(module.get_submodule(name), rank, alpha, dropout))
    return found


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """Adapted layers by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Inside, every adapter is silent: the model as it was before training."""
    layers = lora_layers(module).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


@contextmanager
def adapters_cast(module: nn.Module) -> Iterator[None]:
    """Inside, adapters have the dtype of the weights they belong to, so that no forward pass casts them; then they
    are what they were. For passes without gradients."""
    adapters = [(p, p.data, layer.weight.dtype) for layer in lora_layers(module).values()
                for p in (layer.lora_A, layer.lora_B)]
    for parameter, data, dtype in adapters:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data, _ in adapters:
            parameter.data = data


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Add each update to its weight (in fp32, then back to the weight's dtype); put plain linear layers back."""
    for name, layer in lora_layers(module).items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(layer.merged(), layer.weight.requires_grad), layer.bias
        module.set_submodule(name, plain)


class Reference:
    """The policy as it was when this object was made: adapters off, a frozen copy of what trains without one."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.trained = [p for n, p in module.named_parameters()
                        if p.requires_grad and not n.endswith(("lora_A", "lora_B"))]
        self.frozen = [p.detach().clone() for p in self.trained]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Use as `with reference():`; no gradients inside, the policy's weights are back afterwards."""
        self._exchange()
        try:
            with torch.no_grad(), adapters_off(self.module):
                yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, kept in zip(self.trained, self.frozen):
            parameter.data, kept.data = kept.data, parameter.data
