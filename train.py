"""Align a LLaVA-type model with preferences: given ones, or made of what it says while it trains.

    torchrun train.py --loss adavip                                     the embedded model, one process
    torchrun --nproc-per-node 2 train.py --loss dpo                     two processes, same losses
    torchrun --nproc-per-node 8 train.py --loss adavip --shard          weights and all spread over them (FSDP2)
    python train.py --loss rdpo --steps 20                              without torchrun
    python train.py --loss adavip --data pairs.jsonl --model DIR        your pairs, your LLaVA checkpoint
    python train.py --loss dpo --data rlaif-v.parquet --model DIR       published ones, as they are
    python train.py --loss dpo --anchor 1 --sft-weight 0.1              with terms that hold the chosen response
    python train.py --loss adavip --out runs/adavip --resume            go on after an interruption
    python train.py --loss adavip --resume --steps 90                   and make a run longer
    python train.py --loss reward_model                                 a reward model, for the next line
    python train.py --loss ppo --reward runs/reward_model               reinforcement; rloo too, fisao needs none
    python train.py --loss dpo --data pairs.jsonl --model DIR --estimate    what that would take: memory, hours
    python train.py --loss dpo --help                                   the options of one loss

With no --data it makes its pairs from the scene world (data/scenes.py), with the method that fits the loss,
and as long as the images are scenes it measures hallucination on held-out scenes before and after: CHAIR_s
(share of captions that mention an absent object), CHAIR_i (share of mentions that are of absent objects),
recall (share of present objects that are mentioned) and POPE (accuracy of yes / no answers).
Interrupted while it makes its pairs, it goes on with --resume.

One step is the loop of `train` below: records -> batch (data/batch.py) -> token log-probs of policy and reference
(model/logprobs.py) -> loss (losses/) -> AdamW. The reference is the model itself with its adapters off. A loss is
a pure function; its argument names say which log-probs it gets, its keyword arguments become options (options.py).
Terms that can be added to a loss are such functions too: a loss has those whose log-probs it scores anyway.
Losses that need samples draw them first: pairs from pairs/online.py, rollouts from reinforce.py.

--out receives: config.json (the resolved configuration, the command, the git commit, versions, and hashes of records
and model), pairs.jsonl and images/ (if made here), metrics.jsonl (one line an interval), checkpoint-STEP.pt (to resume;
with --shard a folder), model/ (llava-hf folder, adapters merged), adapters/ (PEFT's format, which has no place for a
vision tower that trains), result.json (before and after, and the records that --bad-records skip has replaced),
plots.svg; of reward_model reward_head.safetensors; of fisao baselines.json and scores.svg (what the verifier says of
words and sentences, before and after); of a judge at a URL its replies/; where TensorBoard is installed tensorboard/.
What an earlier run left there is replaced only with --overwrite. Two runs cannot write there at the same time.

Under torchrun --max-restarts N a run whose process was killed goes on by itself. A loss or gradient that is not finite
ends it before it touches the weights; bad-batch.json then has the records and metrics of that step.

What can be known of the records is checked before the model is loaded, and all bad ones are listed: fields, the
headers of images, special tokens in texts, responses beyond the decoder's window. That an image is damaged
inside shows when it is decoded: --bad-records says what happens then.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

import estimate
import reinforce
from common import held, run_script
from data.batch import Batch, with_seeds, without_bad
from data.order import Drawn, MicroBatches
from data.processor import Processor
from lifecycle import (
    STARTING,
    Run,
    announce,
    draw,
    end_at_bad_batch,
    give_up,
    go_on_after_a_crash,
    refuse_different_steps,
    replaced,
    save,
    stop_at,
)
from losses import (
    adavip,
    anchor,
    bdhs,
    dpo,
    dpo_weighted,
    fisao,
    ipo,
    lpoi,
    mdpo,
    povid,
    ppo,
    rdpo,
    reward_model,
    rloo,
    sft,
    slic,
    symmpo,
)
from model import reference, resume, training
from model.checkpoint import save_json
from model.log import Log
from model.logprobs import Packed
from model.lora import adapters_off
from model.training import Policy, StopRequest, learning_rate, named, pick, set_learning_rate
from options import Recipe, check, check_places, kwargs_of, read_arguments, unfinished_pairs
from pairs import online
from prepare import check_texts, find_records, load_model, make_judges, make_policy, read_records, record_lengths
from results import measurement, write_model, write_result

LOSSES = {
    "sft": Recipe(sft.sft_loss, sft.SEQUENCES, "rank", has=("sft_weight",)),
    "dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, "rank"),
    "ipo": Recipe(ipo.ipo_loss, ipo.SEQUENCES, "rank"),
    "slic": Recipe(slic.slic_loss, slic.SEQUENCES, "rank"),
    "slic_hf": Recipe(slic.slic_hf_loss, slic.SEQUENCES, "rank", has=("sft_weight",)),
    "dpo_weighted": Recipe(dpo_weighted.dpo_weighted_loss, dpo_weighted.SEQUENCES, "rank"),
    "rdpo": Recipe(rdpo.rdpo_loss, rdpo.SEQUENCES, "realign"),
    "rdpo_released": Recipe(rdpo.rdpo_loss, rdpo.SEQUENCES_RELEASED, "realign"),
    "mdpo": Recipe(mdpo.mdpo_loss, mdpo.SEQUENCES, "rank", has=("anchor",)),
    "adavip": Recipe(adavip.adavip_loss, adavip.SEQUENCES, "adavip"),
    "lpoi": Recipe(lpoi.lpoi_loss, lpoi.SEQUENCES, "adavip", has=("anchor",)),
    "symmpo": Recipe(symmpo.symmpo_loss, symmpo.SEQUENCES, "symmpo", has=("anchor",)),
    "povid": Recipe(povid.povid_loss, povid.SEQUENCES, "rank"),
    "povid_released": Recipe(povid.povid_loss, povid.SEQUENCES_RELEASED, "rank"),
    "reward_model": Recipe(reward_model.reward_model_loss, reward_model.SEQUENCES, "rank"),
    "online_dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, online=online.ranked_pairs),
    "mixed_dpo": Recipe(dpo.dpo_loss, dpo.SEQUENCES, "rank", online=online.mixed_pairs),
    "bdhs_online": Recipe(bdhs.bdhs_loss, bdhs.SEQUENCES, "rank", online=online.bdhs_triples),
    "ppo": Recipe(ppo.ppo_loss, reinforce.SEQUENCES, advantages=reinforce.ppo_advantages,
                  parts=(ppo.token_rewards, ppo.gae)),
    "rloo": Recipe(rloo.rloo_loss, reinforce.SEQUENCES, advantages=reinforce.rloo_advantages,
                   parts=(rloo.penalised, rloo.leave_one_out), inner_epochs=1),
    "fisao": Recipe(ppo.ppo_loss, reinforce.SEQUENCES, advantages=reinforce.fisao_advantages,
                    parts=(ppo.token_rewards, ppo.gae, fisao.mention_rewards, fisao.place)),
}
TERMS = {"anchor": anchor.anchor_loss, "sft_weight": sft.sft_loss}  # option of the weight -> what it adds to a loss
LOSSES = {name: recipe.with_terms(TERMS) for name, recipe in LOSSES.items()}


# ---------------------------------------------------------------------------------------------------- training


def train(run: Run, saved: dict | None = None) -> bool:
    """Run the steps that are left, all without `saved`. False when interrupted; the checkpoint then holds all that
    are done."""
    args, recipe, policy, model = run.args, run.recipe, run.policy, run.policy.model
    done = begin(run, saved)
    log = Log(args.out / "metrics.jsonl", args.steps, run.device, run.rank, run.world, saved, recipe.compares)
    stop = StopRequest(run.world)
    # After StopRequest, whose signal handlers the loader's processes inherit: Ctrl-C must not end them.
    micro_batches = load_micro_batches(run, done)
    model.train(not recipe.advantages)  # pi_old and pi must be the same function: no dropout
    for step in tqdm(range(done, args.steps), initial=done, total=args.steps, desc=args.loss,
                     disable=True if run.rank else None):
        torch.manual_seed(hash((args.seed, step, run.rank)))  # dropout; integers hash to the same in all processes
        rate = learning_rate(args.lr, step, args.steps, max(1, round(args.warmup * args.steps)), args.schedule)
        set_learning_rate(policy.optimizer, rate)
        drawn, bad = draw(run, micro_batches)
        if bad and not replaced(run, bad):
            save(run, done, log)
            stop.close()
            give_up(run, bad, done)
        log.begin_step()

        if run.learner:
            norm = reinforce.reinforce_step(run.learner, drawn, step, log)
        else:
            counted, tokens = [], 0
            for i, batch in enumerate(drawn):
                batch = (write_batch(run, batch) if recipe.online else batch).to(run.device)
                features = model.seen(batch.pixels)  # (tiles, P, C)
                packed = batch.packed if batch.noisy is None else pick_in_noise(policy, batch, batch.packed, features)
                inputs = batch.changed() if recipe.asks_for("chosen_changed") else {}  # (B, L) each
                if recipe.compares:  # reference_chosen_logps (B,), reference_chosen_token_logps (B, L), ...
                    inputs |= named("reference", batch.names, (reference_logps(run, batch, packed, features),))
                with policy.no_sync(more=i + 1 < len(drawn)):  # policy_chosen_logps (B,), chosen_mask (B, L), ...
                    inputs |= named("policy", batch.names, policy.scorer(packed, features))
                    losses, metrics = loss_of(recipe, args, inputs)  # (B,)
                    weighted = losses if batch.weights is None else losses * batch.weights
                    # All records of the process count, those of weight 0 too; DDP takes the mean over processes.
                    policy.backward(weighted.sum() * run.world / args.batch_size)
                counted.append({"loss": losses.detach(), **metrics, "weights": batch.weights})
                tokens += len(packed.ids)
            log.add(*joined(counted, tokens))
            norm = policy.update()
        if not math.isfinite(norm):
            stop.close()
            end_at_bad_batch(run, drawn, done + 1, log)

        done, halt = step + 1, stop.asked()
        if done % args.log_every == 0 or done == args.steps:
            replacements = {"bad_records": len(run.bad_records)} if run.bad_records else {}
            log.write(done, {"grad_norm": norm, "lr": rate, **replacements})
        if halt or done % args.save_every == 0 or done == args.steps:
            save(run, done, log)
        if halt:
            break
    stop.close()
    model.eval()
    return done == args.steps


def loss_of(recipe: Recipe, args: argparse.Namespace, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each record (B,), the terms that have a weight added, and its metrics, `loss/TERM` among them."""
    losses, metrics = recipe.loss(**pick(recipe.loss, inputs), **kwargs_of(recipe.loss, args))
    for name, term in recipe.terms.items():
        if weight := getattr(args, name):
            added, more = term(**pick(term, inputs), **kwargs_of(term, args))  # (B,)
            losses = losses + weight * added
            metrics = metrics | more | {f"loss/{term.__name__.removesuffix('_loss')}": added.detach()}
    return losses, metrics


