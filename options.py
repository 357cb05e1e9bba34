"""The command line of train.py: options from the signatures of a loss's functions, and what of them is refused.

    Recipe            what a --loss consists of; train.py has the table
    read_arguments    command line -> settings; defaults from a function's signature, help from its file's header
    check             refuses settings that cannot be, all at once, before anything is loaded
    check_places      refuses an --out that holds another run

A model folder may hold train.json, settings that suit the model; they become defaults.
"""

import argparse
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import common
from common import BadInput, add_options, arguments_of, check_ranges, is_url, read_json, refuse
from data.batch import fields_of, scored
from data.records import PAIR_TEXTS
from model.checkpoint import DEFAULT_CLIP, DEFAULT_MODEL
from model.families import TEMPLATES
from model.resume import checkpoints
from model.training import SCHEDULES, named
from pairs.methods import METHODS
from pairs.progress import parts

TUNED = "train.json"  # settings that suit a model: {option: value} and, for single functions, {name: {option: value}}
MEASURED = ("mean", "std")  # keyword arguments of losses/ that hold what was measured before training, no options

REACHED = 395.6  # TFLOP/s, an assumption: 40 % of the 989 that an H100 does in dense bf16 products
PAIRS = "pairs.jsonl"  # in --out, where train.py makes them
SCENES_OF_A_SEED = 100_000  # pairs of ten seeds fit below the scenes of the dev and test splits

# What numbers may be: interval -> options, of one function alone where FUNCTION.option. A clip of inf is none.
RANGES = {
    "[1, 1e9]": "steps batch_size micro_batch_size max_tokens log_every save_every keep_checkpoints scenes samples"
                " max_new_tokens inner_epochs minibatches iterations",
    "[2, 1e9]": "ranked_pairs.samples mixed_pairs.samples leave_one_out.samples",  # compared with each other
    "[0, 1e9]": "lora_rank eval_scenes workers seed",
    "(0, inf)": "lr projector_lr vision_lr tflops lora_alpha temperature beta dpo_weighted_loss.gamma",
    "[0, inf)": "weight_decay kl_coef kl_target missing_eos_penalty value_coef margin anchor sft_weight centring_weight"
                " slic_hf_loss.delta bdhs_triples.temperature pair_weight margin_weight anchor_weight",
    "(0, inf]": "clip_norm clip value_clip limit",
    "[0, inf]": "rloo_loss.clip",  # 0: none
    "[0, 1)": "warmup lora_dropout",
    "[0, 0.5)": "label_smoothing",
    "[0, 1]": "gamma lam offline rho_th",
    "[-1, 1]": "eps_s",  # a cosine
    "(-inf, inf)": "delta anchor_delta",
}


class Recipe(NamedTuple):
    """What a --loss consists of. What its functions ask for by the names of their arguments decides the rest; nothing
    asks which functions they are."""

    loss: Callable  # of losses/
    sequences: dict[str, dict]  # what it needs scored (data.batch.Scored)
    pairs: str = ""  # method of generate_pairs.py that makes fitting records; "": images and questions suffice
    online: Callable | None = None  # lets the policy write the records of each step
    advantages: Callable | None = None  # reinforcement: rollouts of a step -> what the loss learns from
    parts: tuple[Callable, ...] = ()  # the functions of losses/ that `advantages` puts together
    inner_epochs: int = 4  # how often reinforcement goes through a step's samples
    has: tuple[str, ...] = ()  # terms that are part of the loss already
    terms: Mapping[str, Callable] = {}  # that can be added to it: option of the weight -> function of losses/

    def with_terms(self, terms: Mapping[str, Callable]) -> "Recipe":
        """The same with those of `terms` whose arguments its sequences fill and that are not part of it already."""
        return self._replace(terms={name: term for name, term in terms.items()
                                    if name not in self.has and self.inputs.issuperset(arguments_of(term))})

    @property
    def inputs(self) -> set[str]:
        """Names of the arguments that scoring its sequences fills (model.training.named)."""
        names, row = [*self.sequences], torch.zeros(len(self.sequences), 1)
        found = named("policy", names, row if self.rewards else (row, row))
        return {*found, *(named("reference", names, (row,)) if self.compares else ())}

    @property
    def functions(self) -> list[Callable]:
        """Those whose keyword arguments are options."""
        return [function for function in (self.loss, self.online, *self.parts) if function]

    @property
    def samples(self) -> bool:
        """Whether it learns from what the policy says."""
        return bool(self.online or self.advantages)

    @property
    def compares(self) -> bool:
        """Whether it compares with the model as it was."""
        names = inspect.signature(self.loss).parameters
        return self.advantages is not None or any(name.startswith("reference_") for name in names)

    @property
    def drawn(self) -> bool:
        """Whether what it scores differs from step to step."""
        return self.samples or any(how.drawn for how in scored(self.sequences).values())

    @property
    def rewards(self) -> bool:
        """Whether it trains a reward model."""
        return self.asks_for("chosen_rewards")

    def asks_for(self, name: str) -> bool:
        """Whether the loss, or what makes its records or advantages, has this argument."""
        asking = [function for function in (self.loss, self.online, self.advantages) if function]
        return any(name in inspect.signature(function).parameters for function in asking)


