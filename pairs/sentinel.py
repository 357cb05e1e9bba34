"""SENTINEL: the next sentence, true against hallucinated, after a beginning that is true.

Peng et al. 2025, "Mitigating Object Hallucinations via Sentence-Level Early Intervention", arXiv 2507.12455, and its
released code (github.com/pspdada/SENTINEL). Hallucinations breed hallucinations, so they are stopped where the first
one begins. A response grows sentence by sentence; c is what there is of it, at first nothing:

    1. sample      y_1 .. y_n ~ pi(. | image, x, c), one sentence each
    2. check       objects(y_i) against those that the image shows: faithful, if it names some and all are shown;
                   hallucinated, if it names one that is not
    3. pair        the k-th faithful sentence that names an object of c, too (context-coherent), with the k-th
                   hallucinated one: (c, y_w, y_l), as many as there are of both
    4. go on       c <- c y_j of a faithful sentence, rather one whose objects are all new; if there is none, one that
                   names nothing; until most samples end the response

The pairs are trained with DPO on the sentences alone (C-DPO): c is the record's `context`, which is not scored, and no
end token is scored after a sentence. The published pairs, with the settings of the released scripts, one epoch:

    python train.py --loss dpo --data LLaVA_v1_5_7b_SENTINEL_8_6k.json --model llava-hf/llava-1.5-7b-hf --steps 134 \
        --lr 2e-6 --beta 0.1 --batch-size 64 --lora-rank 128 --warmup 0 --aspect pad

    symbol    argument         meaning
    x         records          images and questions
    objects   shown            record -> classes of CHAIR's list that its image shows
    n         samples          sentences sampled at a time
              temperature      of the sampling
              new_objects      take y_w from all faithful sentences, also those whose objects are all new
              max_sentences    reconstructed: of a response; the released code has no limit
              max_new_tokens   of a sentence
              seed             with a record's id it decides all that is drawn for it, whatever the order

One image gives several pairs, or none; their ids are ID/1, ID/2, ...

From the released code: steps 1 to 4, n = 10, temperature 0.7, one space between sentences, no end token scored (there,
after an empty context it is; but step 3 makes no such pairs).
Departures from it
- It asks two open-vocabulary detectors, and neither pairs nor continues sentences with an object on which they differ.
  Here what an image shows is known (scenes), or what one detector finds (--judge chair), and mentions are CHAIR's.
- It ends a response when more than half of the samples are empty or repeated; here, when more than half are empty.
- Where all samples hallucinate it continues one of them, here the response ends: c stays true.
- `new_objects` is not in it: there a first sentence, whose objects are all new, is never paired.
- What ends a sentence is in data/sentences.py, there any of . ! ?
"""

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from data.corrupt import sample_seed
from data.processor import Processor
from data.records import continued, pair_of
from judges.scene import synonyms
from metrics.chair import mentions
from model.generate import read, write
from model.llava import Llava
from pairs.bdhs import Cut, Writing

# (numbers of records, contexts, round) -> samples of the next sentence: "" the response has ended, None not finished
Next = Callable[[list[int], list[str], int], list[list[str | None]]]


def sentinel_pairs(records: list[dict], model: Llava, processor: Processor, shown: Callable[[dict], set[str]],
                   root: Path | None = None, source: dict | None = None, *, samples: int = 10,
                   temperature: float = 0.7, new_objects: bool = False, max_sentences: int = 10,
                   max_new_tokens: int = 96, seed: int = 0) -> tuple[list[dict], Counter]:
    """Pairs of sentences after a context, several of an image."""
    sample = sampler(records, model, processor, root, samples=samples, temperature=temperature,
                     max_new_tokens=max_new_tokens, seed=seed)
    origin = {**(source or {}), "seed": seed, "temperature": temperature}
    return bootstrap(records, sample, shown, new_objects=new_objects, max_sentences=max_sentences, seed=seed,
                     source=origin)


def sampler(records: list[dict], model: Llava, processor: Processor, root: Path | None, *, samples: int,
            temperature: float, max_new_tokens: int, seed: int) -> Next:
    """Step 1. Images and questions are computed once for all rounds; a context for which the decoder's window has no
    room has no next sentence."""
    prompts = read(model, **processor.questions([r["image"] for r in records], [r["prompt"] for r in records], root))

    def sample(rows: list[int], contexts: list[str], step: int) -> list[list[str | None]]:
        writings = [Writing(processor, Cut(context, "", "", "")) for context in contexts]
        fits = [i for i, row in enumerate(rows)
                if prompts.lengths[row] + len(writings[i].start) + max_new_tokens <= processor.window]
        out = write(model, prompts, [[writings[i].start] * samples for i in fits], rows=[rows[i] for i in fits],
                    eos_id=processor.eos_id, max_new_tokens=max_new_tokens, temperature=temperature,
                    stop=lambda i, j, new: writings[fits[i]].read(new, whole=False) is not None,
                    seeds=[sample_seed(f"{records[rows[i]]['id']}/{step}", seed) for i in fits]) if fits else []
        said = {i: [writings[i].read(new, whole=len(new) < max_new_tokens) for new in group]
                for i, group in zip(fits, out)}
        return [said.get(i, [""]) for i in range(len(rows))]

    return sample


def bootstrap(records: list[dict], sample: Next, shown: Callable[[dict], set[str]], *, new_objects: bool = False,
              max_sentences: int = 10, seed: int = 0, source: dict | None = None) -> tuple[list[dict], Counter]:
    """Steps 2 to 4, and the loop around them."""
    seen = [shown(record) for record in records]
    contexts, made = [""] * len(records), [[] for _ in records]
    going = list(range(len(records)))
    for step in range(max_sentences):
        samples = sample(going, [contexts[row] for row in going], step) if going else []
        for row, texts in zip(list(going), samples):
            objects = {text: objects_of(text) for text in texts if text}  # of each distinct sentence
            familiar = objects_of(contexts[row])
            for chosen, rejected in pairs_of(objects, familiar, seen[row], new_objects):
                pair = pair_of(records[row], {"method": "sentinel", **(source or {})}, context=contexts[row],
                               chosen=chosen, rejected=rejected)
                made[row].append({**pair, "id": f"{records[row]['id']}/{len(made[row]) + 1}"})
            best = to_continue(objects, familiar, seen[row])
            if not best or texts.count("") > len(texts) / 2:
                going.remove(row)
            else:
                grown = random.Random(f"{seed}/{records[row]['id']}/{step}").choice(best)
                contexts[row] = continued(contexts[row], grown)
    pairs = [pair for own in made for pair in own]
    return pairs, +Counter({"no context with a faithful and a hallucinated sentence": sum(not own for own in made)})


def objects_of(text: str) -> set[str]:
    """Classes that a text mentions."""
    return {name for _, name in mentions(text, synonyms())}


def pairs_of(objects: dict[str, set[str]], familiar: set[str], shown: set[str],
             new_objects: bool = False) -> list[tuple[str, str]]:
    """Step 3: (y_w, y_l) of sentences with their objects; `familiar` are those of the context."""
    faithful = [text for text, said in objects.items()
                if said and said <= shown and (new_objects or said & familiar)]
    return list(zip(faithful, (text for text, said in objects.items() if said - shown)))


def to_continue(objects: dict[str, set[str]], familiar: set[str], shown: set[str]) -> list[str]:
    """Step 4: the sentences, of the best kind that there is, one of which the context grows by."""
    faithful = [text for text, said in objects.items() if said and said <= shown]
    new = [text for text in faithful if not objects[text] & familiar]
    return new or faithful or [text for text, said in objects.items() if not said]