def joined(counted: list[dict[str, Tensor | None]], tokens: int) -> tuple[dict[str, Tensor], int, Tensor | None]:
    """Metrics of a step's micro-batches, (B,) each, with their tokens and `weights`: what `Log.add` takes."""
    whole = {name: torch.cat([metrics[name] for metrics in counted])
             for name, value in counted[0].items() if value is not None}
    return {name: value for name, value in whole.items() if name != "weights"}, tokens, whole.get("weights")


def make_learner(run: Run) -> reinforce.Reinforcement:
    """Reinforcement by the recipe around the run's policy."""
    args, recipe = run.args, run.recipe
    return reinforce.Reinforcement(
        run.policy, run.processor, run.root, loss=partial(recipe.loss, **kwargs_of(recipe.loss, args)),
        advantages=recipe.advantages, parts=reinforce.bind(recipe.parts, vars(args)), judges=run.judges,
        settings=reinforce.Settings(**{name: getattr(args, name) for name in reinforce.Settings.__annotations__}))


def begin(run: Run, saved: dict | None) -> int:
    """Take over what a checkpoint holds, else measure what reinforcement needs. Returns the number of steps done."""
    if saved:
        run.policy.restore(saved) if run.args.shard else resume.restore(saved, run.policy)
        run.bad_records = saved["bad_records"]
        if run.learner:
            run.learner.memory = reinforce.Memory(**saved["reinforcement"])
        return saved["step"]
    if run.learner:
        baselines = run.args.baselines if "verifier" in run.judges else None
        with run.policy.whole():
            reinforce.calibrate(run.learner, run.records, baselines)
        if run.learner.memory.baselines and run.rank == 0:
            save_json(run.learner.memory.baselines, run.args.out / "baselines.json")
    return 0


