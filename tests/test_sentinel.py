"""SENTINEL's pairs: what is faithful, what is paired, how the context grows, when a response ends."""

import numpy as np
import pytest

from data import scenes
from data.processor import Processor
from generate_pairs import read_arguments
from model.checkpoint import DEFAULT_MODEL, load_llava
from model.generate import generate
from pairs.methods import make_pairs
from pairs.sentinel import bootstrap, objects_of, pairs_of, sampler, to_continue

DOG, CAT, CUP, BOTH, NONE, COW = "A dog.", "A cat.", "A cup.", "A dog and a cow.", "It is bright.", "A cow."
SHOWN = {"dog", "cat", "cup"}


def said(*texts: str) -> dict[str, set[str]]:
    return {text: objects_of(text) for text in texts}


@pytest.mark.parametrize(("texts", "familiar", "new_objects", "pairs"), [
    ((DOG, COW), (), True, [(DOG, COW)]),
    ((BOTH, NONE, CAT), (), True, [(CAT, BOTH)]),  # one absent object is enough; nothing named is neither
    ((DOG, CAT, COW, BOTH), ("cat",), True, [(DOG, COW), (CAT, BOTH)]),
    ((DOG, CAT, COW, BOTH), ("cat",), False, [(CAT, COW)]),
    ((DOG, CAT, CUP, COW), ("dog", "cat", "cow"), False, [(DOG, COW)]),  # as many as there are of both
    ((BOTH, CAT), ("dog", "cow"), False, []),  # a hallucinated one may be coherent, too
    ((DOG, COW), (), False, []), ((DOG, CAT), (), True, []), ((COW, NONE), (), True, []),
])
def test_what_is_paired(texts, familiar, new_objects, pairs):
    assert pairs_of(said(*texts), set(familiar), SHOWN, new_objects) == pairs


@pytest.mark.parametrize(("texts", "familiar", "best"), [
    ((DOG, CAT, CUP, COW), ("cat",), [DOG, CUP]), ((CAT, COW, NONE), ("cat",), [CAT]), ((COW, NONE), (), [NONE]),
    ((COW, BOTH), (), []), ((), (), []),
])
def test_what_the_context_grows_by(texts, familiar, best):
    assert to_continue(said(*texts), set(familiar), SHOWN) == best


class Scripted:
    """Samples by (record, round); notes what is asked."""

    def __init__(self, *rounds: dict[int, list[str | None]]):
        self.rounds, self.asked = rounds, []

    def __call__(self, rows, contexts, step):
        self.asked.append(dict(zip(rows, contexts)))
        return [self.rounds[step][row] for row in rows]


def records(count: int) -> list[dict]:
    return [{"id": f"r{i}", "image": f"scene:{i}", "prompt": "What?"} for i in range(count)]


