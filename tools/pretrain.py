"""How the embedded model was made: a CLIP and a tiny LLaVA, from random weights, on the scene world.

    python -m tools.pretrain tokenizer                              (seconds)
    python -m tools.pretrain clip                                   (about 7 minutes on one core)
    torchrun --nproc-per-node 2 -m tools.pretrain llava             (about 19 minutes on two cores)
    torchrun --nproc-per-node 2 -m tools.pretrain captions          (about 11 minutes on two cores)

Each stage writes into --out (default runs/tiny) and reads what the stage before left there.

CLIP learns three things at once: to name the class of each patch (a linear head on the layer that LLaVA
reads, thrown away afterwards; without it a transformer this small needs far more images), to tell which "a
photo of a dog" is true of an image (a sigmoid loss, Zhai et al. 2023, arXiv 2303.15343), and to match
images with captions (InfoNCE, Radford et al. 2021, arXiv 2103.00020).

LLaVA then learns to describe and to answer, with the vision tower frozen. One row is one image with a
caption and several questions, which share the image and do not see each other: the scoring core's shared
prefix, used for supervised training. Yes / no questions are learnt long before captions, so the last stage
goes on with three captions and one question an image. Captions mention an absent object with probability
--caption-noise: the habit of real caption data that preference alignment is there to cure.

The weights in model/tiny were trained with a cosine that began at step 0; here it begins after the warm-up.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import read_json
from data import scenes
from data.processor import ClipProcessor, Processor
from model.checkpoint import DEFAULT_MODEL, load_clip, load_llava
from model.clip import CLIP
from model.config import clip_config
from model.families import TEMPLATES
from model.families.llava import llava_config
from model.llava import Llava
from model.logprobs import Scorer, Sequence, pack
from model.tensors import save_tensors
from model.training import learning_rate, ranks, set_learning_rate, start_processes
from model.views import preprocess

# "</s>" is not 2: in a CLIP config, eos_token_id = 2 signals an old bug that pools at the largest id instead.
SPECIAL = ("<unk>", "<s>", "<pad>", "</s>", "<image>")


# -------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(out: Path) -> None:
    """Byte-fallback BPE as in LLaMA, small enough that every word of the world becomes one token; and next to it the
    configurations of the two models."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("\n"), "isolated"),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        pre_tokenizers.Punctuation("isolated"),
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()])  # fmt: skip
    tokenizer.normalizer = normalizers.NFC()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    # The trainer marks the bytes as special too, and decoding would skip them.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    for folder in (Path(), Path("clip")):
        (out / folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / folder / "tokenizer.json"))
        for name in ("config.json", "preprocessor_config.json"):  # which have the size of this vocabulary
            shutil.copyfile(DEFAULT_MODEL / folder / name, out / folder / name)


def _corpus():
    template = TEMPLATES["hf"]
    before, after = template.before.removeprefix("<s>"), template.image.removeprefix("<image>") + template.after
    for category in scenes.CATEGORIES:
        for _ in range(20):
            yield phrase(category)
            yield after.format(prompt=scenes.exist_question(category))
    for seed in range(3000):
        scene, rng = scenes.sample_scene(scenes.TRAIN + seed), random.Random(seed)
        yield before
        yield after.format(prompt=scenes.CAPTION_PROMPT)
        yield scenes.caption(scene, rng, noise=0.5)
        for question, answer, _ in scenes.questions(scene, rng):
            yield after.format(prompt=question)
            yield answer


def phrase(category: str) -> str:
    """The text that represents a class in the sigmoid loss."""
    return f"a photo of {'an' if category[0] in 'aeiou' else 'a'} {category}"


# ------------------------------------------------------------------------------------------------------- CLIP