def load_micro_batches(run: Run, done: int) -> Iterator[list[Drawn]]:
    """The micro-batches of this process, step by step: batches, or (record, seed) for losses that sample."""
    args, recipe = run.args, run.recipe
    make = partial(with_seeds, root=run.root) if recipe.samples else run.collate
    data = MicroBatches(run.records, batch_size=args.batch_size, rank=run.rank, world=run.world, seed=args.seed,
                        steps=args.steps, make=make, skip=args.bad_records == "skip",
                        micro_batch_size=args.micro_batch_size, max_tokens=args.max_tokens, lengths=run.lengths,
                        group_by_length=args.group_by_length)
    loader = iter(DataLoader(data, batch_size=None, sampler=data.keys(done), num_workers=args.workers,
                             pin_memory=run.device.type == "cuda" and not recipe.samples))
    return ([next(loader) for _ in data.parts(step)] for step in range(done, args.steps))


def write_batch(run: Run, drawn: list[tuple[dict, int]]) -> Batch:
    """Let the policy write the records of this step (pairs/online.py)."""
    records, seeds = [record for record, _ in drawn], [seed for _, seed in drawn]
    with run.policy.whole() as whole:
        records = run.recipe.online(records, seeds, whole.model, run.processor, run.root, **run.judges,
                                    **kwargs_of(run.recipe.online, run.args))
    return run.collate(records, seeds=seeds)