# --------------------------------------------------------------------------------------- command line -> settings


def read_arguments(losses: dict[str, Recipe], argv: list[str] | None = None, about: str = "") -> argparse.Namespace:
    """Command line -> settings. The options of the chosen loss are those of its functions."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--loss", choices=losses, default="adavip", help="(default: %(default)s)")
    first.add_argument("--model", type=Path, default=DEFAULT_MODEL, metavar="DIR",
                       help="LLaVA folder or hub id (default: model/tiny)")
    known, _ = first.parse_known_args(argv)
    recipe = losses[known.loss]
    tuned = tuned_settings(known.model, recipe)
    parser = argparse.ArgumentParser(description=about, parents=[first], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_general_options(parser)
    group = parser.add_argument_group(f"options of {known.loss}")
    own = options_of(*recipe.functions)
    add_options(group, *recipe.functions, skip=MEASURED,
                tuned={name: f"{tuned[name]} by {TUNED}, else {own[name][1]}" for name in own.keys() & tuned.keys()})
    add_terms(group, recipe)
    if recipe.samples:
        add_sampling_options(group, recipe)
    parser.set_defaults(**tuned)
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / args.loss
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    if recipe.samples and args.clip_model is None and tuned:
        args.clip_model = DEFAULT_CLIP
    return args


def add_general_options(parser: argparse.ArgumentParser) -> None:
    """Options that every loss has."""
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE",
        help="records in any format of data/formats.py; left out, they are made from scenes")
    add("--pairs", choices=METHODS,
        help="method that makes pairs of scenes (default: the loss's own)")
    add("--estimate", action="store_true",
        help="load nothing: say what a run on these records would take, memory and time, and end")
    add("--tflops", type=float, default=REACHED,
        help="for --estimate, TFLOP/s that a device reaches: 40 %% of an H100's 989 in bf16 (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="where everything is written (default: runs/LOSS)")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, or with its unfinished pairs")
    add("--overwrite", action="store_true", help="replace an earlier run that --out holds")
    add("--steps", type=int, default=60,
        help="optimiser steps; a resumed run may have another number, and from there on the learning rate of a run"
             " of that length (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="records a step, over all processes (default: %(default)s)")
    add("--micro-batch-size", type=int, help="records a forward pass and process (default: all of the process)")
    add("--max-tokens", type=int, metavar="N",
        help="instead of it, tokens a forward pass and process: as many records as fit, prompts and images included")
    add("--group-by-length", action="store_true", help="batches of records of similar length")
    add("--lr", type=float, default=1e-6, help="peak learning rate (default: %(default)s)")
    add("--projector-lr", type=float, help="that of the projector (default: --lr)")
    add("--vision-lr", type=float, help="that of the vision tower (default: --lr)")
    add("--schedule", choices=SCHEDULES, default="cosine",
        help="how the rate falls after the warm-up (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of steps with rising rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--clip-norm", type=float, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--lora-rank", type=int, default=32, help="0: decoder and projector in full (default: %(default)s)")
    add("--lora-alpha", type=float, help="(default: twice the rank)")
    add("--lora-dropout", type=float, default=0.0, help="(default: %(default)s)")
    add("--train-projector", action="store_true", help="with LoRA, train the projector too")
    add("--train-vision", action="store_true", help="train the vision tower too, in full")
    add("--precision", choices=("fp32", "bf16"), help="(default: bf16 on CUDA, else fp32)")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--shard", action="store_true",
        help="spread weights, gradients and optimiser state over the processes (FSDP2), which by default hold all")
    add("--reference-cache", type=Path, metavar="FILE",
        help="compute the reference's log-probs once and keep them here; refused if they are not this run's")
    add("--template", choices=TEMPLATES, help="prompt template (default: the checkpoint's own)")
    add("--aspect", metavar="WAY", help="how images are shown, a way of the model's family (default: the checkpoint's)")
    add("--seed", type=int, default=0, help="of scenes, sampling, adapters and order (default: %(default)s)")
    add("--scenes", type=int, default=600, help="scenes that records are made from (default: %(default)s)")
    add("--eval-scenes", type=int, default=300, help="held-out scenes, 0 for none (default: %(default)s)")
    add("--eval-split", choices=("test", "dev"), default="test",
        help="choose settings on dev (default: %(default)s)")
    add("--log-every", type=int, default=5, help="steps between log lines (default: %(default)s)")
    add("--save-every", type=int, default=20, help="steps between checkpoints (default: %(default)s)")
    add("--keep-checkpoints", type=int, default=2, metavar="N", help="the newest N stay (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare batches (default: %(default)s)")
    add("--bad-records", choices=("stop", "skip"), default="stop",
        help="when an image turns out to be damaged: save a checkpoint and stop, or put another record in its"
             " place (default: %(default)s)")


def add_terms(group, recipe: Recipe) -> None:
    """Weights of the terms that can be added to the loss, and those of their options that the loss does not share."""
    for name, term in recipe.terms.items():
        what, _, _ = term.__doc__.partition(".\n")
        group.add_argument(f"--{name.replace('_', '-')}", type=float, default=0.0, metavar="WEIGHT",
                           help=f"add WEIGHT times {term.__name__}: {what} (default: %(default)s)")
        add_options(group, term, skip=options_of(*recipe.functions))


def add_sampling_options(group, recipe: Recipe) -> None:
    """Who judges the samples, how they are drawn and how often they are used."""
    add = group.add_argument
    if recipe.asks_for("judge"):
        add("--judge", default="reward" if recipe.advantages else "scene", metavar="WHO",
            help="scene (its own record), clip, reward (a reward model), or the URL of an OpenAI-compatible server"
                 " with --judge-model (default: %(default)s)")
        add("--reward", type=Path, metavar="DIR",
            help="for --judge reward: what train.py --loss reward_model wrote")
        add("--judge-model", metavar="NAME", help="name of the model at the judge's server")
    add("--clip-model", type=Path, metavar="DIR",
        help="CLIP folder (default: model/tiny/clip, which knows scenes only; with --model none)")
    if recipe.asks_for("verifier"):
        add("--objects", type=Path, metavar="FILE",
            help="what photographs show, to measure the baselines on: {image: [classes]} or COCO instances")
        add("--baselines", type=Path, metavar="FILE", help="baselines.json of an earlier run, to take instead")
    if recipe.advantages:
        add("--samples", type=int, default=4, help="responses to each image (default: %(default)s)")
        add("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
        add("--max-new-tokens", type=int, default=96, help="of a response (default: %(default)s)")
        add("--inner-epochs", type=int, default=recipe.inner_epochs,
            help="epochs on the samples of a step (default: %(default)s)")
        add("--minibatches", type=int, default=1, help="optimiser steps in each of them (default: %(default)s)")
        add("--kl-target", type=float, default=0.0,
            help="nats a response that the KL coefficient is steered to; 0: it is fixed (default: %(default)s)")


def options_of(*functions: Callable) -> dict[str, tuple[object, object]]:
    """Keyword arguments that are options: name -> (type, default)."""
    return {name: option for name, option in common.options_of(*functions).items() if name not in MEASURED}


def kwargs_of(function: Callable, args: argparse.Namespace) -> dict[str, object]:
    """The settings that are keyword arguments of a function."""
    return {name: getattr(args, name) for name in options_of(function)}


def tuned_settings(model: Path, recipe: Recipe) -> dict[str, float]:
    """What train.json of the model's folder says about the options of this loss: those for all, then those for its
    functions. Raises BadInput when it is no table of numbers."""
    if not (model / TUNED).is_file():
        return {}
    given = read_json(model / TUNED)
    found = {name: value for name, value in given.items() if not isinstance(value, dict)}
    for function in filter(None, (*recipe.functions, recipe.advantages)):
        own = given.get(function.__name__, {})
        found |= own if isinstance(own, dict) else {function.__name__: own}
    refuse(f"{model / TUNED}: {name} must be a number" for name, value in found.items()
           if type(value) not in (int, float))
    own = {"lr", "steps", *options_of(*recipe.functions)}
    return {name: value for name, value in found.items() if name in own}


# -------------------------------------------------------------------------------------------- what is refused


def check(args: argparse.Namespace, recipe: Recipe, world: int) -> None:
    """Fill in what depends on other settings, and refuse impossible ones. Raises one BadInput that lists all."""
    check_ranges(vars(args), RANGES, *recipe.functions)
    problems = [*batch_problems(args, recipe, world), *record_problems(args, recipe), *pair_problems(args, recipe),
                *setting_problems(args, recipe), *term_problems(args, recipe)]
    if args.micro_batch_size is None:  # with --max-tokens, of what is scored without gradients
        args.micro_batch_size = 1 if args.max_tokens else max(1, args.batch_size // world)
    if args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if recipe.samples:
        problems += sampling_problems(args, recipe)
    refuse(problems)


def batch_problems(args: argparse.Namespace, recipe: Recipe, world: int) -> Iterator[str]:
    """Numbers that do not divide each other, micro-batches cut in two ways, lengths that are not known."""
    size = 1 if args.max_tokens else args.micro_batch_size or max(1, args.batch_size // world)
    parts, rest = divmod(args.batch_size, world * size)
    if args.max_tokens and args.micro_batch_size:
        yield "--max-tokens cuts a batch by tokens, --micro-batch-size by records: which of them?"
    elif rest:
        yield f"--batch-size {args.batch_size} is not a multiple of {world} processes x micro-batch {size}"
    elif recipe.advantages and parts % args.minibatches:
        yield f"--minibatches {args.minibatches} does not divide the {parts} micro-batches of a process"
    if recipe.samples and (args.max_tokens or args.group_by_length):
        option = "--max-tokens" if args.max_tokens else "--group-by-length"
        yield f"{option}: how long the samples of {args.loss} will be is not known; --micro-batch-size goes by records"


def record_problems(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """Records that the loss does not learn from, or that there are not."""
    if args.estimate and not args.data:
        yield "--estimate counts the tokens of your records: --data FILE"
    if args.pairs and (args.data or not recipe.pairs):
        yield "--pairs is for losses that learn from pairs, where there is no --data"
    if args.data is None and args.scenes > SCENES_OF_A_SEED:
        yield f"--scenes {args.scenes} is more than the {SCENES_OF_A_SEED} of a seed"
    if recipe.asks_for("offline") and args.offline and not recipe.pairs:
        yield f"--offline {args.offline}: {args.loss} has no given pairs, mixed_dpo does"


def pair_problems(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """Pairs of --pairs that lack what the loss reads, or continue a context where it samples whole responses."""
    needs = fields_of(recipe.sequences) - {*PAIR_TEXTS, "generated"}
    fitting = [method for method, (_, adds) in METHODS.items()
               if needs.issubset(adds) and not (recipe.samples and "context" in adds)]
    if recipe.pairs and args.pairs and args.pairs not in fitting:
        reason = " and ".join(sorted(needs)) or "responses without a context"
        yield f"--pairs {args.pairs}: {args.loss} needs {reason}, which {', '.join(fitting)} make"


def setting_problems(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """Options of what does not train or differs at every step, and a run that cannot go on or must not be replaced."""
    if args.projector_lr and args.lora_rank and not args.train_projector:
        yield "--projector-lr: the projector does not train; --train-projector lets it"
    if args.vision_lr and not args.train_vision:
        yield "--vision-lr: the vision tower does not train; --train-vision lets it"
    if args.train_vision and args.shard:
        yield "--shard keeps the vision tower whole and frozen, --train-vision trains it: which of them?"
    if args.resume and args.overwrite:
        yield "--resume goes on with what --out holds, --overwrite replaces it: which of them?"
    if args.resume and not checkpoints(args.out) and not unfinished_pairs(args):
        yield f"--resume: there is no checkpoint in {args.out}"
    if args.reference_cache and not recipe.compares:
        yield f"--reference-cache: {args.loss} has no reference"
    elif args.reference_cache and recipe.drawn:
        yield f"--reference-cache: what {args.loss} scores is drawn again at every step"


def unfinished_pairs(args: argparse.Namespace) -> list[Path]:
    """Part files of pairs. They go at a run's first checkpoint: where there are both, the checkpoint is of another."""
    return [] if args.data else parts(args.out / PAIRS)


