"""Time and memory at a model's full shapes: write, load, one AdaViP step, 16 generated tokens.

    python benchmarks/full_size.py                       LLaVA-1.5-7B: 14.1 GB in a temporary folder, about 19 GiB of
                                                         memory
    python benchmarks/full_size.py --family janus        Janus-Pro-1B, what understands images: 3.9 GB
    python benchmarks/full_size.py --layers 2            a quick look; what the layers cost scales with them
    python benchmarks/full_size.py --folder DIR          keep the checkpoint, or use the one that is there

The weights are random: speed and memory do not depend on their values. They are bf16 and written shard by shard, so
writing needs one shard of memory. The step is what `train.py --loss adavip --precision bf16 --checkpointing` does with
one pair: two images, chosen and rejected response, reference = the model with its adapters off, LoRA on all linear
layers of the decoder in fp32 (rank 128 as in the papers), AdamW. The generation goes on with these adapters.

Peak memory is the kernel's high-water mark of resident memory during each phase (/proc, so Linux only). On a CPU the
loaded weights are pages of the mapped file, read when they are first used: they count in the peak, but the system may
drop them and read them again, so what must fit is the anonymous memory and whatever speed asks for beyond it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import rig
from model.checkpoint import load_llava
from model.config import LlamaConfig
from model.families import find_family
from model.generate import generate
from model.janus import JanusConfig
from model.tensors import save_json, save_shards
from model.vlm import VLM

SIGLIP_L = replace(rig.LLAVA_7B.vision, image_size=384, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu")
DEEPSEEK = LlamaConfig(vocab_size=102400, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
                       num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=16384)
FAMILIES = {"llava": rig.LLAVA_7B, "janus": JanusConfig(SIGLIP_L, DEEPSEEK)}
SHARD_BYTES = 1_000_000_000
BLOCK = 1_000_003  # a prime, so that rows of a matrix do not repeat


def write_checkpoint(folder: Path, config) -> int:
    """A folder as `transformers` reads it, with random bf16 weights; returns their bytes. Exits when the disk is too
    full."""
    family = find_family({"model_type": config.model_type})
    with torch.device("meta"):
        shapes = {family.saved_name(n): tensor.shape for n, tensor in family.Model(config).state_dict().items()}
    size, free = sum(2 * shape.numel() for shape in shapes.values()), shutil.disk_usage(folder).free
    if free < 1.05 * size:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free, the checkpoint takes {size / 1e9:.1f} GB; "
                 "choose another --folder or fewer --layers")
    tensors = {name: partial(random_weight, name, shape) for name, shape in shapes.items()}
    save_shards(tensors, folder, SHARD_BYTES)
    save_json(family.hf_config(config), folder / "config.json")  # last: a folder without it is not complete
    return size


def random_weight(name: str, shape: torch.Size) -> Tensor:
    """Norms are 1, the rest repeats a million numbers (std 0.02): drawing them all takes minutes."""
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    block = torch.empty(min(shape.numel(), BLOCK)).normal_(std=0.02).bfloat16()
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)


def load(folder: Path, rank: int) -> tuple[VLM, torch.optim.Optimizer]:
    """Model with adapters and optimiser, as train.py sets them up."""
    model = load_llava(folder, torch.bfloat16)
    return model, rig.with_adapters(model, rank, lr=1e-6, checkpointing=True, std=0.0)


def train_step(model: VLM, optimizer: torch.optim.Optimizer, shapes: rig.Shapes) -> None:
    """One AdaViP step, the first: policy and reference are equal."""
    loss, norm = rig.make_step(model, optimizer, shapes, "adavip", autocast=torch.bfloat16)()
    if not torch.isfinite(norm) or abs(loss.item() - 1.0986) > 1e-2:
        sys.exit(f"loss {loss.item():.4f} should be ln 3, and gradient norm {norm.item():.4f} finite")


def measure(phase: Callable[[], object]) -> tuple[object, rig.Row]:
    """(result, figures): CPU seconds are of all threads, GiB are resident at the peak, anonymous at the end."""
    rig.reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    result = phase()
    return result, {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - cpu,
                    "peak GiB": rig.resident("VmHWM") / 2**30,
                    "anonymous GiB at the end": rig.resident("RssAnon") / 2**30}


def run(folder: Path, args: argparse.Namespace) -> list[rig.Row]:
    """All phases: their figures, with how much was done a second."""
    config = FAMILIES[args.family]
    layers = args.layers or config.text.num_hidden_layers
    config = replace(config, text=replace(config.text, num_hidden_layers=layers))
    shapes, rows = rig.Shapes(config, args.rank, pairs=1, prompt=(40, 40), response=(100, 100)), []

    def add(phase: str, amount: float, unit: str, figures: rig.Row) -> None:
        rows.append({"phase": phase, **figures, "throughput": f"{amount / figures['seconds']:.2f} {unit}/s"})

    if not (folder / "config.json").is_file():
        size, figures = measure(lambda: write_checkpoint(folder, config))
        add("write", size / 1e9, "GB", figures)
    (model, optimizer), figures = measure(lambda: load(folder, args.rank))
    size = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    add("load", size / 1e9, "GB", figures)
    tokens = len(rig.packed_batch(shapes, "adavip", torch.device("cpu"))[1].ids)  # shared prefixes count once
    _, figures = measure(lambda: train_step(model, optimizer, shapes))
    add("train step", tokens, "tokens", figures)
    optimizer = None  # its memory is not part of what follows
    views, sequences = rig.draw_batch(shapes)
    prompt = [list(sequences[0].prompt)]
    _, figures = measure(lambda: generate(model, views, prompt, eos_id=-1, max_new_tokens=args.tokens))
    add(f"generate {args.tokens}", args.tokens, "tokens", figures)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{args.family}, {layers} decoder layers, {size / 2e9:.2f} B weights in bf16 ({size / 2**30:.1f} GiB), LoRA "
          f"rank {args.rank}: {trained / 1e6:.0f} M weights in fp32, {tokens} tokens a step, "
          f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    return rows


def main() -> None:
    """Rehearse one step at full size and print seconds and memory of its parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the checkpoint there (default: a temporary folder)")
    parser.add_argument("--family", choices=FAMILIES, default="llava", help="whose shapes (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all)")
    parser.add_argument("--rank", type=int, default=128, help="of the adapters (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="to generate (default: %(default)s)")
    args = parser.parse_args()
    rig.restart_with("MALLOC_TRIM_THRESHOLD_", 2**20)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(rig.table(run(folder, args)))


if __name__ == "__main__":
    main()
