"""What train.py builds its steps of: what is scored, rewards, rollouts and pairs that are made while training.

Everything here runs on the embedded model with adapters of rank 4 and a few scenes. Where policy and reference must
differ the adapters are set to random numbers instead of their zeros.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
import table
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import prepare
import reinforce
import train
from data import scenes
from data.batch import collate
from data.corrupt import add_noise, crop
from data.images import open_image
from data.processor import ClipProcessor, Processor
from data.records import write_jsonl
from judges.reward import reward_judge
from judges.scores import Score
from judges.words import Verifier
from losses import ppo
from model import reference
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL, load_clip, load_llava, save_llava
from model.logprobs import Sequence, naive_logprobs, pack
from model.lora import Reference
from model.resume import checkpoints
from model.reward import load_reward_model, save_reward_head
from model.training import named, pick
from model.views import stack
from options import check, kwargs_of, read_arguments
from pairs import online

HOME = Path(__file__).resolve().parents[1]
ANSWERS = [("There is a dog and a cup on the table.", "There is a cat."), ("A red ball lies on the floor.", "A chair."),
           ("I see a cup.", "I see a large blue dog beside a small tree.")]
SEEDS = [11, 12, 13]


def records() -> list[dict]:
    return [{"id": f"r{i}", "image": scenes.reference(scenes.PAIRS + i), "prompt": scenes.CAPTION_PROMPT,
             "chosen": chosen, "rejected": rejected, "rejected_image": scenes.reference(scenes.PAIRS + 50 + i),
             "rejected_image_response": f"There are {i + 2} chairs."}
            for i, (chosen, rejected) in enumerate(ANSWERS)]


def make_run(loss: str, *options: str, moved: bool = True, rows: list[dict] | None = None) -> train.Run:
    args, recipe = read_arguments(train.LOSSES, ["--loss", loss, "--lora-rank", "4", "--batch-size", "2", *options]), train.LOSSES[loss]
    check(args, recipe, 1)
    device = torch.device("cpu")
    model, processor = prepare.load_model(args, device), Processor(DEFAULT_MODEL)
    run = train.Run(args, recipe, prepare.make_policy(args, recipe, model, device, 1), processor, rows or records(), None, device,
                    judges=prepare.make_judges(args, recipe, model, processor, None))
    run.learner = train.make_learner(run) if recipe.advantages else None
    if args.reference_cache:
        run.cache = train.reference_cache(run)
    if moved:
        move(run)
    return run


def move(run: train.Run, size: float = 0.05) -> None:
    """Policy away from reference, value head away from 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in run.policy.plain.named_parameters():
            if name.endswith("lora_B") or "value_head" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def score(monkeypatch, tmp_path):
    """(run, batch) -> all that the loss could ask for, of a step that moves nothing."""
    return lambda run, batch: table.one_step(monkeypatch, tmp_path, setattr(run.args, "lr", 0.0) or run, batch)[0]


def batch_of(run: train.Run, rows: list[dict] | None = None, seeds: list[int] = SEEDS):
    return run.collate(rows or run.records, seeds=seeds)


# ---- what is scored ----------------------------------------------------------------------------------------


def test_equal_responses_are_computed_once_and_each_keeps_its_gradient():
    """y, y, z, y with competitor: as many tokens as y, z; log-probs and gradients are those of four sequences."""
    run = make_run("dpo")
    processor, view = run.processor, run.processor.image(run.records[0]["image"])
    prompt = tuple(processor.prompt(scenes.CAPTION_PROMPT, len(view.rows)))
    y, z = (tuple(processor.response(text)) for text in ANSWERS[0])
    asked = [Sequence(0, prompt, y), Sequence(0, prompt, y), Sequence(0, prompt, z), Sequence(0, prompt, y, True)]
    pixels, rows = stack([view], processor.patches)
    packed = pack(asked, rows, processor.image_id)
    assert len(packed.ids) == len(pack([asked[0], asked[2]], rows, processor.image_id).ids)
    logps, mask = run.policy.plain(packed, run.policy.model.vision_features(pixels))
    naive = naive_logprobs(run.policy.model, asked, [view])
    gradients = []
    for values in ([row[m] for row, m in zip(logps, mask)], naive):
        total = sum((i + 1) * row.sum() for i, row in enumerate(values))
        gradients.append(torch.autograd.grad(total, [*run.policy.trained.values()]))
    for row, m, expected in zip(logps, mask, naive):
        torch.testing.assert_close(row[m], expected, rtol=0, atol=2e-5)
    for mine, expected in zip(*gradients):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


STARTS = {"dpo": math.log(2), "ipo": 25.0, "slic": 1.0, "dpo_weighted": math.log(2), "rdpo": 2 * math.log(2),
          "rdpo_released": 2 * math.log(2), "mdpo": 3 * math.log(2), "adavip": math.log(3), "lpoi": math.log(480),
          "symmpo": 4 * math.log(2), "povid": math.log(2),
          "povid_released": math.log(2), "bdhs_online": math.log(2)}


