"""BDHS completions over shared prompts against other ways to compute them, in one run: CPU seconds and ratio.

An example is an image, a prompt, a mask over the image tokens and the beginnings of an answer's sentences
(pairs/bdhs.py). Three ways to complete all sentences of all examples, greedily:

    shared         all examples in one batch; the sentences of an example continue one computed prompt
    batched        all sentences in one batch, each with a prompt of its own
    one at a time  each sentence by itself

All must give the same tokens, else the benchmark ends with an error. Sizes: "tiny" is the embedded model on captions of
the scene world, stopped at the ends of sentences; "small" has random weights, 576 image tokens and a fixed number of
new tokens.

    python -m benchmarks.bdhs --size small --examples 4
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import rig
from data.processor import Processor
from data.scene_text import CAPTION_PROMPT, caption
from data.scenes import PAIRS, reference, sample_scene
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import generate
from model.llava import Llava
from model.views import View, single
from pairs.bdhs import Writing, cut_sentences, draw_mask

RHO = 0.99


class Example(NamedTuple):
    """A prompt with its image, and where its sentences begin."""

    view: View
    prompt: list[int]
    hidden: Tensor  # (len(prompt),) bool
    starts: list[list[int]]
    finished: Callable[[int, list[int]], bool]  # (sentence, new tokens)


def tiny_examples(count: int) -> tuple[Llava, list[Example], int]:
    """The embedded model, captions of scenes, and its EOS."""
    model, processor, examples = load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL), []
    for seed in range(PAIRS, PAIRS + count):
        rng = np.random.default_rng(seed)
        cuts = cut_sentences(caption(sample_scene(seed), random.Random(seed)), rng)
        writings, prompt = [Writing(processor, cut) for cut in cuts], processor.prompt(CAPTION_PROMPT)
        examples.append(Example(
            processor.image(reference(seed)), prompt, draw_mask(prompt, processor.image_id, RHO, rng),
            [writing.start for writing in writings],
            lambda j, new, writings=writings: writings[j].read(new, whole=False) is not None))
    return model, examples, processor.eos_id


def small_examples(count: int) -> tuple[Llava, list[Example], int]:
    """A random model, prompts of 40 tokens and an image, 3 to 6 sentences that begin after 10 to 90 tokens."""
    torch.manual_seed(0)
    model, rng, image = Llava(rig.SMALL).eval(), np.random.default_rng(0), rig.SMALL.image_token_index

    def tokens(n: int) -> list[int]:
        return rng.integers(3, image, n).tolist()

    examples = []
    for _ in range(count):
        prompt = [1, *tokens(9), *[image] * 576, *tokens(30)]
        starts = [tokens(n) for n in np.sort(rng.integers(10, 91, rng.integers(3, 7)))]
        examples.append(Example(single(torch.randn(3, 336, 336), 576), prompt,
                                draw_mask(prompt, image, RHO, rng), starts, lambda j, new: False))
    return model, examples, rig.SMALL.text.vocab_size  # no token: nothing ends but by length


def ways(model: Llava, examples: list[Example], eos_id: int, steps: int) -> dict[str, Callable[[], list]]:
    """Name -> function that completes everything: [example][sentence] new tokens."""
    names = [(i, j) for i, example in enumerate(examples) for j in range(len(example.starts))]
    complete = partial(generate, model, eos_id=eos_id, max_new_tokens=steps)

    def shared():
        return complete([e.view for e in examples], [e.prompt for e in examples],
                        starts=[e.starts for e in examples], hidden=[e.hidden for e in examples],
                        stop=lambda i, j, new: examples[i].finished(j, new))

    def batched():
        out = complete([e.view for e in examples], [examples[i].prompt for i, _ in names],
                       shows=[i for i, _ in names], starts=[[examples[i].starts[j]] for i, j in names],
                       hidden=[examples[i].hidden for i, _ in names],
                       stop=lambda n, _, new: examples[names[n][0]].finished(names[n][1], new))
        rest = (answer for (answer,) in out)
        return [[next(rest) for _ in example.starts] for example in examples]

    def one_at_a_time():
        return [[complete([e.view], [e.prompt], starts=[[start]], hidden=[e.hidden],
                          stop=lambda _, __, new, e=e, j=j: e.finished(j, new))[0][0]
                 for j, start in enumerate(e.starts)] for e in examples]

    return {"shared": shared, "batched": batched, "one at a time": one_at_a_time}


def main() -> None:
    """Time the three ways on the same examples and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32, help="the limit of each sentence")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, examples, eos_id = {"tiny": tiny_examples, "small": small_examples}[args.size](args.examples)
    variants = ways(model, examples, eos_id, args.new_tokens)
    results = {name: way() for name, way in variants.items()}
    for name, result in results.items():
        if result != results["shared"]:
            sys.exit(f"{name} and shared give different tokens: this would compare different computations")
    sentences = sum(len(example.starts) for example in examples)
    print(f"{args.size}: {len(examples)} examples, {sentences} sentences, prompts of {len(examples[0].prompt)} tokens, "
          f"{sum(len(a) for group in results['shared'] for a in group)} new tokens, the same in all variants")
    seconds = rig.cpu_seconds(variants, args.rounds)
    print(rig.table([{"completion": name, "CPU s": f"{value:.2f}", "vs shared": f"{value / seconds['shared']:.2f}x"}
                     for name, value in seconds.items()]))


if __name__ == "__main__":
    main()