def pick_in_noise(policy: Policy, batch: Batch, packed: Packed, features: Tensor, where: Tensor | None = None,
                  ) -> Packed:
    """`packed` with the tokens that the model as it is now finds likeliest under noise, for the labels `where`, (n,)
    bool, or wherever tokens are picked."""
    mode = policy.model.training
    policy.model.eval()  # the choice is the model's, not its dropout's
    likeliest = policy.plain.likeliest(batch.noisy, features)
    policy.model.train(mode)
    labels = packed.labels.masked_scatter(batch.picked, likeliest)  # (n,)
    return replace(packed, labels=labels if where is None else torch.where(where, labels, packed.labels))


def reference_logps(run: Run, batch: Batch, packed: Packed, features: Tensor) -> Tensor:
    """Token log-probs under the reference (N, L), from the cache if there is one."""
    if run.cache is not None:
        rows = [run.cache[f"{name}/{i}"] for name in batch.names for i in batch.ids]
        return pad_sequence(rows, batch_first=True).to(run.device)
    with run.policy.reference():
        if batch.own is not None:
            packed = pick_in_noise(run.policy, batch, packed, features, batch.own)
        return run.policy.plain(packed, features)[0]


def reference_cache(run: Run) -> dict[str, Tensor]:
    """The reference's log-probs of every record that can be used, computed once and kept in --reference-cache."""
    args, bad = run.args, []

    def score(records: list[dict]) -> dict[str, Tensor]:
        """"NAME/ID" -> token log-probs of that sequence (tokens,)."""
        batch, refused = without_bad(records, run.collate)
        bad.extend(refused)
        if batch is None:
            return {}
        batch = batch.to(run.device)
        with torch.no_grad(), adapters_off(whole.model):  # nothing has trained yet
            logps, mask, *_ = whole.plain(batch.packed, whole.model.seen(batch.pixels))
        names = [f"{name}/{i}" for name in batch.names for i in batch.ids]
        return {name: row[m].cpu() for name, row, m in zip(names, logps, mask)}

    run.policy.model.eval()
    key = reference.fingerprint(args.model, run.records, run.recipe.sequences, run.processor, args.precision)
    with run.policy.whole() as whole:
        rows = reference.cached(args.reference_cache, key, run.records, run.recipe.sequences, score,
                                args.micro_batch_size, run.rank, run.world)
    stop_at(training.gather_all(bad, run.world), args.bad_records)
    return rows


