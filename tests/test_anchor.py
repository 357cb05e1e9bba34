"""Terms that are added to a loss, mDPO's anchor and the NLL of RPO: hand arithmetic, parity with mDPO and TRL, which
losses can have them, and what a step of train.py makes of them."""

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import lifecycle
import train
from common import BadInput
from data import scenes
from data.records import write_jsonl
from losses.anchor import anchor_loss
from losses.dpo import dpo_loss
from losses.mdpo import mdpo_loss
from losses.rdpo import rdpo_loss
from losses.sft import sft_loss
from model.training import named
from options import Recipe, check, read_arguments

EXACT = dict(rtol=0, atol=1e-12)
PAIRED = ("dpo", "ipo", "slic", "dpo_weighted", "rdpo", "rdpo_released", "adavip", "povid", "povid_released",
          "online_dpo", "mixed_dpo", "bdhs_online")  # losses that compare a chosen response with the reference


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(value: float) -> float:
    return math.log(1 + math.exp(value))


# ---- the anchor --------------------------------------------------------------------------------------------


def test_anchor_by_hand():
    """Log-ratios +20, -10 and +5 at beta 0.1 are rewards 2, -1 and 0.5; the anchor is 0.5."""
    policy, reference = double(-40, -55, -5), double(-60, -45, -10)
    loss, metrics = anchor_loss(policy, reference, beta=0.1, anchor_delta=0.5)
    torch.testing.assert_close(loss, double(softplus(-1.5), softplus(1.5), math.log(2)), **EXACT)
    assert metrics.keys() == {"accuracy/anchor"} and metrics["accuracy/anchor"].tolist() == [1, 0, 0]
    loss, metrics = anchor_loss(policy, reference)  # beta 0.1, at 0
    torch.testing.assert_close(loss, double(softplus(-2), softplus(1), softplus(-0.5)), **EXACT)
    assert metrics["accuracy/anchor"].tolist() == [1, 0, 1]


def test_anchor_gradient():
    """-beta sigma(delta - r): it raises the policy's log-prob, the less the higher the reward, and no reference's."""
    policy, reference = double(-40, -55).requires_grad_(), double(-60, -45).requires_grad_()
    loss, metrics = anchor_loss(policy, reference.detach(), beta=0.1, anchor_delta=0.5)
    given, = torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(given, -0.1 * torch.sigmoid(0.5 - double(2, -1)), **EXACT)
    assert torch.autograd.gradcheck(lambda p: anchor_loss(p, reference.detach(), anchor_delta=0.5)[0], policy)
    assert not metrics["accuracy/anchor"].requires_grad


def test_anchor_in_bf16_and_far_out():
    """Sums of thousands of nats are subtracted in fp32, and nothing overflows."""
    policy, reference = torch.tensor([-300.0, -8192.0, 8192.0]).bfloat16(), torch.tensor([-302.0, 8192.0, -8192.0]).bfloat16()
    loss, _ = anchor_loss(policy, reference)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([softplus(-0.2), 1638.4, 0.0]))


@pytest.mark.parametrize("policy, reference", [((2,), (3,)), ((2, 1), (2, 1)), ((2,), (1, 2)), ((), ())])
def test_anchor_shapes(policy, reference):
    with pytest.raises(ValueError, match="must all be"):
        anchor_loss(torch.zeros(policy), torch.zeros(reference))


