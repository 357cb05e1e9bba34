"""Seconds and memory of a DPO step: Plumbline, the naive way and TRL's DPOTrainer on the same weights and pairs.

    python benchmarks/step.py                                          # small, bf16, all sides, seconds
    python benchmarks/step.py --size small medium --precision bf16 fp32 --measure seconds memory --only "TRL compact"

A step is: policy forward, reference forward (every step, adapters off), DPO loss, backward, clipping, AdamW.
All sides start from pixels on the CPU that are already preprocessed and stacked, so reading and resizing images is
not counted.

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
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from losses.dpo import dpo_loss
from model.checkpoint import load_llava
from model.logprobs import Scorer, Sequence, naive_logprobs, pack
from model.lora import TARGETS, Reference, add_lora, lora_layers
from model.views import single, stack

try:
    import peft
    import transformers
    import trl
    import trl.trainer.utils as trl_utils
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    sys.exit(f"This benchmark needs the peers it compares with: pip install transformers peft trl ({error})")

BETA, CLIP = 0.1, 1.0
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
OURS, NAIVE, COMPACT, STOCK = VARIANTS = ("Plumbline", "naive", "TRL compact", "TRL stock")
Step = Callable[[], tuple[float, float]]  # runs one step; loss and gradient norm before clipping


@dataclass(frozen=True)
class Size:
    """Shapes of the two networks and of the batch; pairs of numbers are inclusive ranges of token counts."""

    width: int
    layers: int
    heads: int
    ffn: int
    vision_width: int
    vision_layers: int
    image: int = 336
    patch: int = 14
    vocabulary: int = 32064
    rank: int = 128
    pairs: int = 4
    prompt: tuple[int, int] = (40, 44)  # without image tokens
    response: tuple[int, int] = (90, 109)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "tiny": Size(160, 4, 5, 432, 128, 5, image=96, patch=12, vocabulary=256, rank=32, pairs=16,
                 prompt=(14, 20), response=(35, 55)),
    "small": Size(512, 8, 8, 1408, 256, 6),
    "medium": Size(1024, 16, 16, 2816, 512, 12),
}


class Pair(NamedTuple):
    """Token ids of one preference pair."""

    prompt: tuple[int, ...]  # with its image tokens
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def draw_batch(size: Size) -> tuple[list[Pair], Tensor]:
    """Random pairs and their pixels (pairs, 3, S, S); the image token is the last of the vocabulary but one."""
    rng = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = torch.randint(low, high + 1, (), generator=rng).item()
        return tuple(torch.randint(3, size.vocabulary - 2, (count,), generator=rng).tolist())

    image = (size.vocabulary - 2,) * (size.image // size.patch) ** 2
    pairs = []
    for _ in range(size.pairs):
        text = tokens(*size.prompt)
        pairs.append(Pair(text[:10] + image + text[10:], tokens(*size.response), tokens(*size.response)))
    return pairs, torch.randn(size.pairs, 3, size.image, size.image, generator=rng)


def write_checkpoint(size: Size, folder: str) -> None:
    """A llava-hf folder with random weights."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=size.vision_width, intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_width // 32 if size.vision_width < 256 else size.vision_width // 64,
        image_size=size.image, patch_size=size.patch,
    )
    text = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, intermediate_size=size.ffn,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=2048,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=size.vocabulary - 2
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


def our_steps(folder: str, size: Size, dtype: torch.dtype, checkpointing: bool) -> tuple[dict[str, Step], dict]:
    """Steps of Plumbline and of the naive way, which share one model; and the model's LoRA layers by name."""
    pairs, pixels = draw_batch(size)
    model = load_llava(folder, dtype).requires_grad_(False)
    torch.manual_seed(1)
    decoder = model.language_model.model
    add_lora(decoder, size.rank, 2 * size.rank)
    layers = lora_layers(decoder)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    decoder.checkpointing = checkpointing
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)
    autocast = torch.bfloat16 if dtype is torch.bfloat16 else None
    scorer, reference = Scorer(model, autocast), Reference(model)
    patches = model.config.vision.num_patches
    views = [single(image, patches) for image in pixels]
    tiles, rows = stack(views, patches)
    sequences = [Sequence(i, p.prompt, p.chosen) for i, p in enumerate(pairs)]
    sequences += [Sequence(i, p.prompt, p.rejected) for i, p in enumerate(pairs)]

    def finish(policy: Tensor, frozen: Tensor) -> tuple[float, float]:
        loss = dpo_loss(*policy.chunk(2), *frozen.chunk(2), beta=BETA)[0].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    def shared() -> tuple[float, float]:
        packed = pack(sequences, rows, model.config.image_token_index)
        features = model.vision_features(tiles)
        policy = scorer(packed, features)[0].sum(1)  # (2 pairs,)
        with reference():
            frozen = scorer(packed, features)[0].sum(1)
        return finish(policy, frozen)

    def naive() -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            policy = torch.stack([t.sum() for t in naive_logprobs(model, sequences, views)])
            with reference():
                frozen = torch.stack([t.sum() for t in naive_logprobs(model, sequences, views)])
        return finish(policy, frozen)

    return {OURS: shared, NAIVE: naive}, layers


def trl_batch(size: Size) -> dict[str, Tensor]:
    """The same batch as TRL's vision collator lays it out: chosen rows, then rejected rows, images repeated."""
    pairs, pixels = draw_batch(size)
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    batch = {k: torch.zeros(len(rows), width, dtype=torch.long)
             for k in ("input_ids", "attention_mask", "completion_mask")}
    for i, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        batch["input_ids"][i, :end] = torch.tensor(prompt + response)
        batch["attention_mask"][i, :end] = 1
        batch["completion_mask"][i, len(prompt) : end] = 1
    return batch | {"pixel_values": torch.cat([pixels, pixels])}


