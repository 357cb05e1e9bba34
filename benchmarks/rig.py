"""What the benchmarks of a step share: shapes, random pairs, the step of every side, time and memory, tables.

    reference forward (adapters off), policy forward, loss, backward, clipping, AdamW

All sides start from pixels that are preprocessed and stacked, and from tokens that are packed or padded.
"""

import ctypes
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.adavip import adavip_loss
from losses.dpo import dpo_loss
from model.config import LlamaConfig, VisionConfig
from model.families.llava import hf_config
from model.llava import LlavaConfig
from model.logprobs import Packed, Scorer, Sequence, naive_logprobs, pack
from model.lora import TARGETS, Reference, add_lora, lora_layers
from model.views import View, single, stack
from model.vlm import VLM

BETA, CLIP = 0.1, 1.0
LOSSES = {"dpo": dpo_loss, "adavip": adavip_loss}
Step = Callable[[], tuple[Tensor, Tensor]]  # runs one step; loss and gradient norm before clipping
Row = dict[str, object]  # of a table: column -> value


# ------------------------------------------------------------------------------------------------ shapes and pairs


def llava(*, width: int, layers: int, heads: int, ffn: int, vision_width: int, vision_layers: int, vision_heads: int,
          image: int = 336, patch: int = 14, vocabulary: int = 32064) -> LlavaConfig:
    """Shapes of LLaVA-1.5's kind; the image token is the last of the vocabulary but one."""
    vision = VisionConfig(hidden_size=vision_width, intermediate_size=4 * vision_width, num_hidden_layers=vision_layers,
                          num_attention_heads=vision_heads, image_size=image, patch_size=patch)
    text = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=heads, head_dim=width // heads)
    return LlavaConfig(vision, text, image_token_index=vocabulary - 2)


SMALL = llava(width=512, layers=8, heads=8, ffn=1408, vision_width=256, vision_layers=6, vision_heads=4)
LLAVA_7B = llava(width=4096, layers=32, heads=32, ffn=11008, vision_width=1024, vision_layers=24, vision_heads=16)


@dataclass(frozen=True)
class Shapes:
    """Of the network, its adapters and a batch; pairs of numbers are inclusive ranges of token counts."""

    config: LlavaConfig
    rank: int = 128
    pairs: int = 4
    prompt: tuple[int, int] = (40, 44)  # without image tokens
    response: tuple[int, int] = (90, 109)


def draw_batch(shapes: Shapes, loss: str = "dpo") -> tuple[list[View], list[Sequence]]:
    """Chosen responses to each image, then the rejected ones, and for AdaViP the chosen ones with other images."""
    rng, config, pairs = torch.Generator().manual_seed(0), shapes.config, shapes.pairs

    def tokens(low: int, high: int) -> tuple[int, ...]:
        count = torch.randint(low, high + 1, (), generator=rng).item()
        return tuple(torch.randint(3, config.image_token_index, (count,), generator=rng).tolist())

    image, rows = (config.image_token_index,) * config.tile_tokens, []
    for _ in range(pairs):
        text = tokens(*shapes.prompt)
        rows.append((text[:10] + image + text[10:], tokens(*shapes.response), tokens(*shapes.response)))
    sequences = [Sequence(i, row[0], row[which]) for which in (1, 2) for i, row in enumerate(rows)]
    if loss == "adavip":
        sequences += [Sequence(pairs + i, row[0], row[1]) for i, row in enumerate(rows)]
    side, images = config.vision.image_size, max(s.image for s in sequences) + 1
    return [single(x, config.tile_tokens) for x in torch.randn(images, 3, side, side, generator=rng)], sequences


def packed_batch(shapes: Shapes, loss: str, device: torch.device) -> tuple[Tensor, Packed]:
    """Pixels and the packed sequences, on the device."""
    views, sequences = draw_batch(shapes, loss)
    tiles, rows = stack(views, shapes.config.tile_tokens)
    return tiles.to(device), pack(sequences, rows, shapes.config.image_token_index).to(device)


# ------------------------------------------------------------------------------------------------ Plumbline's step