def test_mdpo_without_its_anchor_and_the_term_are_mdpo():
    """Without it, mDPO is rDPO's two comparisons on the crop."""
    logps = [-60 + 10 * row for row in torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    term, metrics = anchor_loss(logps[0], logps[3], beta=0.3, anchor_delta=0.7)
    whole, own = mdpo_loss(*logps, beta=0.3, delta=0.7)
    torch.testing.assert_close(rdpo_loss(*logps, beta=0.3)[0] + term, whole, **EXACT)
    assert torch.equal(metrics["accuracy/anchor"], own["accuracy/anchor"])


# ---- a loss and its terms ----------------------------------------------------------------------------------


def arguments(loss: str, *options: str):
    return read_arguments(train.LOSSES, ["--loss", loss, *options])


def scored(seed: int = 0) -> dict[str, torch.Tensor]:
    """What two pairs are scored as, responses of up to four tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)  # chosen, rejected
    policy, reference = (-torch.rand(4, 4, generator=generator) * mask for _ in range(2))
    return named("reference", ["chosen", "rejected"], (reference,)) | named(
        "policy", ["chosen", "rejected"], (policy.requires_grad_(), mask)) | {"leaf": policy}


def test_the_sum_by_hand():
    """DPO + 0.5 anchor + 0.25 NLL, to the last digit; every part is logged without its weight, DPO's as always."""
    inputs, args = scored(), arguments("dpo", "--beta", "0.3", "--anchor", "0.5", "--anchor-delta", "0.2",
                                       "--sft-weight", "0.25")
    losses, metrics = train.loss_of(train.LOSSES["dpo"], args, inputs)
    logps = [inputs[f"{who}_{name}_logps"] for who in ("policy", "reference") for name in ("chosen", "rejected")]
    plain, own = dpo_loss(*logps, beta=0.3)
    term, _ = anchor_loss(logps[0], logps[2], beta=0.3, anchor_delta=0.2)
    nll = -inputs["policy_chosen_token_logps"].sum(1) / 3  # both have three tokens
    assert torch.equal(losses, plain + 0.5 * term + 0.25 * nll) and losses.shape == (2,)
    assert torch.equal(metrics["loss/anchor"], term) and torch.equal(metrics["loss/sft"], nll)
    assert all(torch.equal(metrics[name], own[name]) for name in own)
    assert metrics.keys() - own.keys() == {"loss/anchor", "loss/sft", "accuracy/anchor", "logps/chosen", "tokens/chosen"}
    assert not any(value.requires_grad for value in metrics.values())


def test_no_weight_no_term():
    losses, metrics = train.loss_of(train.LOSSES["dpo"], arguments("dpo", "--beta", "0.3"), inputs := scored())
    plain, own = dpo_loss(*[inputs[f"{who}_{name}_logps"] for who in ("policy", "reference")
                            for name in ("chosen", "rejected")], beta=0.3)
    assert torch.equal(losses, plain) and metrics.keys() == own.keys()


def test_the_nll_is_trls():
    """`DPOTrainer._compute_loss` with the loss types "sigmoid" and "sft", once `rpo_alpha`: loss and gradient. TRL takes
    the mean over the batch's chosen tokens, which is ours where they are as many in each response."""
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"the stand-in trainer is written for TRL 1.16, found {trl.__version__}")
    from trl.trainer.dpo_trainer import DPOTrainer

    inputs = scored()
    leaf, mask = inputs["leaf"], torch.cat([inputs["chosen_mask"], inputs["rejected_mask"]])
    zeros = torch.zeros(4, 4)
    outputs = SimpleNamespace(log_probs=leaf, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        beta=0.3, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.25], f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=True, label_smoothing=0.0,
        model=SimpleNamespace(training=True), _tp_size=1, _total_train_tokens=0, _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x))
    batch = {"input_ids": torch.zeros(4, 5, dtype=torch.long), "attention_mask": torch.ones(4, 5),
             "completion_mask": F.pad(mask.long(), (1, 0)), "ref_chosen_logps": inputs["reference_chosen_logps"],
             "ref_rejected_logps": inputs["reference_rejected_logps"]}
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, return_outputs=False)
    losses, _ = train.loss_of(train.LOSSES["dpo"], arguments("dpo", "--beta", "0.3", "--sft-weight", "0.25"), inputs)
    torch.testing.assert_close(losses.mean(), theirs)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] * mask for loss in (losses.mean(), theirs)]
    torch.testing.assert_close(*gradients)