def trl_processor(size: Size) -> transformers.LlavaProcessor:
    """DPOTrainer demands a processor; it is never used, because the batch is ready."""
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<image>": size.vocabulary - 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    return transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer, patch_size=size.patch)


def trl_steps(folder: str, size: Size, dtype: torch.dtype, checkpointing: bool, ours: dict) -> dict[str, Step]:
    """Steps of DPOTrainer, with the LoRA weights of `ours`; its own `train` does the set-up (and one step)."""
    batch = trl_batch(size)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(r=size.rank, lora_alpha=2 * size.rank, lora_dropout=0.0, bias="none",
                      target_modules=rf".*language_model\..*\.({'|'.join(TARGETS)})")
    config = DPOConfig(
        folder, bf16=dtype is torch.bfloat16, use_cpu=True, gradient_checkpointing=checkpointing, beta=BETA,
        learning_rate=0.0, weight_decay=0.0, max_grad_norm=CLIP, per_device_train_batch_size=size.pairs,
        max_steps=1,
        max_length=None, remove_unused_columns=False, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )
    rows = Dataset.from_list([{"image": 0, "prompt": "", "chosen": "", "rejected": ""}] * size.pairs)
    trainer = DPOTrainer(base, args=config, train_dataset=rows, data_collator=lambda _: dict(batch),
                         processing_class=trl_processor(size), peft_config=lora)
    trainer.remove_callback(transformers.PrinterCallback)
    copied = 0
    for name, parameter in trainer.model.named_parameters():
        if ".lora_" in name:
            layer, leaf = name.removesuffix(".default.weight").split("language_model.")[1].rsplit(".", 1)
            parameter.data.copy_(getattr(ours[layer], leaf))
            copied += 1
    if copied != 2 * len(ours):
        raise RuntimeError(f"copied {copied} LoRA tensors to TRL, expected {2 * len(ours)}")
    trainer.train()
    own_rule = trl_utils._use_triton

    def step(rule: Callable) -> tuple[float, float]:
        trl_utils._use_triton = rule  # decides whether unlabelled positions are dropped before the head
        loss = trainer.training_step(trainer.model_wrapped, dict(batch))
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss.item(), float(norm)

    return {COMPACT: lambda: step(lambda device: True), STOCK: lambda: step(own_rule)}


def cpu_seconds(step: Step) -> float:
    """CPU seconds that one step takes."""
    gc.collect()
    start = time.process_time()
    step()
    return time.process_time() - start


def peak_mebibytes(step: Step) -> float:
    """High-water mark of resident memory while `step` runs, above the resident memory before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A KiB field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def return_freed_memory() -> None:
    """Start again with an allocator that gives blocks of 128 KiB and more back at once, so that freed tensors
    do not count as resident. It is slower than the default, hence only where memory is measured."""
    if THRESHOLD not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {THRESHOLD: str(2**17)})


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


def build(
    folder: str, size: Size, dtype: torch.dtype, only: list[str], modes: tuple[bool, ...]
) -> dict[tuple[str, bool], Step]:
    """(variant, checkpointing) -> step; every step has run once and agrees with the others."""
    steps = {}
    for checkpointing in modes:
        own, layers = our_steps(folder, size, dtype, checkpointing)
        peers = trl_steps(folder, size, dtype, checkpointing, layers) if {COMPACT, STOCK} & set(only) else {}
        chosen = {name: step for name, step in (own | peers).items() if name in only}
        print(f"checkpointing {'on' if checkpointing else 'off'}", file=sys.stderr)
        check({name: step() for name, step in chosen.items()}, exact=dtype is torch.float32)
        steps |= {(name, checkpointing): step for name, step in chosen.items()}
    return steps


class Setting(NamedTuple):
    """What a block of the table is about."""

    size: str
    precision: str
    pairs: int

    def build(self, folder: str, only: list[str], modes: tuple[bool, ...]) -> dict[tuple[str, bool], Step]:
        """As `build`."""
        size = replace(SIZES[self.size], pairs=self.pairs)
        write_checkpoint(size, folder)
        return build(folder, size, DTYPES[self.precision], only, modes)


def seconds(setting: Setting, only: list[str], rounds: int) -> dict[tuple[str, bool], float]:
    """CPU seconds of every (variant, checkpointing), taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        steps = setting.build(folder, only, (False, True))
        turns = [{key: cpu_seconds(step) for key, step in steps.items()} for _ in range(rounds)]
    return {key: statistics.median(turn[key] for turn in turns) for key in steps}


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
    return_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        print(peak_mebibytes(setting.build(folder, [name], (mode,))[name, mode]))


MEASURES = {"seconds": (seconds, "CPU s", 2), "memory": (memory, "peak MiB", 0)}


def rows(setting: Setting, measures: list[str], only: list[str], rounds: int) -> list[str]:
    """The lines of the table about a setting."""
    values = [MEASURES[m][0](setting, only, rounds) for m in measures]
    lines = []
    for name, checkpointing in values[0]:
        cells = [setting.size, setting.precision, setting.pairs, name, "on" if checkpointing else "off"]
        for measure, value in zip(measures, values):
            own = value[name, checkpointing]
            cells += [f"{own:.{MEASURES[measure][2]}f}", f"{own / value[OURS, checkpointing]:.2f}x"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
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
          f"peft {peft.__version__}\n")
    head = ["size", "precision", "pairs", "step", "checkpointing"]
    head += [cell for m in args.measure for cell in (MEASURES[m][1], f"vs {OURS}")]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for setting in settings:  # each may take many minutes
        print(*rows(setting, args.measure, only, args.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
