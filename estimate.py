"""train.py --estimate: what a run would take, memory and hours, before anything large is loaded.

    python train.py --loss dpo --data pairs.jsonl --model DIR --checkpointing --estimate

Batches are cut from the records as the run would cut them, of texts and the headers of images; the largest micro-batch
among the first STEPS steps goes through the scoring core of the model on tensors without numbers (model/estimate.py).
Memory is what that takes. Operations are scaled from its tokens to those of a mean step, of each device; time follows
from --tflops, what a device is assumed to reach. Of losses that sample, samples count as long as they may get, and what
sampling itself takes is left out: it is bound by memory, not by operations.

Under torchrun it is that of one of the processes; with --shard they share weights, gradients and optimiser state. What
several processes add is not counted: what they send to each other, the layer that --shard gathers, and waiting.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Batch, collate, scored, tokens_of
from data.images import references
from data.order import MicroBatches
from data.processor import Processor
from model.checkpoint import outline
from model.estimate import Cost, cost_of, hollow, kept
from model.lora import Reference
from model.vlm import VLM
from options import Recipe
from prepare import make_policy, set_checkpointing, weights_dtype, with_trained

STEPS = 500  # how many of them are looked at
GIB = 2**30
DEVICE = 80 * 10**9  # bytes of a device where there is none to ask: an H100's


class Load(NamedTuple):
    """What goes through the decoder."""

    mean: float  # tokens of a step, of a device
    largest: int  # of a micro-batch
    rows: list[dict]  # the records of that one
    micro_batches: float  # mean of a step


def report(args: argparse.Namespace, recipe: Recipe, processor: Processor, records: list[dict], root: Path | None,
           world: int) -> str:
    """What to print: parameters, tokens, operations, memory by term, hours, and what to change if it does not fit."""
    sequences, rows = to_score(args, recipe, processor, records)
    lengths = [tokens_of(row, sequences, processor, root, recipe.rewards) for row in rows]
    load = load_of(args, rows, lengths, world)
    batch = collate(load.rows, sequences, processor, root, end=recipe.rewards, blank=True)
    model = with_trained(args, outline(args.model, weights_dtype(args)))
    whole = argparse.Namespace(**vars(args) | {"shard": False})
    scorer = make_policy(whole, recipe, model, torch.device("meta"), 1).plain.train()
    shards = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if args.shard else 1  # model/shard.py
    terms, costs = {name: size // shards for name, size in kept(scorer).items()}, {}
    with hollow(scorer):
        for on in (True, False):
            set_checkpointing(model, on)
            costs[on] = cost_of_step(args, recipe, scorer, model, batch, load.micro_batches > 1)
    cost, saved = costs[args.checkpointing], costs[False].peak - costs[True].peak
    terms["activations"] = cost.peak - shards * terms["gradients"]
    total, other = sum(terms.values()), "without" if args.checkpointing else "with"
    flops = cost.flops * load.mean / len(batch.packed.ids)
    shown = {(how.image, how.view, how.hidden) for how in scored(sequences).values()}
    images = max(sum(len(references(row[field])) for field, *_ in shown) for row in rows)
    trained = sum(p.numel() for p in scorer.parameters() if p.requires_grad)
    return "\n".join([
        f"parameters    {sum(p.numel() for p in scorer.parameters()):,}, of which {trained:,} train",
        f"records       {len(rows):,}: {sum(lengths) / len(rows):,.0f} tokens each, at most {max(lengths):,};"
        f" at most {images} image{'s' * (images > 1)}",
        f"step          {args.batch_size // world} records a device, {load.mean:,.0f} tokens,"
        f" {load.micro_batches:.1f} micro-batches, the largest of {load.largest:,} tokens",
        f"operations    {flops / 1e12:,.3g} TFLOP a step and device",
        "memory        GiB of a device",
        *(f"  {name:14}{size / GIB:8.2f}" for name, size in terms.items()),
        f"  {'total':14}{total / GIB:8.2f}",
        f"  {other} --checkpointing {(total - cost.peak + costs[not args.checkpointing].peak) / GIB:.2f}",
        f"time          {flops * args.steps / args.tflops / 3.6e15:,.2g} hours for {args.steps:,} steps at"
        f" {args.tflops:g} TFLOP/s a device",
        *advice(args, terms, saved),
    ])


def to_score(args: argparse.Namespace, recipe: Recipe, processor: Processor, records: list[dict],
             ) -> tuple[dict[str, dict], list[dict]]:
    """(sequences, records with all fields that they read): samples are as long as --max-new-tokens lets them get."""
    sequences = recipe.sequences
    if recipe.advantages:
        sequences = {f"sample {i}": {"image": "image", "response": f"sample {i}"} for i in range(args.samples)}
    words = [i for i in range(processor.config.text.vocab_size) if i != processor.image_id]
    fields = sorted({how.response for how in scored(sequences).values()})
    made = {field: [words[i], *[processor.eos_id] * (args.max_new_tokens - 1)] for i, field in enumerate(fields)
            } if recipe.samples else {}
    return sequences, [made | record for record in records]


def load_of(args: argparse.Namespace, rows: list[dict], lengths: list[int], world: int) -> Load:
    """Batches as the run will cut them."""
    by_length = args.max_tokens or args.group_by_length
    plan = MicroBatches(rows, batch_size=args.batch_size, rank=0, world=world, seed=args.seed, steps=args.steps,
                        make=None, micro_batch_size=args.micro_batch_size, max_tokens=args.max_tokens,
                        lengths=lengths if by_length else None, group_by_length=args.group_by_length)
    steps = range(min(args.steps, STEPS))
    chosen = [[plan.row(place) for place in part] for step in steps for part in plan.parts(step)]
    sizes = [sum(lengths[row] for row in part) for part in chosen]
    largest = sizes.index(max(sizes))
    return Load(sum(sizes) / len(steps), sizes[largest], [rows[row] for row in chosen[largest]],
                len(chosen) / len(steps))


def cost_of_step(args: argparse.Namespace, recipe: Recipe, scorer: nn.Module, model: VLM, batch: Batch,
                 accumulates: bool) -> Cost:
    """Of everything that is scored of a micro-batch, and the backward; the peak with gradients, those of the
    micro-batches before where it `accumulates`."""
    reference, pixels = Reference(model), torch.zeros(batch.pixels.shape)
    trained = [p for p in scorer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if accumulates else None

    def learn(seen: Tensor) -> None:
        outputs = scorer(batch.packed, seen)
        sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else [outputs]) if x.requires_grad).backward()

    def step() -> None:
        seen = model.seen(pixels)
        with torch.no_grad():
            if batch.noisy is not None:
                scorer.likeliest(batch.noisy, seen)
            if recipe.advantages:
                scorer(batch.packed, seen)  # the log-probs of the policy that sampled
        if recipe.compares and not args.reference_cache:
            with reference():
                scorer(batch.packed, seen)
        learn(seen)

    whole = cost_of(step)
    more = (args.inner_epochs - 1) * cost_of(partial(learn, model.seen(pixels))).flops if recipe.advantages else 0
    given = sum(p.nbytes for p in trained) if accumulates else 0
    return Cost(whole.flops + more, whole.peak + given)


def advice(args: argparse.Namespace, terms: dict[str, int], saved: int) -> list[str]:
    """What to change, most effective first, where it does not fit into a device."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_properties(0).total_memory if cuda else DEVICE
    if sum(terms.values()) < 0.95 * device:
        return []
    change = {
        "--checkpointing": 0 if args.checkpointing else saved,
        "--shard on several devices": 0 if args.shard else sum(terms.values()) - terms["activations"],
        "--reference-cache": 0 if args.reference_cache else terms["reference"],
        "adapters in place of all weights (--lora-rank 128)": 0 if args.lora_rank else sum(terms.values()) / 2,
        "a smaller --max-tokens or --micro-batch-size": terms["activations"] / 2,
        "--precision bf16": 0 if args.precision == "bf16" else terms["weights"] / 2,
    }
    ranked = sorted((size, text) for text, size in change.items() if size > GIB)[::-1]
    return [f"does not fit  into {device / GIB:.0f} GiB; what helps: {'; '.join(text for _, text in ranked)}"]