# ---- which losses can have them ----------------------------------------------------------------------------


def test_losses_have_the_terms_that_their_sequences_feed():
    found = {name: list(recipe.terms) for name, recipe in train.LOSSES.items()}
    assert found == {name: [] for name in train.LOSSES} | {name: ["anchor", "sft_weight"] for name in PAIRED} | {
        "mdpo": ["sft_weight"], "lpoi": ["sft_weight"], "symmpo": ["sft_weight"]}


def test_a_loss_of_ones_own_can_have_them(tmp_path):
    """It needs no word about terms; one without a beta gets the anchor's."""
    def own_loss(policy_chosen_logps, reference_chosen_logps, *, tau: float = 1.0):
        return policy_chosen_logps, {}

    one = {"chosen": dict(image="image", response="chosen")}
    recipe = Recipe(own_loss, one, "rank").with_terms(train.TERMS)
    args = read_arguments({"own": recipe}, ["--loss", "own", "--anchor", "2", "--anchor-delta", "-1"])
    assert list(recipe.terms) == ["anchor", "sft_weight"] and (args.beta, args.anchor, args.anchor_delta) == (0.1, 2, -1)
    check(args, recipe, 1)
    assert list(Recipe(own_loss, {"other": one["chosen"]}).with_terms(train.TERMS).terms) == []


@pytest.mark.parametrize("options", [
    "mdpo --anchor 1", "mdpo --anchor-delta 1", "sft --anchor 1", "sft --sft-weight 1", "slic_hf --anchor 1",
    "reward_model --sft-weight 1", "ppo --anchor 1", "rloo --sft-weight 1", "fisao --anchor-delta 1"])
def test_an_option_of_a_term_that_a_loss_cannot_have_is_refused(options, capsys):
    loss, *more = options.split()
    with pytest.raises(SystemExit):
        arguments(loss, *more)
    assert f"unrecognized arguments: {' '.join(more)}" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    ("--anchor-delta 1", "^--anchor-delta is of a term that is not added: --anchor WEIGHT adds it$"),
    ("--anchor -1", r"^--anchor must be in \[0, inf\), not -1"), ("--sft-weight nan", r"^--sft-weight must be in \[0, inf"),
    ("--anchor 1 --anchor-delta inf", "^--anchor-delta must be in")])
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        check(arguments("dpo", *options.split()), train.LOSSES["dpo"], 1)


def test_slic_hf_keeps_its_own_weight():
    """An option of the same name, which adds no second term."""
    inputs = scored()
    losses, metrics = train.loss_of(train.LOSSES["slic_hf"], arguments("slic_hf", "--sft-weight", "2"), inputs)
    chosen, rejected = inputs["policy_chosen_logps"], inputs["policy_rejected_logps"]
    torch.testing.assert_close(losses, F.relu(1 - chosen + rejected) - 2 * chosen)
    assert "loss/sft" not in metrics


# ---- in a run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_jsonl(path, [
        {"id": f"r{i}", "image": f"scene:{scenes.PAIRS + i}", "prompt": scenes.CAPTION_PROMPT,
         "chosen": "There is a dog" + " and a cup" * i + ".", "rejected": f"There is a cat and {i} dogs."}
        for i in range(4)])
    return path


TERMS = "--anchor 0.5 --anchor-delta 0.2 --sft-weight 0.25".split()


def run(pairs: Path, out: Path, *more: str) -> list[dict]:
    """The log of a run of two steps."""
    assert train.main(["--loss", "dpo", "--data", str(pairs), "--out", str(out), "--steps", "2", "--batch-size", "4",
                       "--eval-scenes", "0", "--log-every", "1", "--save-every", "1", "--lora-rank", "2", *more]) == 0
    return read(out)


