"""LLaVA-1.5-7B's shapes on a GPU: are the results right there, how fast is a step, how fast is generation?

    python benchmarks/gpu.py                              everything, to runs/gpu.json and runs/gpu.md
    python benchmarks/gpu.py --only parity steps          some of it
    python benchmarks/gpu.py --device cpu --size tiny     a rehearsal without a GPU: its figures mean nothing

Weights are random and made on the device: speed and memory do not depend on their values. They are bf16, the adapters
(rank 128, on all linear layers of the decoder) fp32, and training runs under autocast, as `train.py --precision bf16`
does it. A batch is 8 pairs of an image of 576 tokens, a prompt of 44 and responses of 100; AdaViP's has 8 more images.

    parity        in bf16: the scoring core against one sequence at a time with full logits, and against itself one
                  example at a time; greedy tokens from the cache against logits without one
    steps         a step of DPO and of AdaViP: forward, reference, backward, clipping, AdamW
    naive         the DPO step with one sequence at a time, images encoded every time, full logits
    trl           the DPO step of TRL's DPOTrainer, which scores the response positions only
    generate      64 new tokens, greedy: 1, 8 and 64 images, and 8 responses to one image
    transformers  the same by `generate` of transformers
    profile       shares of a DPO step's time on the device

Tokens and FLOPs (for the utilisation, counted by model/estimate.py) are those of Plumbline's packed step that keeps all
activations, for all sides: so both compare times. Peak memory is all that torch had allocated, weights included. What
runs out of memory, or is not installed, is reported and does not stop the rest. Exits with status 1 where parity fails.
"""

import argparse
import gc
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import rig
from common import versions, write_text
from model.estimate import cost_of, hollow
from model.generate import generate
from model.llava import Llava
from model.logprobs import Scorer, naive_logprobs, pack
from model.views import View

PEAKS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # dense bf16 TFLOP/s
MODES = {"off": False, "on": True}  # checkpointing
KINDS = (("head", r"SelectedLogProbs"), ("attention", r"scaled_dot_product|^Attention|flex_attention"),
         ("GEMM", r"aten::(mm|addmm|addmm_|bmm|baddbmm)$"))


@dataclass(frozen=True)
class Size(rig.Shapes):
    """Shapes of a step, and of what is generated; all prompts and all responses are of one length."""

    new_tokens: int = 64
    batches: tuple[tuple[int, int], ...] = ((1, 1), (8, 1), (64, 1), (1, 8))  # images, responses to each


SIZES = {
    "7b": Size(rig.LLAVA_7B, pairs=8, prompt=(44, 44), response=(100, 100)),
    "tiny": Size(rig.llava(width=64, layers=2, heads=4, ffn=128, vision_width=32, vision_layers=2, vision_heads=2,
                           image=28, patch=7, vocabulary=128),
                 rank=8, pairs=2, prompt=(6, 6), response=(8, 8), new_tokens=9, batches=((1, 1), (2, 1), (1, 2))),
}


# ------------------------------------------------------------------------------------------------ the machine


@dataclass
class Machine:
    """Where it runs, and how it is measured."""

    device: torch.device
    rounds: int
    peak: float | None  # TFLOP/s in bf16

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(self, work: Callable[[], object]) -> tuple[float, float | None]:
        """Median seconds of a run, after one that warms up, and peak GiB of memory."""
        work()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        return statistics.median(seconds), peak


def find_machine(name: str, rounds: int, peak: float | None) -> tuple[Machine, str]:
    """The machine, and the name of its card. Exits in one line where there is none."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch has several ways to say so
        sys.exit(f"--device {name}: {str(error).splitlines()[0]} (--device cpu --size tiny rehearses without a GPU)")
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: figures mean nothing"
    return Machine(device, rounds, peak or next((PEAKS[key] for key in PEAKS if key in card), None)), card


def freed() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ models


def make_model(size: Size, device: torch.device) -> Llava:
    """Random weights in bf16, made on the device."""
    with torch.device("meta"):
        model = Llava(size.config).to(torch.bfloat16)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.data.normal_(std=0.02)
    return model.eval().requires_grad_(False)


def peer(size: Size, device: torch.device):
    """transformers' LLaVA of the same shapes with random bf16 weights, made on the device."""
    import transformers

    transformers.logging.set_verbosity_error()
    make = transformers.AutoModelForImageTextToText.from_config
    with device:
        return make(rig.peer_config(size.config), dtype=torch.bfloat16).eval()


