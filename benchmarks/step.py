"""Seconds and memory of a DPO step: Plumbline, the naive way and TRL's DPOTrainer on the same weights and pairs.

    python benchmarks/step.py                                          # small, bf16, all sides, seconds
    python benchmarks/step.py --size small medium --precision bf16 fp32 --measure seconds memory --only "TRL compact"

A step, and what each side starts from, is in benchmarks/rig.py; reading and resizing images is not counted.

    Plumbline    model/logprobs.py: vision once, shared prefixes, scored positions only
    naive        one sequence at a time, vision tower every time, full logits (`naive_logprobs`)
    TRL compact  DPOTrainer made to score only the response positions, as it does on CUDA: the fair peer
    TRL stock    DPOTrainer as it is; on a CPU it projects every position onto the vocabulary

One llava-hf checkpoint with random weights is written to a temporary folder and loaded by both libraries,
with the same LoRA weights (B ~ N(0, 0.01), so that policy and reference differ). The learning rate is 0:
every round repeats the same arithmetic, AdamW included, and the losses and gradient norms of all sides must
agree.

--measure seconds: CPU seconds of one thread, the median over rounds in which the variants take turns in one process.
--measure memory: the kernel's high-water mark of resident memory during a step (/proc, so Linux only) above what was
resident before it; weights and optimiser state do not count, activations and gradients do. Each variant is
measured in a process of its own, because what one leaves in the allocator and in oneDNN's caches would be
counted to the next.

bfloat16 means weights in bf16, LoRA weights in fp32, autocast.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import rig
from model.checkpoint import load_llava
from model.lora import lora_layers

try:
    import peft
    import transformers
    import trl
except ImportError as error:
    sys.exit(f"This benchmark needs the peers it compares with: pip install transformers peft trl ({error})")

OURS, NAIVE, COMPACT, STOCK = VARIANTS = ("Plumbline", "naive", "TRL compact", "TRL stock")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "tiny": rig.Shapes(rig.llava(width=160, layers=4, heads=5, ffn=432, vision_width=128, vision_layers=5,
                                 vision_heads=4, image=96, patch=12, vocabulary=256),
                       rank=32, pairs=16, prompt=(14, 20), response=(35, 55)),
    "small": rig.Shapes(rig.SMALL),
    "medium": rig.Shapes(rig.llava(width=1024, layers=16, heads=16, ffn=2816, vision_width=512, vision_layers=12,
                                   vision_heads=8)),
}


class Setting(NamedTuple):
    """What a block of the table is about."""

    size: str
    precision: str
    pairs: int

    @property
    def shapes(self) -> rig.Shapes:
        """Of the two networks and the batch."""
        return replace(SIZES[self.size], pairs=self.pairs)

    @property
    def bf16(self) -> bool:
        """Whether all sides run under autocast."""
        return self.precision == "bf16"

    def build(self, folder: str, only: list[str], modes: tuple[bool, ...]) -> dict[tuple[str, bool], rig.Step]:
        """(variant, checkpointing) -> step; every step has run once and agrees with the others."""
        torch.manual_seed(0)
        transformers.LlavaForConditionalGeneration(rig.peer_config(self.shapes.config)).save_pretrained(folder)
        steps = {}
        for checkpointing in modes:
            own, layers = our_steps(folder, self, checkpointing)
            peers = trl_steps(folder, self, checkpointing, layers) if {COMPACT, STOCK} & set(only) else {}
            chosen = {name: step for name, step in (own | peers).items() if name in only}
            print(f"checkpointing {'on' if checkpointing else 'off'}", file=sys.stderr)
            check({name: tuple(map(float, step())) for name, step in chosen.items()}, exact=not self.bf16)
            steps |= {(name, checkpointing): step for name, step in chosen.items()}
        return steps


def our_steps(folder: str, setting: Setting, checkpointing: bool) -> tuple[dict[str, rig.Step], dict]:
    """Steps of Plumbline and of the naive way, which share one model; and the model's LoRA layers by name."""
    model = load_llava(folder, DTYPES[setting.precision])
    optimizer = rig.with_adapters(model, setting.shapes.rank, lr=0.0, checkpointing=checkpointing)
    make = partial(rig.make_step, model, optimizer, setting.shapes, autocast=torch.bfloat16 if setting.bf16 else None)
    return {OURS: make(), NAIVE: make(naive=True)}, lora_layers(model.language_model.model)