def read(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens/s", "eta_s", "peak_gib")} for row in rows]


@pytest.fixture(scope="module")
def whole(pairs, tmp_path_factory) -> tuple[list[dict], list]:
    """The log of a run with both terms, and (inputs, losses) of its micro-batches."""
    seen, loss_of = [], train.loss_of
    with pytest.MonkeyPatch.context() as patch:
        def watched(recipe, args, inputs):
            losses, metrics = loss_of(recipe, args, inputs)
            seen.append((inputs, losses.detach()))
            return losses, metrics
        patch.setattr(train, "loss_of", watched)
        return run(pairs, tmp_path_factory.mktemp("whole") / "out", *TERMS), seen


def test_a_step_takes_the_loss_and_its_terms(whole):
    """Of the embedded model, at the tuned beta of 1; in the second step policy and reference differ."""
    lines, seen = whole
    for step, (line, (inputs, losses)) in enumerate(zip(lines, seen, strict=True)):
        logps = [inputs[f"{who}_{name}_logps"] for who in ("policy", "reference") for name in ("chosen", "rejected")]
        plain, term = dpo_loss(*logps, beta=1.0)[0], anchor_loss(logps[0], logps[2], beta=1.0, anchor_delta=0.2)[0]
        nll, _ = sft_loss(inputs["policy_chosen_token_logps"], inputs["chosen_mask"])
        assert torch.equal(losses, plain + 0.5 * term + 0.25 * nll)
        assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
        assert line["loss/anchor"] == pytest.approx(term.mean().item(), rel=1e-6)
        assert line["loss/sft"] == pytest.approx(nll.mean().item(), rel=1e-6)
        assert (plain.mean().item() == pytest.approx(math.log(2), abs=1e-6)) == (step == 0)
        assert (term.mean().item() == pytest.approx(softplus(0.2), abs=1e-6)) == (step == 0)


def test_the_terms_move_the_weights(whole, pairs, tmp_path):
    """The first step is the same but for the terms; the second is another, and finds the chosen responses likelier."""
    without = run(pairs, tmp_path / "without")
    assert without[0]["reward/chosen"] == whole[0][0]["reward/chosen"] == 0
    assert without[0]["grad_norm"] != whole[0][0]["grad_norm"]
    assert without[1]["reward/chosen"] < whole[0][1]["reward/chosen"]


def test_in_parts_and_with_the_reference_kept(whole, pairs, tmp_path):
    """Micro-batches by tokens and --reference-cache change nothing but who wins a tie: the first step begins at the
    reference, and rounding decides its accuracies."""
    found = run(pairs, tmp_path / "parts", *TERMS, "--max-tokens", "300", "--reference-cache", str(tmp_path / "cache"))
    for line, expected in zip(found, whole[0], strict=True):
        tied = {name for name in expected if name.startswith("accuracy") and expected["step"] == 1}
        assert line.keys() == expected.keys()
        assert {name: line[name] for name in line.keys() - tied} == pytest.approx(
            {name: expected[name] for name in line.keys() - tied}, rel=1e-4, abs=1e-5)


def test_a_resumed_run_keeps_its_terms(whole, pairs, tmp_path):
    out = tmp_path / "out"
    run(pairs, out, *TERMS)
    (out / "checkpoint-2.pt").unlink(missing_ok=True)
    with pytest.raises(BadInput, match="anchor was 0.5, is 0.75"):
        run(pairs, out, "--resume", *TERMS, "--anchor", "0.75")
    assert run(pairs, out, "--resume", *TERMS) == whole[0]


def test_an_example_without_weight_has_no_terms(pairs, tmp_path, monkeypatch):
    """As a tie of online_dpo: nothing is left that could move the weights."""
    collate = lifecycle.collate
    monkeypatch.setattr(lifecycle, "collate", lambda records, **how: collate(
        [{**record, "weight": 0.0} for record in records], **how))
    lines = run(pairs, tmp_path / "out", *TERMS)
    assert [line["grad_norm"] for line in lines] == [0, 0] and lines[1]["used"] == 0