def with_adapters(model: VLM, rank: int, *, lr: float, checkpointing: bool, std: float = 0.01) -> torch.optim.AdamW:
    """Add LoRA, B ~ N(0, std), so that policy and reference differ; its optimiser."""
    torch.manual_seed(1)
    decoder = model.requires_grad_(False).language_model.model
    add_lora(decoder, rank, 2.0 * rank)
    for layer in lora_layers(decoder).values():
        torch.nn.init.normal_(layer.lora_B, std=std)
    decoder.checkpointing = checkpointing
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def make_step(model: VLM, optimizer: torch.optim.Optimizer, shapes: Shapes, loss: str = "dpo", *,
              autocast: torch.dtype | None = None, naive: bool = False) -> Step:
    """A step of Plumbline, or the naive one: a sequence at a time, the vision tower every time, full logits."""
    trained, function = optimizer.param_groups[0]["params"], LOSSES[loss]
    views, sequences = draw_batch(shapes, loss)
    tiles, packed = packed_batch(shapes, loss, model.device)
    scorer, reference, parts = Scorer(model, autocast), Reference(model), len(sequences) // shapes.pairs

    def logps(features: Tensor | None) -> Tensor:  # (sequences,)
        if features is not None:
            return scorer(packed, features)[0].sum(1)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast is not None):
            return torch.stack([t.sum() for t in naive_logprobs(model, sequences, views)])

    def step() -> tuple[Tensor, Tensor]:
        features = None if naive else model.vision_features(tiles)
        with reference():
            frozen = logps(features)
        losses, _ = function(*logps(features).chunk(parts), *frozen.chunk(parts), beta=BETA)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return losses.mean().detach(), norm

    return step


# ------------------------------------------------------------------------------------------------ peers


def peer_config(config: LlavaConfig):
    """The same shapes for transformers."""
    import transformers

    return transformers.LlavaConfig(**hf_config(config))


def trl_batch(shapes: Shapes, device: torch.device) -> dict[str, Tensor]:
    """The pairs as TRL's vision collator lays them out: chosen rows, then rejected rows, images repeated."""
    views, sequences = draw_batch(shapes)
    rows = {"input_ids": [s.prompt + s.response for s in sequences],
            "attention_mask": [[1] * len(s.prompt + s.response) for s in sequences],
            "completion_mask": [[0] * len(s.prompt) + [1] * len(s.response) for s in sequences]}
    batch = {key: pad_sequence(list(map(torch.tensor, value)), batch_first=True) for key, value in rows.items()}
    batch["pixel_values"] = torch.cat([view.pixels for view in views] * 2)
    return {key: value.to(device) for key, value in batch.items()}


def trl_trainer(model, shapes: Shapes, batch: dict[str, Tensor], *, lr: float, bf16: bool, checkpointing: bool):
    """TRL's DPOTrainer around a model of transformers; its `train` does the set-up, and one step."""
    import transformers
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<image>": shapes.config.image_token_index}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
    processor = transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tokenizer,
                                            patch_size=shapes.config.vision.patch_size)  # demanded, never used
    lora = LoraConfig(r=shapes.rank, lora_alpha=2 * shapes.rank, lora_dropout=0.0, bias="none",
                      target_modules=rf".*language_model\..*\.({'|'.join(TARGETS)})")
    config = trl.DPOConfig(
        tempfile.gettempdir(), bf16=bf16, use_cpu=model.device.type == "cpu", gradient_checkpointing=checkpointing,
        beta=BETA, learning_rate=lr, weight_decay=0.0, max_grad_norm=CLIP, per_device_train_batch_size=shapes.pairs,
        max_steps=1, max_length=None, remove_unused_columns=False, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    rows = Dataset.from_list([{"image": 0, "prompt": "", "chosen": "", "rejected": ""}] * shapes.pairs)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=rows, peft_config=lora,
                             data_collator=lambda _: dict(batch), processing_class=processor)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trl_step(trainer, batch: dict[str, Tensor], compact: bool = True) -> tuple[Tensor, Tensor]:
    """A step of DPOTrainer. compact: score the response positions only, as TRL does on CUDA."""
    import trl.trainer.utils

    rule = mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True)  # whether the others are dropped
    with rule if compact else nullcontext():
        loss = trainer.training_step(trainer.model_wrapped, dict(batch))
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), CLIP)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss, norm


# ------------------------------------------------------------------------------------------------ time and memory


def cpu_seconds(sides: dict, rounds: int) -> dict:
    """Name -> median CPU seconds of calling what it names, the sides taking turns."""
    spent: dict = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            gc.collect()
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in spent.items()}


def restart_with(variable: str, limit: int) -> None:
    """Start this script again with a setting of the allocator, unless it has it: freed blocks of `limit` bytes and more
    are given back at once, so that they do not count as resident."""
    if variable not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {variable: str(limit)})


def reset_peak() -> None:
    """Let the kernel's high-water mark of resident memory, VmHWM, begin again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes (Linux only)."""
    return 1024 * int(re.search(rf"^{field}:\s*(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


# ------------------------------------------------------------------------------------------------ tables


def table(rows: list[Row]) -> str:
    """Rows as Markdown: one table for those with the same first key."""
    lines: list[str] = []
    for first in dict.fromkeys(next(iter(row)) for row in rows):
        same = [row for row in rows if next(iter(row)) == first]
        keys = list(dict.fromkeys(key for row in same for key in row))
        lines += ["", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
        lines += [f"| {' | '.join(shown(row.get(key)) for key in keys)} |" for row in same]
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """A cell of the table."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