@cache
def step_flops(size: Size, loss: str) -> int:
    """Floating-point operations of Plumbline's step that keeps all activations, counted without computing any."""
    with torch.device("meta"):
        model = Llava(size.config).to(torch.bfloat16)
    mode = hollow(model)
    with mode:
        optimizer = rig.with_adapters(model, size.rank, lr=0.0, checkpointing=False)
    step = rig.make_step(model, optimizer, size, loss, autocast=torch.bfloat16)  # its batch is real
    with mode:
        return cost_of(step).flops


# ------------------------------------------------------------------------------------------------ parity


def parity(size: Size, machine: Machine) -> Iterator[rig.Row]:
    """What must agree; `ok` says whether it does, up to bf16's rounding."""
    model = make_model(size, machine.device)
    rig.with_adapters(model, size.rank, lr=0.0, checkpointing=False)
    scorer = Scorer(model, torch.bfloat16)
    views, sequences = rig.draw_batch(size, "dpo")
    pixels, packed = rig.packed_batch(size, "dpo", machine.device)
    with torch.no_grad():
        features = model.vision_features(pixels)
        together = scorer(packed, features)[0]  # (2 pairs, L)
        with torch.autocast(machine.device.type, torch.bfloat16):
            plain = torch.stack(naive_logprobs(model, sequences, views))
        alone = []
        for s in sequences:
            rows = torch.arange(model.config.tile_tokens)
            one = pack([s._replace(image=0)], [rows], model.config.image_token_index).to(machine.device)
            alone.append(scorer(one, features[s.image : s.image + 1])[0][0])
    for name, other in (("scoring core, naive", plain), ("packed, one at a time", torch.stack(alone))):
        yield agreement(name, (together - other).abs())
    yield greedy_parity(size, machine, model)


def agreement(check: str, off: Tensor) -> rig.Row:
    """By how many nats two ways to compute the same differ."""
    return {"check": check, "mean": off.mean().item(), "most": off.max().item(), "ok": off.mean().item() < 0.02}


@torch.no_grad()
def greedy_parity(size: Size, machine: Machine, model: Llava) -> rig.Row:
    """How far the logits of the tokens that the cache led to are below the best without a cache."""
    views, sequences = rig.draw_batch(size, "dpo")
    prompts = [list(s.prompt) for s in sequences[: size.pairs]]
    out = generate(model, views, prompts, eos_id=-1, max_new_tokens=size.new_tokens)
    gaps = []
    for view, prompt, (new,) in zip(views, prompts, out):
        ids = torch.tensor(prompt + new[:-1], device=machine.device)
        logits = model.logits(ids, view.pixels.to(machine.device))[len(prompt) - 1 :].float()
        logits[:, size.config.image_token_index] = float("-inf")
        gaps.append(logits.amax(1) - logits.gather(1, torch.tensor(new, device=machine.device)[:, None])[:, 0])
    return agreement("greedy, cached and not", torch.cat(gaps))


# ------------------------------------------------------------------------------------------------ steps


def our_step(size: Size, device: torch.device, loss: str, checkpointing: bool, naive: bool = False) -> rig.Step:
    """A training step of a new model."""
    model = make_model(size, device)
    optimizer = rig.with_adapters(model, size.rank, lr=1e-6, checkpointing=checkpointing)
    return rig.make_step(model, optimizer, size, loss, autocast=torch.bfloat16, naive=naive)


def peer_step(size: Size, device: torch.device, loss: str, checkpointing: bool) -> rig.Step:
    """A step of TRL's DPOTrainer on a new model of transformers."""
    batch = rig.trl_batch(size, device)
    trainer = rig.trl_trainer(peer(size, device), size, batch, lr=1e-6, bf16=True, checkpointing=checkpointing)
    trainer.train()
    return partial(rig.trl_step, trainer, batch)


def steps(size: Size, machine: Machine, side: str, loss: str) -> Iterator[rig.Row]:
    """A step without and with checkpointing, on a model of its own."""
    make = {"Plumbline": our_step, "naive": partial(our_step, naive=True), "TRL compact": peer_step}[side]
    for mode, checkpointing in MODES.items():
        yield survived({"step": side, "loss": loss, "checkpointing": mode},
                       partial(figures, size, machine, loss, partial(make, size, machine.device, loss, checkpointing)))


def figures(size: Size, machine: Machine, loss: str, make: Callable[[], rig.Step]) -> rig.Row:
    """Of the step that `make` makes: seconds, tokens a second, utilisation, memory."""
    seconds, peak = machine.measure(make())
    tokens = len(rig.packed_batch(size, loss, torch.device("cpu"))[1].ids)
    used = step_flops(size, loss) / seconds / 1e12
    return {"seconds": seconds, "tokens/s": tokens / seconds, "TFLOP/s": used,
            "utilisation %": 100 * used / machine.peak if machine.peak else None, "peak GiB": peak}