@pytest.mark.parametrize("loss, start", STARTS.items())
def test_losses_start_where_their_files_say(loss, start, score):
    """Policy = reference: IPO (0 - 1 / (2 beta))^2 = 25 at beta 0.1, hinge 1, the others as their files say."""
    run = make_run(loss, moved=False)
    rows = [{**record, "generated": "A tree."} for record in run.records]
    inputs = score(run, batch_of(run, rows))
    value, _ = run.recipe.loss(**pick(run.recipe.loss, inputs), **kwargs_of(run.recipe.loss, run.args))
    torch.testing.assert_close(value, torch.full((3,), start), rtol=1e-6, atol=1e-6)


def noisy_by_definition(run: train.Run, record: dict, seed: int) -> tuple[list[int], torch.Tensor]:
    """(k_t, log-prob of any token at each place under the clean picture) of the model as it is now."""
    processor = run.processor
    clean = processor.image(record["image"])
    noisy = processor.view(add_noise(open_image(record["image"]), seed=seed))
    prompt, response = processor.prompt(record["prompt"], len(clean.rows)), processor.response(record["chosen"])
    ids = torch.tensor([*prompt, *response[:-1]])
    with torch.no_grad():
        under_noise, under_clean = (run.policy.model.logits(ids, *view)[len(prompt) - 1 :] for view in (noisy, clean))
    return under_noise.argmax(-1), F.log_softmax(under_clean, -1)


@pytest.mark.parametrize("loss", ["povid", "povid_released"])
def test_povid_scores_under_the_clean_picture_what_the_noisy_one_suggests(loss, score):
    """povid: the policy's tokens in both; povid_released: each model its own."""
    run = make_run(loss)
    inputs = score(run, batch_of(run))
    differ = 0
    for i, (record, seed) in enumerate(zip(run.records, SEEDS)):
        mine, logps = noisy_by_definition(run, record, seed)
        with run.policy.reference():
            its, expected = noisy_by_definition(run, record, seed)
        differ += int((mine != its).sum())
        chosen = mine if loss == "povid" else its
        for name, rows, tokens in (("policy", logps, mine), ("reference", expected, chosen)):
            found = inputs[f"{name}_noisy_token_logps"][i, : len(tokens)]
            torch.testing.assert_close(found, rows.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-4)
        assert (mine != torch.tensor(run.processor.response(record["chosen"]))).any()
    assert differ  # or the two kinds would be one


def test_povid_chooses_without_dropout(score):
    """With half of the adapters' inputs dropped the choice under noise is still the model's, training goes on with
    dropout, and the batch keeps its own labels."""
    run = make_run("povid", "--lora-dropout", "0.5", moved=False)
    move(run, 0.3)
    run.policy.model.eval()
    expected = torch.cat([noisy_by_definition(run, record, seed)[0] for record, seed in zip(run.records, SEEDS)])
    scored = []
    run.policy.scorer.register_forward_pre_hook(lambda scorer, inputs: scored.append((run.policy.model.training, inputs[0])))
    for seed in range(2):
        run.args.seed, batch = seed, batch_of(run)
        given = batch.packed.labels.clone()
        score(run, batch)
        (_, of_reference), (training, of_policy) = scored
        scored.clear()
        for packed in (of_reference, of_policy):
            assert torch.equal(packed.labels[batch.picked], expected)
            assert torch.equal(packed.labels[~batch.picked], given[~batch.picked])
        assert training and torch.equal(batch.packed.labels, given)


def test_a_sequence_may_have_any_name(score, monkeypatch):
    """POVID's under other names and in another order: the same log-probs."""
    run = make_run("povid")
    named_as_ours = score(run, batch_of(run))
    noisy, chosen, rejected = (run.recipe.sequences[name] for name in ("noisy", "chosen", "rejected"))

    def loss(policy_drunk_logps, policy_a_logps, reference_drunk_logps, policy_b_logps):
        return policy_drunk_logps, {}

    run.recipe = run.recipe._replace(loss=loss, sequences={"drunk": noisy, "a": chosen, "b": rejected})
    renamed = score(run, batch_of(run))
    for mine, theirs in (("drunk", "noisy"), ("a", "chosen"), ("b", "rejected")):
        for who in ("policy", "reference"):
            torch.testing.assert_close(renamed[f"{who}_{mine}_logps"], named_as_ours[f"{who}_{theirs}_logps"], rtol=0, atol=1e-4)
    assert not torch.equal(renamed["policy_drunk_logps"], renamed["policy_a_logps"])


def test_both_kinds_of_picks_in_one_loss(score):
    """The reference picks its own tokens for one sequence and takes the policy's for another."""
    run = make_run("povid_released")
    sequences = {"own": train.LOSSES["povid_released"].sequences["noisy"], "same": train.LOSSES["povid"].sequences["noisy"]}

    def loss(policy_own_logps, reference_own_logps, policy_same_logps, reference_same_logps):
        return policy_own_logps, {}

    run.recipe = run.recipe._replace(loss=loss, sequences=sequences)
    inputs = score(run, batch_of(run))
    assert torch.equal(inputs["policy_own_logps"], inputs["policy_same_logps"])
    for i, (record, seed) in enumerate(zip(run.records, SEEDS)):
        tokens, _ = noisy_by_definition(run, record, seed)
        with run.policy.reference():
            its, expected = noisy_by_definition(run, record, seed)
        for name, picked in (("own", its), ("same", tokens)):
            torch.testing.assert_close(inputs[f"reference_{name}_token_logps"][i, : len(picked)],
                                       expected.gather(1, picked[:, None])[:, 0], rtol=0, atol=1e-4)