def trl_steps(folder: str, setting: Setting, checkpointing: bool, ours: dict) -> dict[str, rig.Step]:
    """Steps of DPOTrainer, with the LoRA weights of `ours`."""
    batch = rig.trl_batch(setting.shapes, torch.device("cpu"))
    base = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[setting.precision])
    trainer = rig.trl_trainer(base, setting.shapes, batch, lr=0.0, bf16=setting.bf16, checkpointing=checkpointing)
    copied = 0
    for name, parameter in trainer.model.named_parameters():
        if ".lora_" in name:
            layer, leaf = name.removesuffix(".default.weight").split("language_model.")[1].rsplit(".", 1)
            parameter.data.copy_(getattr(ours[layer], leaf))
            copied += 1
    if copied != 2 * len(ours):
        raise RuntimeError(f"copied {copied} LoRA tensors to TRL, expected {2 * len(ours)}")
    trainer.train()
    return {COMPACT: partial(rig.trl_step, trainer, batch), STOCK: partial(rig.trl_step, trainer, batch, compact=False)}


def peak_mebibytes(step: rig.Step) -> float:
    """High-water mark of resident memory while `step` runs, above the resident memory before it."""
    rig.reset_peak()
    before = rig.resident("VmRSS")
    step()
    return (rig.resident("VmHWM") - before) / 2**20


def check(results: dict[str, tuple[float, float]], exact: bool) -> None:
    """Losses and gradient norms against TRL compact (or the first variant); in fp32 a difference is an error."""
    peer = COMPACT if COMPACT in results else next(iter(results))
    for name, (loss, norm) in results.items():
        off = abs(loss - results[peer][0])
        off_norm = abs(norm / results[peer][1] - 1)
        print(f"  {name:<12} loss {loss:.6f} ({off:.1e} from {peer}), gradient norm {norm:.5f} ({off_norm:.1e})",
              file=sys.stderr)
        if exact and max(off, off_norm) > 1e-4:
            sys.exit(f"{name} and {peer} disagree: this would compare different computations")


def seconds(setting: Setting, only: list[str], rounds: int) -> dict[tuple[str, bool], float]:
    """CPU seconds of every (variant, checkpointing), taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        return rig.cpu_seconds(setting.build(folder, only, (False, True)), rounds)


def memory(setting: Setting, only: list[str], rounds: int) -> dict[tuple[str, bool], float]:
    """Peak MiB of every (variant, checkpointing), once, each in a process of its own."""
    values = {}
    for key in ((name, mode) for mode in (False, True) for name in only):
        command = [sys.executable, __file__, "--size", setting.size, "--precision", setting.precision,
                   "--pairs", str(setting.pairs), "--alone", key[0], str(key[1])]
        console = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        values[key] = float(console.splitlines()[-1])
    return values


def memory_alone(setting: Setting, name: str, mode: bool) -> None:
    """Print the peak of one variant after a step that warms up; the last line is the figure."""
    rig.restart_with("MALLOC_MMAP_THRESHOLD_", 2**17)  # slower than the default, hence only where memory is measured
    with tempfile.TemporaryDirectory() as folder:
        print(peak_mebibytes(setting.build(folder, [name], (mode,))[name, mode]))


MEASURES = {"seconds": (seconds, "CPU s", 2), "memory": (memory, "peak MiB", 0)}


def rows(setting: Setting, measures: list[str], only: list[str], rounds: int) -> list[rig.Row]:
    """The lines of the table about a setting, with ratios to Plumbline's."""
    values = {m: MEASURES[m][0](setting, only, rounds) for m in measures}
    lines = []
    for name, mode in values[measures[0]]:
        line = setting._asdict() | {"step": name, "checkpointing": "on" if mode else "off"}
        for m, value in values.items():
            _, unit, digits = MEASURES[m]
            ratio = value[name, mode] / value[OURS, mode]
            line |= {unit: f"{value[name, mode]:.{digits}f}", f"{m} vs {OURS}": f"{ratio:.2f}x"}
        lines.append(line)
    return lines


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--precision", nargs="+", choices=tuple(DTYPES), default=["bf16"])
    parser.add_argument("--measure", nargs="+", choices=tuple(MEASURES), default=["seconds"])
    parser.add_argument("--rounds", type=int, default=3, help="of seconds; memory is measured once")
    parser.add_argument("--pairs", type=int, help="in a batch; 4, tiny 16")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help=f"always with {OURS}")
    parser.add_argument("--alone", nargs=2, metavar=("VARIANT", "CHECKPOINTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = [Setting(size, precision, args.pairs or SIZES[size].pairs)
                for size in args.size for precision in args.precision]
    if args.alone:
        return memory_alone(settings[0], args.alone[0], args.alone[1] == "True")
    only = [v for v in VARIANTS if v in {OURS, *args.only}]
    print(f"\ntorch {torch.__version__}, transformers {transformers.__version__}, trl {trl.__version__}, "
          f"peft {peft.__version__}")
    for setting in settings:  # each may take many minutes
        print(rig.table(rows(setting, args.measure, only, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