def survived(name: rig.Row, work: Callable[[], rig.Row]) -> rig.Row:
    """The row of some work, or why there is none: too little memory, or a peer that is not installed."""
    freed()
    try:
        return name | work()
    except torch.cuda.OutOfMemoryError:
        return name | {"note": "out of memory"}
    except ImportError as error:
        return name | {"note": f"not installed: {error.name}"}


# ------------------------------------------------------------------------------------------------ generation


def generation(size: Size, machine: Machine, side: str, make: Callable, run: Callable) -> Iterator[rig.Row]:
    """Tokens a second of every batch; `run` continues prompts of some images with so many responses each."""
    model = cache(lambda: make(size, machine.device))  # made where running out of memory is survived

    def work(views: list[View], prompts: list[list[int]], n: int) -> rig.Row:
        seconds, peak = machine.measure(lambda: run(model(), size, views, prompts, n))
        return {"seconds": seconds, "tokens/s": len(prompts) * n * size.new_tokens / seconds, "peak GiB": peak}

    for images, n in size.batches:
        views, sequences = rig.draw_batch(replace(size, pairs=images), "dpo")
        prompts = [list(s.prompt) for s in sequences[:images]]
        yield survived({"generate": side, "images": images, "responses each": n},
                       partial(work, views, prompts, n))


def our_generation(model: Llava, size: Size, views: list[View], prompts: list[list[int]], n: int) -> None:
    """Greedy, to the last token."""
    generate(model, views, prompts, eos_id=-1, n=n, max_new_tokens=size.new_tokens)


@torch.no_grad()
def peer_generation(model, size: Size, views: list[View], prompts: list[list[int]], n: int) -> None:
    """The same by transformers, whose batch repeats the prompt for each response."""
    ids = torch.tensor(prompts, device=model.device).repeat_interleave(n, 0)
    pixels = torch.cat([view.pixels for view in views]).repeat_interleave(n, 0).to(model.device, model.dtype)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
                   pad_token_id=0, max_new_tokens=size.new_tokens, min_new_tokens=size.new_tokens)


# ------------------------------------------------------------------------------------------------ profile


def profile(size: Size, machine: Machine) -> Iterator[rig.Row]:
    """Shares of the device's time in a DPO step, checkpointing on."""
    freed()
    step = our_step(size, machine.device, "dpo", checkpointing=True)
    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        machine.wait()
    spent: Counter = Counter()
    for event in profiler.events():
        own = sum(kernel.duration for kernel in event.kernels) if machine.device.type == "cuda" \
            else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU and own:
            spent[kind_of(event)] += own
    total = sum(spent.values())
    for kind in [*dict(KINDS), "rest"]:
        yield {"profile": kind, "share %": 100 * spent[kind] / total if total else None}


def kind_of(event) -> str:
    """What an operation is part of, by its name and the names of those that called it."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((kind for kind, pattern in KINDS if any(re.search(pattern, name) for name in names)), "rest")


# ------------------------------------------------------------------------------------------------ the report


MEASURES = {
    "parity": (parity,),
    "steps": (partial(steps, side="Plumbline", loss="dpo"), partial(steps, side="Plumbline", loss="adavip")),
    "naive": (partial(steps, side="naive", loss="dpo"),),
    "trl": (partial(steps, side="TRL compact", loss="dpo"),),
    "generate": (partial(generation, side="Plumbline", make=make_model, run=our_generation),),
    "transformers": (partial(generation, side="transformers", make=peer, run=peer_generation),),
    "profile": (profile,),
}


def main() -> None:
    """Measure the sections asked for; write and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=tuple(MEASURES), metavar="SECTION")
    parser.add_argument("--rounds", type=int, default=3, help="the median counts (default: %(default)s)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="of the card in bf16, where it is not known")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="STEM", help="default: %(default)s")
    args = parser.parse_args()
    machine, card = find_machine(args.device, args.rounds, args.peak)
    rows: list[rig.Row] = []
    for measure in (measure for section in MEASURES if section in args.only for measure in MEASURES[section]):
        for row in measure(SIZES[args.size], machine):
            rows.append(row)
            print(", ".join(f"{key} {rig.shown(value)}" for key, value in row.items() if value is not None), flush=True)
        freed()
    about = {"card": card, "size": args.size, "cuda": torch.version.cuda, **versions()}
    heading = ", ".join(f"{key} {value}" for key, value in about.items() if value)
    write_text(args.out.with_suffix(".json"), json.dumps({**about, "rows": rows}, indent=1) + "\n")
    write_text(args.out.with_suffix(".md"), heading + "\n" + rig.table(rows))
    print(f"\n{heading}\n{rig.table(rows)}")
    sys.exit(0 if all(row.get("ok", True) for row in rows) else "parity fails")


if __name__ == "__main__":
    main()