def test_mdpo_crops_once_a_sample_and_step(score):
    """The crop is data.corrupt.crop of the record's seed: the same for the same seed, another for another one."""
    run = make_run("mdpo")
    batch, again, other = batch_of(run), batch_of(run), batch_of(run, seeds=[1, 2, 3])
    assert torch.equal(batch.pixels, again.pixels) and not torch.equal(batch.pixels, other.pixels)
    cropped = [crop(run.processor.image(r["image"]).pixels, seed) for r, seed in zip(run.records, SEEDS)]
    torch.testing.assert_close(batch.pixels[3:], torch.cat(cropped))
    inputs = score(run, batch)
    views = [run.processor.image(r["image"])._replace(pixels=c) for r, c in zip(run.records, cropped)]
    asked = [Sequence(i, tuple(run.processor.prompt(r["prompt"])), tuple(run.processor.response(r["chosen"])))
             for i, r in enumerate(run.records)]
    with torch.no_grad():
        naive = {"policy": naive_logprobs(run.policy.model, asked, views)}
        with run.policy.reference():
            naive["reference"] = naive_logprobs(run.policy.model, asked, views)
    for name, rows in naive.items():
        torch.testing.assert_close(inputs[f"{name}_cropped_logps"], torch.stack([r.sum() for r in rows]),
                                   rtol=0, atol=1e-4)


# ---- reward model ------------------------------------------------------------------------------------------