def main(argv: list[str] | None = None) -> int:
    """From the command line to --out; 0 when finished, 1 when interrupted. Raises BadInput on bad input."""
    started, (rank, world) = time.perf_counter(), training.ranks()
    args = read_arguments(LOSSES, argv, __doc__)
    recipe = LOSSES[args.loss]
    go_on_after_a_crash(args)
    check(args, recipe, world)  # before processes wait for each other
    if args.estimate:
        return align(args, recipe, rank, world, started)
    check_places(args)
    with held(args.out) if rank == 0 else nullcontext():
        if rank == 0 and not training.restarts():
            (args.out / STARTING).touch()
        return align(args, recipe, rank, world, started)


def align(args: argparse.Namespace, recipe: Recipe, rank: int, world: int, started: float) -> int:
    """What `main` does once its settings are known to be possible."""
    config = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
              if k not in ("resume", "overwrite", "estimate", "tflops")}
    device = training.start_processes(world)
    args.resume = args.resume and not unfinished_pairs(args)
    saved = resume.read_checkpoint(args.out, config, rank) if args.resume else None
    refuse_different_steps(saved, args.out, world)
    processor = Processor(args.model, template=args.template, aspect=args.aspect)
    data = lengths = None
    if args.data:  # bad records are named before a large model is loaded
        data = read_records(args.data, recipe, args.batch_size)
        check_texts(args, recipe, processor, data, args.data, rank)
        lengths = record_lengths(args, recipe, processor, data.records, data.root)
    if args.estimate:
        if rank == 0:
            print(estimate.report(args, recipe, processor, data.records, data.root, world))
        return 0
    model = load_model(args, device)
    policy = make_policy(args, recipe, model, device, world)
    records, root = find_records(args, recipe, policy, processor, rank, world, data)
    lengths = lengths or record_lengths(args, recipe, processor, records, root)
    apart = records[: max(1, len(records) // 10)] if recipe.rewards else []  # to measure a reward model
    run = Run(args, recipe, policy, processor, records[len(apart) :], root, device, rank, world,
              make_judges(args, recipe, model, processor, root), config, lengths=lengths and lengths[len(apart) :])
    run.learner = make_learner(run) if recipe.advantages else None
    run.identity = reference.identity(args.model, run.records, processor)
    if saved:
        resume.refuse_other(saved, run.policy, run.identity)
    if args.reference_cache:
        run.cache = reference_cache(run)
    if rank == 0:
        announce(run, saved)
    measured = measurement(run, apart)
    before = measured()
    with run.writer:
        finished = train(run, saved)
    if finished:
        write_model(run)
        after = measured()
    if rank == 0 and finished:
        write_result(run, before, after, (time.perf_counter() - started) / 60)
    elif rank == 0:
        print(f"interrupted; go on with --resume --out {args.out}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0 if finished else 1


if __name__ == "__main__":
    run_script(main, "train.py")