def train_clip(out: Path, steps: int, batch: int, seed: int, lr: float = 1e-3) -> None:
    """Train both towers and write out/clip."""
    torch.manual_seed(seed)
    config, processor = clip_config(read_json(out / "clip" / "config.json")), ClipProcessor(out / "clip")
    clip = CLIP(config)
    _init_clip(clip)
    patch_head = nn.Linear(config.vision.hidden_size, len(scenes.CATEGORIES) + 1)
    bias = nn.Parameter(torch.tensor(-4.0))  # of the sigmoid loss: most classes are absent
    optimizer = torch.optim.AdamW([*clip.parameters(), *patch_head.parameters(), bias], lr=lr, weight_decay=0.05,
                                  betas=(0.9, 0.98))
    phrases = [processor.text(phrase(c)) for c in scenes.CATEGORIES]
    bar = tqdm(range(steps), desc="clip")
    for step in bar:
        set_learning_rate(optimizer, learning_rate(lr, step, steps, warmup=100))
        group = [scenes.sample_scene(scenes.TRAIN + step * batch + i) for i in range(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            loss, metrics = _clip_loss(clip, patch_head, bias, processor, phrases, group, step)
        _update(optimizer, loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", **{k: f"{v:.3f}" for k, v in metrics.items()})
    save_tensors(clip.state_dict(), out / "clip" / "model.safetensors", torch.float16)


def _clip_loss(clip, patch_head, bias, processor, phrases, group, step) -> tuple[Tensor, dict[str, float]]:
    tower = clip.vision_model
    states = tower.pre_layrnorm(tower.embeddings(_pixels(group, processor)))
    for layer in tower.encoder.layers[:-1]:
        states = layer(states, False)  # penultimate: what LLaVA reads
    patches = patch_head(states[:, 1:]).flatten(0, 1)  # (B P, classes + 1)
    labels = torch.stack([torch.as_tensor(scenes.patch_labels(s)).long().flatten() for s in group]).flatten()
    patch_loss = F.cross_entropy(patches.float(), labels)

    cls = tower.post_layernorm(tower.encoder.layers[-1](states, False)[:, 0])
    images = F.normalize(clip.visual_projection(cls).float(), dim=-1)  # (B, E)
    classes = clip.text_embeddings(phrases).float()  # (classes, E)
    present = [scenes.objects_present(s) for s in group]
    truth = torch.tensor([[float(c in p) for c in scenes.CATEGORIES] for p in present])  # (B, classes)
    scale = clip.logit_scale.exp()
    logits = scale * images @ classes.T + bias
    loss = patch_loss + 4 * F.binary_cross_entropy_with_logits(logits, truth)
    if step % 4 == 0:
        rng = random.Random(step)
        texts = [processor.text(scenes.caption(s, rng)) for s in group]
        match = scale * images @ clip.text_embeddings(texts).float().T  # (B, B)
        target = torch.arange(len(group))
        loss = loss + (F.cross_entropy(match, target) + F.cross_entropy(match.T, target)) / 2
    with torch.no_grad():
        foreground = labels < len(scenes.CATEGORIES)
        hit = ((logits > 0) == truth.bool())[truth.bool()].float().mean()
        accuracy = (patches.argmax(-1) == labels)[foreground].float().mean()
    return loss, {"patch": accuracy.item(), "recall": hit.item()}


def _init_clip(clip: CLIP) -> None:
    for name, p in clip.named_parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.02 if "embedding" in name else p[0].numel() ** -0.5)
    nn.init.normal_(clip.vision_model.embeddings.class_embedding, std=0.02)


# ------------------------------------------------------------------------------------------------------ LLaVA


class Stage(NamedTuple):
    """Settings of a stage of LLaVA training; captions and questions are those of one image."""

    steps: int
    lr: float
    captions: int
    questions: int
    room: int  # tokens of one row after the image
    noise: float
    first: int  # scene seed


STAGES = {
    "llava": Stage(3150, 2e-3, captions=1, questions=6, room=160, noise=0.5, first=0),
    "captions": Stage(1600, 1.5e-3, captions=3, questions=1, room=200, noise=0.6, first=100_000),
}


def train_llava(out: Path, stage: Stage, batch: int, seed: int, cached: int, resume: bool) -> None:
    """Train projector and decoder on captions and questions and write out/model.safetensors.

    Args:
        cached: scenes whose patch features are kept in memory.
        resume: go on from out/model.safetensors instead of random weights.
    """
    rank, world = ranks()
    start_processes(world)
    torch.manual_seed(seed)
    processor, vision = Processor(out), load_clip(out / "clip").vision_model.state_dict()
    if resume:
        model = load_llava(out).train()
    else:
        model = Llava(llava_config(read_json(out / "config.json")))
        _init_llava(model)
        tower = model.vision_tower.vision_model
        tower.load_state_dict({k: v for k, v in vision.items() if k in tower.state_dict()})
    model.vision_tower.requires_grad_(False)

    seeds = range(stage.first + rank, stage.first + cached, world)
    pool, features = _cache_features(model, processor, seeds, show=rank == 0)
    scorer = Scorer(model, torch.bfloat16)
    wrapped = DistributedDataParallel(scorer) if world > 1 else scorer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.02)
    order, rng = _endless(len(pool), seed + rank), random.Random(1000 * seed + rank)
    started = time.time()
    bar = tqdm(range(stage.steps), desc="steps", disable=rank > 0)
    for step in bar:
        set_learning_rate(optimizer, learning_rate(stage.lr, step, stage.steps, warmup=60))
        chosen = [next(order) for _ in range(batch // world)]
        rows = [segments(pool[i], processor, rng, stage) for i in chosen]
        loss, parts = _llava_loss(wrapped, processor, rows, features[chosen].float())
        _update(optimizer, loss)
        if step % 20 == 0:
            bar.set_postfix(parts)
    if rank == 0:
        tower = {f"vision_tower.vision_model.{k}": v for k, v in vision.items()}
        save_tensors({**model.state_dict(), **tower}, out / "model.safetensors", torch.float16)
        print(f"trained {stage.steps} steps of {batch} images in {time.time() - started:.0f} s")
    if world > 1:
        dist.destroy_process_group()


def segments(scene, processor: Processor, rng: random.Random, stage: Stage) -> list[tuple]:
    """Captions and questions in exactly `stage.room` tokens: (ids, kind of each token) of each segment.

    kinds: 0 not trained (questions, filling), 1 caption, 2 the Yes or No, 3 other answer tokens. The longest segment is
    filled or cut, because matrix libraries prepare for every new shape, and equal steps spare that.
    """
    prompt, count = scenes.CAPTION_PROMPT, stage.captions + stage.questions
    texts = [(prompt, scenes.caption(scene, rng, stage.noise), "caption") for _ in range(stage.captions)]
    while len(texts) < count:  # a sparse scene does not have six questions at once
        texts += scenes.questions(scene, rng)
    result = []
    for question, answer, kind in texts[:count]:
        head = processor.prompt(question)[len(shared_prefix(processor)) :]
        tail = processor.response(answer)
        decides, rest = {"caption": (1, 1), "exist": (2, 3)}.get(kind, (3, 3))
        result.append((head + tail, [0] * len(head) + [decides] + [rest] * (len(tail) - 1)))
    longest = max(range(count), key=lambda i: len(result[i][0]))
    ids, kinds = result[longest]
    size = len(ids) + stage.room - sum(len(segment) for segment, _ in result)
    filling = max(0, size - len(ids))
    result[longest] = ((ids + [processor.eos_id] * filling)[:size], (kinds + [0] * filling)[:size])
    return result


def shared_prefix(processor: Processor) -> tuple[int, ...]:
    """What all prompts begin with: the image and the line break after it."""
    return tuple(processor.prompt("")[: len(processor.prefix) + 1])


def _llava_loss(scorer, processor, rows, features) -> tuple[Tensor, dict[str, str]]:
    """2 mean(caption tokens) + mean(Yes / No tokens) + mean(other answer tokens): one decisive token in a dozen
    would drown in a plain mean."""
    prefix = shared_prefix(processor)
    sequences = [Sequence(i, prefix, tuple(ids)) for i, row in enumerate(rows) for ids, _ in row]
    shown = torch.arange(features.shape[:2].numel()).chunk(len(rows))  # all patches of image i
    logps, mask = scorer(pack(sequences, shown, processor.image_id), features)  # (N, L)
    kinds = torch.zeros_like(mask, dtype=torch.long)
    for n, (_, kind) in enumerate(s for row in rows for s in row):
        kinds[n, : len(kind)] = torch.tensor(kind)
    parts = [-(logps * (kinds == k)).sum() / (kinds == k).sum().clamp(min=1) for k in (1, 2, 3)]
    shown = {name: f"{part.item():.3f}" for name, part in zip(("caption", "yes/no", "other"), parts)}
    return 2 * parts[0] + parts[1] + parts[2], shown


def _cache_features(model: Llava, processor: Processor, seeds, show: bool) -> tuple[list, Tensor]:
    pool, features = [scenes.sample_scene(scenes.TRAIN + s) for s in seeds], []
    for start in tqdm(range(0, len(pool), 64), desc="features", disable=not show):
        features.append(model.vision_features(_pixels(pool[start : start + 64], processor)).bfloat16())
    return pool, torch.cat(features)  # (scenes, P, C)


def _pixels(group: list, processor: Processor | ClipProcessor) -> Tensor:
    return torch.stack([preprocess(scenes.render(s), processor.preprocessing) for s in group])  # (B, 3, S, S)


def _init_llava(model: Llava) -> None:
    """Normal with std 1/sqrt(width), residual outputs smaller: the usual 0.02 leaves attention blind here."""
    width, layers = model.config.text.hidden_size, model.config.text.num_hidden_layers
    for name, p in model.named_parameters():
        if p.dim() == 2 and not name.startswith("vision_tower"):
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=width**-0.5 * ((2 * layers) ** -0.5 if residual else 1.0))


# ----------------------------------------------------------------------------------------------------- shared


def _update(optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def _endless(n: int, seed: int):
    """Indices 0..n-1 in a fresh random order, again and again."""
    rng = random.Random(seed)
    while True:
        order = list(range(n))
        rng.shuffle(order)
        yield from order


def main() -> None:
    """The command line: one stage of the pretraining."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tokenizer", "clip", *STAGES))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder that all stages share")
    parser.add_argument("--steps", type=int, help="optimiser steps (clip 1200, llava 3150, captions 1600)")
    parser.add_argument("--batch-size", type=int, help="images a step over all processes (clip 32, others 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=14_000, help="images whose features are kept (230 MB)")
    parser.add_argument("--caption-noise", type=float, help="share of captions with an absent object (.5, then .6)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.stage == "tokenizer":
        train_tokenizer(args.out)
    elif args.stage == "clip":
        train_clip(args.out, args.steps or 1200, args.batch_size or 32, args.seed)
    else:
        stage = STAGES[args.stage]
        noise = stage.noise if args.caption_noise is None else args.caption_noise
        stage = stage._replace(steps=args.steps or stage.steps, noise=noise)
        train_llava(args.out, stage, args.batch_size or 16, args.seed, args.scenes, resume=args.stage == "captions")


if __name__ == "__main__":
    main()