def term_problems(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """Options of terms that are not added."""
    shared = options_of(*recipe.functions)
    for name, term in recipe.terms.items():
        changed = [option for option, (_, default) in options_of(term).items()
                   if option not in shared and getattr(args, option) != default]
        if changed and not getattr(args, name):
            yield (f"--{changed[0].replace('_', '-')} is of a term that is not added: --{name.replace('_', '-')} WEIGHT"
                   " adds it")


def sampling_problems(args: argparse.Namespace, recipe: Recipe) -> Iterator[str]:
    """Judges that are not there, or cannot judge this."""
    judge = args.judge if recipe.asks_for("judge") else "clip"  # fisao and bdhs_online have a CLIP instead
    if judge == "reward" and not args.reward:
        yield "--judge reward needs --reward DIR; python train.py --loss reward_model makes one"
    if judge == "scene" and recipe.advantages:
        yield "--judge scene compares responses, it does not score them: reinforcement needs another"
    if judge not in ("scene", "clip", "reward") and not is_url(judge):
        yield f"--judge {judge!r} is none of scene, clip, reward, or a server's URL"
    if recipe.asks_for("judge") and is_url(judge) != bool(args.judge_model):
        yield "--judge-model names the model of a server: --judge URL --judge-model NAME"
    if judge == "clip" and args.clip_model is None:
        yield f"{args.loss} needs --clip-model DIR: the embedded CLIP knows scenes only"
    files = {"objects": args.objects, "baselines": args.baselines} if recipe.asks_for("verifier") else {}
    yield from (f"--{name} {path}: no such file" for name, path in files.items() if path and not path.is_file())


def check_places(args: argparse.Namespace) -> None:
    """Refuse an --out that holds an earlier run, and places that cannot be written. Raises BadInput."""
    earlier = [p.name for p in (*checkpoints(args.out), args.out / "result.json", args.out / "model") if p.exists()]
    if earlier and not (args.resume or args.overwrite):
        raise BadInput(f"{args.out} holds {earlier[0]} of an earlier run: choose another --out, go on with"
                       " --resume or replace it with --overwrite")
    for folder in (args.out, *([args.reference_cache.parent] if args.reference_cache else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = "a file is there" if folder.is_file() else error.strerror
            raise BadInput(f"{folder}: cannot write into this folder ({reason})") from None
    if args.reference_cache and args.reference_cache.is_dir():
        raise BadInput(f"--reference-cache {args.reference_cache}: is a folder, a file is wanted")