def test_a_response_grows_until_it_ends():
    """Record 0 ends when most samples are empty (half is not most), 1 where all hallucinate, 2 after max_sentences."""
    sample = Scripted({0: [DOG, COW, "", ""], 1: [COW, BOTH, CAT, None], 2: [NONE, None, NONE, ""]},
                      {0: [CAT, BOTH, DOG, DOG], 1: [COW, COW], 2: [CUP]},
                      {0: [DOG, COW, "", "", ""], 2: [DOG]})
    pairs, dropped = bootstrap(records(3), sample, lambda record: SHOWN, new_objects=True, max_sentences=3,
                               source={"model": "m"})
    assert sample.asked == [{0: "", 1: "", 2: ""}, {0: DOG, 1: CAT, 2: NONE}, {0: f"{DOG} {CAT}", 2: f"{NONE} {CUP}"}]
    assert [(p["id"], p["context"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("r0/1", "", DOG, COW), ("r0/2", DOG, CAT, BOTH), ("r0/3", f"{DOG} {CAT}", DOG, COW), ("r1/1", "", CAT, COW)]
    assert pairs[0]["source"] == {"method": "sentinel", "model": "m"} and pairs[0]["image"] == "scene:0"
    assert dropped == {"no context with a faithful and a hallucinated sentence": 1}


def test_what_is_drawn_depends_on_the_record_and_the_seed():
    """Of many equally good sentences; not on the other records."""
    script = {row: [DOG, CAT, CUP] for row in range(9)}
    grown = []
    for count, seed in ((9, 0), (4, 0), (9, 1)):
        sample = Scripted(script, script)
        bootstrap(records(count), sample, lambda record: SHOWN, max_sentences=2, seed=seed)
        grown.append(sample.asked[1])
    assert {row: grown[0][row] for row in range(4)} == grown[1] and grown[2] != grown[0]
    assert len(set(grown[0].values())) == 3


@pytest.fixture(scope="module")
def models():
    return load_llava(DEFAULT_MODEL), Processor(DEFAULT_MODEL)


def test_samples_continue_the_context(models):
    """Greedily, they are the sentences of the whole response; a full window ends it, a token limit leaves it open."""
    model, processor = models
    images = [{"id": str(i), "image": f"scene:{i}", "prompt": scenes.CAPTION_PROMPT} for i in (3, 5)]
    settings = dict(samples=2, temperature=0.0, max_new_tokens=40, seed=0)
    sample = sampler(images, model, processor, None, **settings)
    for row, record in enumerate(images):
        view = processor.image(record["image"])
        ((ids,),) = generate(model, [view], [processor.prompt(record["prompt"], len(view.rows))],
                             eos_id=processor.eos_id)
        whole, context = processor.decode(ids), ""
        for step in range(whole.count(".")):
            (texts,) = sample([row], [context], step)
            assert texts[0] == texts[1] and texts[0].count(".") == 1 and texts[0].endswith(".")
            context = f"{context} {texts[0]}".strip()
        assert context == whole and sample([row], [context], 9) == [["", ""]]
    assert sampler(images, model, processor, None, **{**settings, "max_new_tokens": 2})([0], [""], 0) == [[None, None]]
    start = [*processor.prompt(scenes.CAPTION_PROMPT, len(view.rows)), *processor.opening("A dog.")]
    for room in (processor.window - len(start), processor.window - len(start) + 1):
        (texts,) = sampler(images, model, processor, None, **{**settings, "max_new_tokens": room})([0], ["A dog."], 0)
        assert (texts == [""]) == (len(start) + room > processor.window)


@pytest.fixture(scope="module")
def made(models):
    seeds = range(scenes.PAIRS, scenes.PAIRS + 8)
    return [make_pairs("sentinel", *models, scene_seeds=seeds, samples=6, progress=False, batch_size=size)
            for size in (8, 3)]


def test_pairs_of_scenes(made):
    """All that is chosen is true and names something, all that is rejected is not, and no context hallucinates."""
    pairs, report = made[0]
    assert made[1] == made[0] and len({pair["id"] for pair in pairs}) == len(pairs) > report["contexts"]["images"] > 3
    for pair in pairs:
        shown = scenes.objects_present(*scenes.parse_reference(pair["image"]))
        assert objects_of(pair["chosen"]) and objects_of(pair["chosen"]) <= shown
        assert objects_of(pair["rejected"]) - shown and objects_of(pair["context"]) <= shown
        assert pair["id"].rpartition("/")[0] == f"scene-{pair['image'].removeprefix('scene:')}"
    assert {pair["context"].count(".") for pair in pairs} >= {1, 2, 3}
    assert report["hallucinating"] == {"chosen": 0.0, "rejected": 1.0}
    assert np.isclose(report["contexts"]["words"], np.mean([len(pair["context"].split()) for pair in pairs]))


def test_a_judge_that_only_compares_cannot_find_objects(capsys):
    with pytest.raises(SystemExit):
        read_arguments(["--method", "sentinel", "--judge", "clip"])
    assert "invalid choice: 'clip' (choose from" in capsys.readouterr().err
    assert read_arguments(["--method", "sentinel", "--judge", "chair"]).judge == "chair"