def test_reward_is_read_at_the_end_token_and_survives_the_disk(tmp_path, score):
    """w . h + b of the end token's state by definition; the saved model gives the same, as a judge, too."""
    run = make_run("reward_model")
    inputs, expected = score(run, batch_of(run)), []
    for field in ("chosen", "rejected"):
        for record in run.records:
            view = run.processor.image(record["image"])
            prompt = run.processor.prompt(record["prompt"])
            ids = torch.tensor([*prompt, *run.processor.response(record[field])])
            assert ids[-1] == run.processor.eos_id
            with torch.no_grad():
                decoder = run.policy.model.language_model
                decoder.lm_head, head = torch.nn.Identity(), decoder.lm_head  # logits() now gives states
                expected.append(run.policy.plain.head(run.policy.model.logits(ids, *view)[-1])[0])
                decoder.lm_head = head
    found = torch.cat([inputs["chosen_rewards"], inputs["rejected_rewards"]])
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-4)
    save_reward_head(run.policy.plain, tmp_path)
    save_llava(run.policy.model, tmp_path / "model", DEFAULT_MODEL)
    judge = reward_judge(load_reward_model(tmp_path), Processor(tmp_path / "model"))
    scores = judge(run.records, [[r["chosen"], r["rejected"]] for r in run.records])
    judged = torch.tensor([[s.score for s in group] for group in scores])
    torch.testing.assert_close(judged.T.flatten(), found.detach(), rtol=0, atol=1e-4)
    first = run.records[0]
    assert judge([first], [["A dog.<s>"]]) == judge([first], [["A dog."]])  # spelt out by the policy


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda t: t.pop("bias"), "missing tensor bias"),
        (lambda t: t.update(more=torch.zeros(1)), "unexpected tensor more"),
        (lambda t: t.update(weight=torch.zeros(1, 7)), r"tensor weight is \(1, 7\), expected \(1, 160\)"),
        (lambda t: t.update(bias=torch.zeros(1).int()), "tensor bias is I32, not floating-point"),
        (lambda t: t.update(bias=torch.tensor([float("nan")])), "reward_head.safetensors: tensor bias holds NaN"),
        (None, "reward_head.safetensors: not a readable safetensors file"),
    ],
)
def test_damaged_reward_heads_are_named(tmp_path, spoil, reason):
    (tmp_path / "model").symlink_to(DEFAULT_MODEL)
    head = {"weight": torch.zeros(1, 160), "bias": torch.zeros(1)}
    save_file(head, tmp_path / "reward_head.safetensors")
    load_reward_model(tmp_path)
    if spoil:
        spoil(head)
        save_file(head, tmp_path / "reward_head.safetensors")
    else:
        (tmp_path / "reward_head.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=reason) as error:
        load_reward_model(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"template": 5, "aspect": null}'])
def test_a_reward_run_without_its_configuration(tmp_path, config):
    (tmp_path / "model").symlink_to(DEFAULT_MODEL)
    save_file({"weight": torch.zeros(1, 160), "bias": torch.zeros(1)}, tmp_path / "reward_head.safetensors")
    (tmp_path / "config.json").write_text(config)
    args = SimpleNamespace(judge="reward", reward=tmp_path, precision="fp32")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: "):
        prepare.make_judge(args, torch.device("cpu"), tmp_path)


def test_the_unused_head_of_a_reward_model_does_not_train():
    run = make_run("reward_model", "--lora-rank", "0", moved=False)
    batch = batch_of(run)
    rewards = run.policy.scorer(batch.packed, run.policy.model.vision_features(batch.pixels))
    value, _ = run.recipe.loss(**named("policy", batch.names, rewards))
    value.mean().backward()
    assert [*run.policy.trained.values()] and all(p.grad is not None for p in [*run.policy.trained.values()])


# ---- rollouts ----------------------------------------------------------------------------------------------


def by_length(rows: list[dict], answers: list[list[str]]) -> list[list[Score]]:
    return [[Score(float(-len(text))) for text in group] for group in answers]


def draw(run: train.Run, rows: list[dict], seeds: list[int], tokens: int = 12) -> reinforce.Rollout:
    run.policy.model.eval()
    said = online.sample(run.policy.model, run.processor, rows, seeds, None, samples=2, temperature=1.0, max_new_tokens=tokens)
    return reinforce.roll_out(run.policy.plain, run.policy.reference, rows, said, run.processor)


def parts(loss: str, **options):
    """The functions that the loss's advantages are put together of, with these options, else their defaults."""
    return reinforce.bind(train.LOSSES[loss].parts, options)


@pytest.fixture(scope="module")
def ppo_run():
    return make_run("ppo", "--judge", "clip", "--samples", "2")


def test_the_first_ratio_is_one_to_the_last_bit(ppo_run):
    """pi_old comes from the very forward that trains, and so do the values."""
    r = draw(ppo_run, ppo_run.records, SEEDS)
    logps, mask, values = ppo_run.policy.scorer(r.packed, r.features)
    assert logps.requires_grad and torch.equal(logps.detach(), r.old) and torch.equal(values.detach(), r.values)
    assert not torch.equal(r.old, r.reference) and values[mask].abs().min() > 0
    targets, _ = reinforce.ppo_advantages([r], parts("ppo"), reinforce.Memory(mean=-40.0, std=10.0), by_length)
    inputs = named("policy", ["sampled"], (logps, mask, values)) | targets[0]
    _, metrics = ppo.ppo_loss(**pick(ppo.ppo_loss, inputs))
    torch.testing.assert_close(metrics["ratio"].mean(), torch.tensor(1.0), rtol=0, atol=1e-6)
    assert metrics["clip_fraction"].eq(0).all() and metrics["approx_kl"].eq(0).all()


def test_two_micro_batches_are_one(ppo_run):
    """Same answers cut in two: whitened together, divided by the tokens of both, the mean loss is the same."""
    rows, judge = ppo_run.records[:2], by_length
    halves = [draw(ppo_run, rows[:1], SEEDS[:1], 60), draw(ppo_run, rows[1:2], SEEDS[1:2], 60)]
    whole = draw(ppo_run, rows, SEEDS[:2], 60)
    assert whole.ids == halves[0].ids + halves[1].ids and len({len(ids) for ids in whole.ids}) > 1
    means = []
    for group in ([whole], halves):
        targets, _ = reinforce.ppo_advantages(group, parts("ppo"), reinforce.Memory(), judge)
        losses = []
        for r, target in zip(group, targets):
            inputs = target | {"policy_sampled_token_logps": r.old - 0.1, "sampled_mask": r.mask, "values": r.values + 1}
            losses.append(ppo.ppo_loss(**inputs)[0].mean())
        means.append(torch.stack(losses).mean())
    torch.testing.assert_close(means[0], means[1], rtol=1e-4, atol=1e-5)
    masks = [r.mask for r in halves]
    rows = [torch.randn(m.shape, generator=torch.Generator().manual_seed(1)) for m in masks]
    found = torch.cat([x[m] for x, m in zip(reinforce.whiten(rows, masks), masks)])
    flat = torch.cat([x[m] for x, m in zip(rows, masks)])[None]
    torch.testing.assert_close(found, ppo.whiten(flat, torch.ones_like(flat, dtype=torch.bool))[0])


def test_rloo_compares_the_answers_of_one_prompt(ppo_run):
    """Scores that differ between prompts only teach nothing; 0 and 1 within each prompt give -1 and +1."""
    r = draw(ppo_run, ppo_run.records, SEEDS)
    of_prompt = lambda rows, answers: [[Score(row["id"].count("1") * 5.0)] * len(g) for row, g in zip(rows, answers)]
    of_place = lambda rows, answers: [[Score(float(i)) for i in range(len(g))] for g in answers]
    nothing, _ = reinforce.rloo_advantages([r], parts("rloo", kl_coef=0.0), reinforce.Memory(), of_prompt)
    assert nothing[0]["advantages"].eq(0).all()
    ends, _ = reinforce.rloo_advantages([r], parts("rloo", kl_coef=0.0), reinforce.Memory(), of_place)
    assert ends[0]["advantages"].tolist() == [-1, 1] * 3


def test_a_judge_without_a_verdict_is_named(ppo_run):
    r = draw(ppo_run, ppo_run.records[:1], SEEDS[:1], tokens=2)
    with pytest.raises(ValueError, match="record 'r0': the judge came to no verdict"):
        reinforce.ppo_advantages([r], parts("ppo"), reinforce.Memory(), lambda rows, answers: [None])


# ---- FiSAO -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier(load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP), Processor(DEFAULT_MODEL))


def test_verifier_scores_words_against_their_picture(verifier):
    """250 max(cos, 0) of the CLIP module's own embeddings, at the tokens that spell the word."""
    processor, clip, clip_processor = verifier.processor, load_clip(DEFAULT_CLIP), ClipProcessor(DEFAULT_CLIP)
    images = [scenes.reference(scenes.PAIRS), scenes.reference(scenes.PAIRS + 1)]
    answers = [processor.response(text) for text in ("There is a cat.", "Here you see a dog and a cup on a table.")]
    found = verifier(images, answers)
    assert found.entities[:3] == ["cat", "dog", "cup"] and found.rows.tolist()[:3] == [0, 1, 1]
    shown = [scenes.objects_present(*scenes.parse_reference(image)) for image in images]
    right = [int(entity in shown[row]) if entity in scenes.CATEGORIES else -1
             for entity, row in zip(found.entities, found.rows.tolist())]
    assert found.correct.tolist() == right and -1 in right and {0, 1} & set(right)
    for i, (word, row) in enumerate(zip(found.entities[:3], found.rows.tolist())):
        spelt = processor.decode(answers[row][found.starts[i] : found.stops[i]])
        assert spelt.strip() == word
        with torch.no_grad():
            picture = clip.image_embeddings(clip_processor.image(images[row])[None])
            cosine = F.cosine_similarity(clip.text_embeddings([clip_processor.text(word)]), picture)
        torch.testing.assert_close(found.scores[i], 250 * cosine[0].clamp(min=0), rtol=0, atol=1e-3)


def test_fisao_rewards_stand_on_the_last_token_of_their_word(monkeypatch, ppo_run, verifier):
    """Baselines 100 and 100, range 0 to 200, margin 0: score 150 is worth .5, score 20 -.8; KL off, lambda 0."""
    run = ppo_run
    record = run.records[0]
    shown = scenes.objects_present(*scenes.parse_reference(record["image"]))
    present = sorted(shown)[0]
    absent = next(word for word in ("dog", "cat", "cup") if word not in shown)
    answers = [[run.processor.response(f"A {absent}."), run.processor.response(f"I see a big {present} here.")]]
    r = reinforce.roll_out(run.policy.plain, run.policy.reference, [record], answers, run.processor)
    r.values.zero_()
    real = verifier([record["image"]] * 2, r.ids)
    fixed = lambda references, ids: real._replace(scores=torch.tensor([20.0, 150.0]))
    memory = reinforce.Memory(baselines={"correct": 100.0, "hallucinated": 100.0, "low": 0.0, "high": 200.0, "std": 1.0, "unit": "x"})
    placed = []
    monkeypatch.setattr(reinforce, "whiten", lambda advantages, masks: placed.extend(advantages) or advantages)
    _, metrics = reinforce.fisao_advantages([r], parts("fisao", kl_coef=0.0, margin=0.0, lam=0.0, gamma=0.0), memory, fixed)
    expected = torch.zeros(r.mask.shape)
    expected[0, real.stops[0] - 1], expected[1, real.stops[1] - 1] = -0.8, 0.5
    torch.testing.assert_close(placed[0], expected)
    assert metrics["reward/correct"].item() == pytest.approx(0.5)
    assert metrics["reward/hallucinated"].item() == pytest.approx(-0.8)
    assert metrics["rewarded"].item() == 1


def test_fisao_metrics_of_answers_without_objects(ppo_run, verifier):
    """No mention: metrics are 0, never nan."""
    run = ppo_run
    r = reinforce.roll_out(run.policy.plain, run.policy.reference, run.records[:1], [[run.processor.response("I see it.")] * 2], run.processor)
    _, metrics = reinforce.fisao_advantages([r], parts("fisao"), reinforce.Memory(baselines={
        "correct": 100.0, "hallucinated": 90.0, "low": 0.0, "high": 200.0, "std": 1.0, "unit": "x"}), verifier)
    assert metrics["rewarded"] == 0 and metrics["reward"] == 0 and metrics["reward/correct"] == 0


def photographs(folder: Path) -> Path:
    """Scenes as picture files, what they show as an instances file of COCO, and records of them."""
    images, annotations, rows = [], [], []
    names = sorted(scenes.CATEGORIES)
    for i in range(12):
        reference, name = scenes.reference(scenes.PAIRS + i), f"COCO_val2014_{i:012}.png"
        open_image(reference).save(folder / name)
        images.append({"id": i, "file_name": name, "width": 128, "height": 128})
        annotations += [{"id": len(annotations), "image_id": i, "category_id": names.index(shown)}
                        for shown in sorted(scenes.objects_present(*scenes.parse_reference(reference)))]
        rows.append({"id": str(i), "image": name, "prompt": scenes.CAPTION_PROMPT})
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    (folder / "instances.json").write_text(json.dumps(
        {"images": images, "annotations": annotations, "categories": categories}))
    write_jsonl(folder / "images.jsonl", rows)
    return folder


def test_fisao_on_photographs(tmp_path, monkeypatch, verifier):
    """Baselines are measured where --objects knows what pictures show, and serve runs on pictures nobody knows."""
    photographs(tmp_path)
    command = ["--loss", "fisao", "--data", str(tmp_path / "images.jsonl"), "--steps", "1", "--lora-rank", "4",
               "--batch-size", "2", "--samples", "2", "--inner-epochs", "1"]
    with pytest.raises(ValueError, match="none of these has any: give --objects"):
        train.main([*command, "--out", str(tmp_path / "none")])
    assert train.main([*command, "--out", str(tmp_path / "one"), "--objects", str(tmp_path / "instances.json")]) == 0
    measured = json.loads((tmp_path / "one" / "baselines.json").read_text())
    assert measured["correct"] > measured["hallucinated"] and measured["correct_mentions"] > 20
    assert "reward/correct" in lines(tmp_path / "one")[0] and (tmp_path / "one" / "scores.svg").is_file()
    assert train.main([*command, "--out", str(tmp_path / "two"), "--baselines", str(tmp_path / "one/baselines.json")]) == 0
    assert saved(tmp_path / "two")["reinforcement"]["baselines"] == measured
    assert lines(tmp_path / "one")[0]["reward"] == lines(tmp_path / "two")[0]["reward"]
    assert not (tmp_path / "two" / "scores.svg").exists()


@pytest.mark.parametrize("option", ["--objects", "--baselines"])
def test_a_missing_file_is_named_before_anything_is_loaded(option):
    with pytest.raises(ValueError, match=f"{option} nowhere.json: no such file"):
        check(read_arguments(train.LOSSES, ["--loss", "fisao", option, "nowhere.json"]), train.LOSSES["fisao"], 1)


def test_the_embedded_clip_is_no_default_for_other_models():
    def checked(*options: str) -> None:
        args = read_arguments(train.LOSSES, [*options, "--model", "elsewhere"])
        check(args, train.LOSSES[args.loss], 1)

    for options in (["--loss", "fisao"], ["--loss", "online_dpo", "--judge", "clip"], ["--loss", "bdhs_online"]):
        with pytest.raises(ValueError, match="needs --clip-model DIR"):
            checked(*options)
        checked(*options, "--clip-model", "clip")
    checked("--loss", "online_dpo")
    assert read_arguments(train.LOSSES, ["--loss", "fisao"]).clip_model == DEFAULT_CLIP


def test_unusable_baselines_are_refused(tmp_path):
    path = tmp_path / "baselines.json"
    path.write_text('{"correct": 1}')
    with pytest.raises(ValueError, match="no baselines of fisao"):
        reinforce.read_baselines(path, "cm")
    path.write_text('{"correct": 1, "hallucinated": 0, "low": 0, "high": 2, "std": 1, "unit": "inch"}')
    with pytest.raises(ValueError, match="measured in 'inch', this verifier scores in 'cm'"):
        reinforce.read_baselines(path, "cm")


# ---- pairs made while training -----------------------------------------------------------------------------


def stub_sample(monkeypatch, processor: Processor, said: list[list[tuple[str, bool]]]) -> None:
    """`online.sample` says these: [record][sample] (text, ended)."""
    ids = {f"r{i}": [processor.response(text)[: None if ended else -1] for text, ended in group]
           for i, group in enumerate(said)}
    monkeypatch.setattr(online, "sample", lambda model, processor, rows, *_, **__: [ids[r["id"]] for r in rows])


def test_ties_duplicates_and_cut_answers_teach_nothing(monkeypatch, tmp_path):
    """Three pairs without weight: the parameters stay where they are, whatever their losses."""
    run = make_run("online_dpo")
    stub_sample(monkeypatch, run.processor, [[("A dog.", True), ("A cup.", True)], [("A cat.", True)] * 2,
                                             [("A dog.", True), ("A tree", False)]])
    of_place = lambda rows, answers: [[Score(0.0)] * 2 if row["id"] == "r0" else [Score(1.0), Score(0.0)] for row in rows]
    made = online.ranked_pairs(run.records, SEEDS, run.policy.model, run.processor, None, of_place)
    assert [row["weight"] for row in made] == [0, 0, 0]
    before = [p.detach().clone() for p in [*run.policy.trained.values()]]
    _, line = table.one_step(monkeypatch, tmp_path, run, collate(made, run.recipe.sequences, run.processor))
    assert line["grad_norm"] == 0 and all(torch.equal(a, b) for a, b in zip(before, [*run.policy.trained.values()]))
    better = lambda rows, answers: [[Score(0.0), Score(1.0)] for _ in rows]
    useful = online.ranked_pairs(run.records, SEEDS, run.policy.model, run.processor, None, better)
    assert [row["weight"] for row in useful] == [1, 0, 0]
    assert run.processor.decode(useful[0]["chosen"]) == "A cup."
    _, line = table.one_step(monkeypatch, tmp_path, run, collate(useful, run.recipe.sequences, run.processor))
    assert line["grad_norm"] > 0


def test_mixture_draws_only_what_it_needs(monkeypatch):
    """p = 1 asks nobody; p = 0 is online DPO; between them each record decides for itself by its own seed."""
    run = make_run("mixed_dpo", moved=False)
    stub_sample(monkeypatch, run.processor, [[("A dog.", True), ("A cup.", True)]] * 3)
    judged = []
    judge = lambda rows, answers: judged.append(len(rows)) or [[Score(1.0), Score(0.0)] for _ in rows]
    mix = lambda rows, seeds, p: online.mixed_pairs(rows, seeds, run.policy.model, run.processor, None, judge, offline=p)
    assert [row["chosen"] for row in mix(run.records, SEEDS, 1.0)] == [a for a, _ in ANSWERS] and not judged
    assert all(run.processor.decode(row["chosen"]) == "A dog." for row in mix(run.records, SEEDS, 0.0))
    seeds = list(range(40))
    many = [run.records[0]] * 40
    mixed = [isinstance(row["chosen"], str) for row in mix(many, seeds, 0.5)]
    assert 10 < sum(mixed) < 30 and judged[-1] == 40 - sum(mixed)
    assert [isinstance(mix(many[:1], [seed], 0.5)[0]["chosen"], str) for seed in seeds] == mixed
    with pytest.raises(ValueError, match="no given pairs"):
        make_run("online_dpo", "--offline", "0.5")


def test_samples_depend_on_their_seed_alone():
    run = make_run("online_dpo", moved=False)
    say = lambda rows, seeds: online.sample(run.policy.model, run.processor, rows, seeds, None, samples=2, temperature=1.0,
                                            max_new_tokens=10)
    together = say(run.records, SEEDS)
    assert say(run.records[2:], SEEDS[2:]) == together[2:] and say(run.records[::-1], SEEDS[::-1]) == together[::-1]
    assert all(ids[-1] == run.processor.eos_id or len(ids) == 10 for group in together for ids in group)


def test_bdhs_draws_by_seed_and_falls_back_without_weight(monkeypatch):
    """What is drawn for a record does not depend on its place in the batch; no completion -> weight 0."""
    run = make_run("bdhs_online", moved=False)
    drawn = []
    monkeypatch.setattr("pairs.bdhs.complete", lambda attempts, **_: drawn.extend(
        a.seed for a in attempts) or [None if a.image == run.records[1]["image"] else "A tree." for a in attempts])
    alike = lambda left, right: [0.5] * len(left)
    make = lambda rows, seeds: online.bdhs_triples(rows, seeds, run.policy.model, run.processor, None, alike)
    made = make(run.records, SEEDS)
    assert [(row["weight"], row["generated"]) for row in made] == [
        (1, "A tree."), (0, run.records[1]["rejected"]), (1, "A tree.")]
    assert [row["id"] for row in made] == ["r0", "r1", "r2"]
    third = drawn[2]
    drawn.clear()
    make(run.records[2:], SEEDS[2:])
    assert drawn == [third]


# ---- reference cache ---------------------------------------------------------------------------------------


def test_cached_reference_equals_a_fresh_one_and_is_refused_when_stale(tmp_path, score):
    path = tmp_path / "reference.safetensors"
    run = make_run("rdpo_released", "--reference-cache", str(path), moved=False)
    assert run.policy.reference is None  # it needs none, be it a copy of the weights
    run.policy.reference = Reference(run.policy.model)
    move(run)
    cached = score(run, batch_of(run))
    run.cache = None
    fresh = score(run, batch_of(run))
    for name in fresh:
        torch.testing.assert_close(cached[name], fresh[name], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="of another model, data, template"):
        make_run("rdpo_released", "--reference-cache", str(path), rows=records()[:2])
    with pytest.raises(ValueError, match="of another model, data, template"):
        make_run("dpo", "--reference-cache", str(path))


def test_fingerprint_sees_template_and_a_weight_in_the_middle(tmp_path):
    """A merged adapter changes the middle of a weight file and neither its size nor its ends."""
    def key(folder: Path, template: str | None = None) -> str:
        return reference.fingerprint(folder, records(), {}, Processor(folder, template=template), "fp32")

    model = load_llava(DEFAULT_MODEL)
    save_llava(model, tmp_path, DEFAULT_MODEL)
    before = key(tmp_path)
    assert key(tmp_path) == before and key(tmp_path, "vicuna_v1") != key(tmp_path, "hf")
    with torch.no_grad():
        model.language_model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    save_llava(model, tmp_path, DEFAULT_MODEL)
    assert key(tmp_path) != before


def test_fingerprint_sees_a_vision_tower_of_its_own(tmp_path, llava_folder):
    """An original checkpoint may name a CLIP folder for its tower."""
    tensors, tower, folder = load_file(llava_folder / "model.safetensors"), tmp_path / "tower", tmp_path / "llava"
    part = {n.removeprefix("vision_tower."): t for n, t in tensors.items() if n.startswith("vision_tower.")}
    small.write(tower, {"model_type": "clip", "vision_config": small.VISION}, part)
    small.write(folder, {**small.TEXT, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "x/tower"},
                {n: t for n, t in tensors.items() if not n.startswith("vision_tower.")})
    key = lambda: reference.fingerprint(folder, [], {}, Processor(DEFAULT_MODEL), "fp32")
    before = key()
    part["vision_model.encoder.layers.0.mlp.fc1.bias"][0] += 1
    small.write(tower, {"model_type": "clip", "vision_config": small.VISION}, part)
    assert key() != before


@pytest.mark.parametrize("loss, reason", [("mdpo", "drawn again"), ("online_dpo", "drawn again"), ("ppo", "drawn again"),
                                          ("sft", "has no reference"), ("reward_model", "has no reference")])
def test_reference_cache_is_refused_where_it_cannot_be(tmp_path, loss, reason):
    with pytest.raises(ValueError, match=reason):
        make_run(loss, "--reference-cache", str(tmp_path / "x"), *(["--judge", "clip"] if loss == "ppo" else []))


@pytest.mark.parametrize("text, used", [("A cat.", 1.0), ("A <s> cat.", 0.0), ("A cat. " * 400, 0.0)])
def test_a_completion_that_cannot_be_scored_teaches_nothing(monkeypatch, text, used):
    """A special token that was spelt out, and more than the decoder takes."""
    monkeypatch.setattr(online, "bdhs_pairs", lambda rows, *_, **__: ([{**row, "rejected": text} for row in rows], {}))
    model, processor = SimpleNamespace(training=False), Processor(DEFAULT_MODEL)
    (made,) = online.bdhs_triples(records()[:1], [3], model, processor, None, None)
    assert made["weight"] == used and made["generated"] == (text if used else made["rejected"])


# ---- whole runs --------------------------------------------------------------------------------------------

SHORT = ["--batch-size", "2", "--samples", "2", "--max-new-tokens", "24"]
RUNS = {
    "ppo": [*SHORT, "--judge", "clip", "--inner-epochs", "2", "--kl-target", "0.01", "--micro-batch-size", "1"],
    "fisao": [*SHORT, "--inner-epochs", "1", "--margin-mode", "none"],
    "online_dpo": SHORT,
    "mdpo": ["--batch-size", "2"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures and questions, with pairs for the losses that are given them."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = [{"id": str(i), "image": scenes.reference(scenes.PAIRS + i), "prompt": scenes.CAPTION_PROMPT} for i in range(8)]
    write_jsonl(folder / "images.jsonl", rows)
    write_jsonl(folder / "pairs.jsonl", [row | dict(zip(("chosen", "rejected"), ANSWERS[i % 3]))
                                         for i, row in enumerate(rows)])
    return folder


def arguments(pictures: Path, out: Path, loss: str, steps: int = 4) -> list[str]:
    data = pictures / ("pairs.jsonl" if train.LOSSES[loss].pairs else "images.jsonl")
    return ["--loss", loss, "--data", str(data), "--out", str(out), "--steps", str(steps), "--log-every", "1",
            "--eval-scenes", "0", "--lora-rank", "4", *RUNS[loss]]


def saved(out: Path) -> dict:
    return torch.load(checkpoints(out)[0], weights_only=True)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", RUNS)
def test_resumed_equals_uninterrupted_bit_for_bit(pictures, tmp_path, monkeypatch, verifier, loss):
    """Parameters (value head included), losses and the run's own numbers; what was measured first stays."""
    def fresh(*_) -> Verifier:  # its words are the same every time, its pictures are to be seen anew
        made = copy.copy(verifier)
        made.images = {}
        return made

    monkeypatch.setattr(prepare, "Verifier", fresh)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(pictures, whole, loss)) == 0
    with monkeypatch.context() as patch:
        calls = iter([False, True])
        patch.setattr(train.StopRequest, "asked", lambda self: next(calls))
        assert train.main(arguments(pictures, parts, loss)) == 1
    first = saved(parts)["reinforcement"]
    monkeypatch.setattr("reinforce.calibrate", None)  # not again
    assert train.main([*arguments(pictures, parts, loss), "--resume"]) == 0
    one, two = saved(whole), saved(parts)
    assert one["reinforcement"] == two["reinforcement"] and one["trained"].keys() == two["trained"].keys()
    assert all(torch.equal(one["trained"][name], two["trained"][name]) for name in one["trained"])
    assert [x["loss"] for x in lines(whole)] == [x["loss"] for x in lines(parts)] and len(lines(parts)) == 4
    if loss == "ppo":
        assert one["trained"]["value_head.weight"].abs().max() > 0
        assert one["reinforcement"]["kl_coef"] != first["kl_coef"] and one["reinforcement"]["mean"] == first["mean"]
    if loss == "fisao":
        assert one["reinforcement"]["baselines"] == first["baselines"]
        assert "reward/correct" in lines(whole)[0]


def test_two_processes_reinforce_like_one(pictures, tmp_path):
    """The same answers, whitened together: the same losses and figures at every step."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(arguments(pictures, one, "ppo", steps=2)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
               str(HOME / "train.py"), *arguments(pictures, two, "ppo", steps=2)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        for name in ("loss", "score", "kl", "policy_loss", "value_loss", "kl_coef", "tokens"):
            assert theirs[name] == pytest.approx(mine[name], abs=2e-5), name


def test_ppo_raises_a_toy_reward(tmp_path, pictures, monkeypatch):
    """Rewarded for few letters, the answers get shorter."""
    monkeypatch.setattr(prepare, "make_judge", lambda *_: by_length)
    command = arguments(pictures, tmp_path, "ppo", steps=8)
    assert train.main([*command, "--batch-size", "4", "--micro-batch-size", "4", "--samples", "4", "--lr", "0.01",
                       "--inner-epochs", "2", "--kl-target", "0", "--kl-coef", "0.02"]) == 0
    scores = [line["score"] for line in lines(tmp_path)]
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.5, scores
