"""Checkpoints: what is refused and with which words, what may be surplus, round trips, atomic writes."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import small
import torch
from goldens import make
from safetensors.torch import load_file, save_file

import model.tensors as tensor_files
from model.attention import Causal
from model.checkpoint import load_clip, load_llava, merged_tensors, save_llava
from model.families.llava import llava_config, read
from model.generate import generate
from model.hub import resolve
from model.lora import add_lora, lora_layers, merge_lora
from model.tensors import save_json, save_tensors

ROOT = Path(__file__).resolve().parents[1]
ORIGINAL = (  # published name -> name in the original repository's layout
    (r"^language_model\.(model\.|(?=lm_head))", r"\1"), (r"^vision_tower\.", "model.vision_tower.vision_tower."),
    (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"), (r"^image_newline", "model.image_newline"),
    (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"),
)
LAYOUTS = {  # published name -> name in a later layout
    "as published": (),
    "language model first": (
        (r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    "short tower names": ((r"^vision_tower\.vision_model\.", "vision_tower."),),
}


def renamed(tensors: dict, layout) -> dict:
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in layout:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def write_original(folder, kind: str, source: Path, **fields) -> Path:
    """The checkpoint in `source` as the original repository would publish it: "safetensors" with the tower
    inside, or "bin": shards with an index, the projector in a file of its own, the tower in a CLIP folder
    beside."""
    tensors = renamed(tensors_of(source), ORIGINAL)
    folder.mkdir()
    raw = {**small.TEXT, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_vision_tower": "x/tower",
           "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
           "image_aspect_ratio": "pad", "vocab_size": len(tensors["lm_head.weight"]), **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    clip = folder.parent / "tower"
    clip.mkdir(exist_ok=True)
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": small.VISION}))
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    prefix = "model.vision_tower.vision_tower."
    tower = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    save_file(tower | {"text_model.x": torch.zeros(2), "logit_scale": torch.zeros(())}, clip / "model.safetensors")
    projector = {n: tensors.pop(n) for n in list(tensors) if "mm_projector" in n}
    torch.save(projector, folder / "mm_projector.bin")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(5)
    names, place = list(tensors), {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({n: tensors[n] for n in names[i::2]}, folder / file)
        place |= dict.fromkeys(names[i::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": place}))
    return folder


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of its own for tests that damage it."""
    return small.write_llava(tmp_path / "llava")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder, change) -> None:
    """Apply `change` to the dict of tensors and write it back."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(torch.tensor(small.prompt(7, 8, 9)), small.pictures(1))


def assert_state(model, tensors) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name


# ------------------------------------------------------------------------------------------------- strictness


NAME, TOWER = "language_model.model.layers.1.mlp.up_proj.weight", "vision_tower.vision_model"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensor extra"),
        (lambda t: t.update({NAME: torch.zeros(30, 17)}), f"tensor {NAME} is (30, 17), expected (30, 18)"),
        (lambda t: t.update({NAME: torch.zeros(18, 30)}), f"tensor {NAME} is (18, 30), expected (30, 18)"),
        (lambda t: t.pop("language_model.lm_head.weight"), "missing tensor language_model.lm_head.weight"),
        (lambda t: t.update({NAME.replace("layers.1", "layers.3"): t[NAME].clone()}), "unexpected tensor"),
        (lambda t: t.pop(f"{TOWER}.encoder.layers.1.mlp.fc1.bias"), f"missing tensor {TOWER}.encoder"),
        (lambda t: t.update({f"{TOWER}.encoder.layers.3.mlp.fc1.bias": torch.zeros(40)}),
         f"unexpected tensor {TOWER}.encoder.layers.3"),
        (lambda t: t.update({NAME + "_scale": torch.zeros(1)}), f"unexpected tensor {NAME}_scale"),
    ],
)
def test_every_tensor_must_fit(folder, change, reason):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        load_llava(folder)
    assert str(folder) in str(error.value)


def test_all_problems_at_once_but_not_hundreds(folder):
    rewrite(folder, lambda t: (t.pop(NAME), t.update(extra=torch.zeros(2))))
    with pytest.raises(ValueError, match="missing tensor.*unexpected tensor extra"):
        load_llava(folder)
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if "layers" in n])
    with pytest.raises(ValueError, match="and [0-9]+ more") as error:
        load_llava(folder)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        load_llava(folder)


def test_missing_and_broken_config(folder, tmp_path):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_llava(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json: not found"):
        load_llava(folder)
    (tmp_path / "config.json").write_text(json.dumps(small.LLAVA))
    with pytest.raises(ValueError, match="no model.safetensors, no pytorch_model.bin, and no shards"):
        load_llava(tmp_path)


def test_what_may_be_surplus(folder):
    """Vision layers behind the feature layer, the tower's last norm, and index buffers of old writers."""
    names = tensors_of(folder).keys()
    unused = {n for n in names if "post_layernorm" in n or "vision_model.encoder.layers.2." in n}
    assert len(unused) == 2 + 16  # two norms, four attention projections, two MLP layers, each with a bias
    expected = logits(load_llava(folder))
    old = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5),
           "vision_tower.vision_model.embeddings.position_ids": torch.zeros(1, 10)}
    rewrite(folder, lambda t: ([t.pop(n) for n in unused], t.update(old)))
    assert torch.equal(logits(load_llava(folder)), expected)


def test_used_vision_layers_follow_the_config(tmp_path):
    """With feature layer -1 the third layer is needed."""
    folder = small.write_llava(tmp_path, vision_feature_layer=-1)
    rewrite(folder, lambda t: t.pop(f"{TOWER}.encoder.layers.2.mlp.fc1.bias"))
    with pytest.raises(ValueError, match=f"missing tensor {TOWER}.encoder.layers.2.mlp.fc1.bias"):
        load_llava(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, layout):
    expected = tensors_of(folder)

    save_file(renamed(expected, LAYOUTS[layout]), folder / "model.safetensors", {"format": "pt"})
    assert_state(load_llava(folder), expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_original_layout(folder, tmp_path, kind):
    """The same weights under the original names: equal logits, and again after writing them as llava-hf."""
    original = write_original(tmp_path / "original", kind, folder)
    model, published = load_llava(original), load_llava(folder)
    assert model.config.image_token_index == small.VOCAB and model.config.surplus_rows == 0
    assert (model.config.aspect, model.config.template) == ("pad", "vicuna_v1")
    ids = torch.tensor(small.prompt(7, 8, 9))
    ours = ids.masked_fill(ids == small.IMAGE_TOKEN, small.VOCAB)
    with torch.no_grad():
        expected = published.logits(ids, small.pictures(1))
        assert torch.equal(model.logits(ours, small.pictures(1)), expected)
        save_llava(model, tmp_path / "out", original)
        saved = load_llava(tmp_path / "out")
        assert torch.equal(saved.logits(ours, small.pictures(1)), expected)
    assert saved.config == read(tmp_path / "out") and saved.config.surplus_rows == 64
    assert (saved.config.aspect, saved.config.template) == ("pad", "vicuna_v1")
    with pytest.raises(ValueError, match="holds an original checkpoint"):
        save_llava(model, original, original)


def test_original_layout_without_its_tower(folder, tmp_path, monkeypatch):
    """A tower that is neither inside nor beside is looked for on the hub, under the name in config.json."""
    original = write_original(tmp_path / "original", "bin", folder)
    (tmp_path / "tower").rename(tmp_path / "cache")
    with pytest.raises(ValueError, match="mm_vision_tower='x/tower' is no CLIP folder and none of"):
        load_llava(original)
    raw = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**raw, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or tmp_path / "cache")
    with pytest.raises(ValueError, match="missing tensor vision_tower.*and [0-9]{3} more"):  # the real one is larger
        load_llava(original)
    assert asked == ["openai/clip-vit-large-patch14-336"]


# --------------------------------------------------------------------------------------------------- vocabulary


def tokenizer(words: int, **added: int) -> str:
    vocabulary = {f"w{i}": i for i in range(words)}
    extra = [{"id": i, "content": f"<{name}>", "special": True} for name, i in added.items()]
    return json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": extra})


@pytest.mark.parametrize(
    "rows, image, text, real",
    [
        (131, 67, None, 67),  # llava-hf's conversion: <image> is the first of 64 appended rows
        (130, 67, None, 130),  # any other number is not
        (131, 67, tokenizer(67, image=67, pad=68), 67),
        (70, 67, tokenizer(67, image=67, pad=68, sep=69), 70),  # a token that text can contain
        (70, 4, tokenizer(70), 70),  # <image> in the middle
        (67, 67, tokenizer(67), 67),  # no rows to spare
    ],
)
def test_rows_that_no_text_uses(tmp_path, rows, image, text, real):
    """They are no part of the model, hence of no softmax; the file keeps them, also when it is written anew."""
    folder = small.write_llava(tmp_path / "in", {"vocab_size": rows}, image_token_index=image)
    if text:
        (folder / "tokenizer.json").write_text(text)
    model = load_llava(folder)
    assert (model.config.text.vocab_size, model.config.surplus_rows) == (real, rows - real)
    assert model.language_model.lm_head.weight.shape[0] == real
    with torch.no_grad():
        model.language_model.lm_head.weight[3] += 1
    save_llava(model, tmp_path / "out", folder)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    different = {n for n in before if not torch.equal(before[n], after[n])}
    assert different == {"language_model.lm_head.weight"}
    changed = (before["language_model.lm_head.weight"] != after["language_model.lm_head.weight"]).any(1)
    assert changed.nonzero().tolist() == [[3]]


def test_table_sizes_are_still_checked(tmp_path):
    folder = small.write_llava(tmp_path, {"vocab_size": 131}, image_token_index=67)
    rewrite(folder, lambda t: t.update({"language_model.lm_head.weight": torch.zeros(130, 18)}))
    with pytest.raises(ValueError, match=re.escape("lm_head.weight is (130, 18), expected (131, 18) (in model.saf")):
        load_llava(folder)


# ------------------------------------------------------------------------------------------------------- files


def test_shards(folder):
    """Tensors spread over files; the same tensor in two of them is an error, a file of another name is not read."""
    expected = tensors_of(folder)
    names = sorted(expected)
    (folder / "model.safetensors").unlink()
    for i in range(3):
        save_file({n: expected[n] for n in names[i::3]}, folder / f"model-0000{i + 1}-of-00003.safetensors")
    assert_state(load_llava(folder), expected)
    save_file({names[0]: expected[names[0]] + 1}, folder / "more.safetensors")
    assert_state(load_llava(folder), expected)
    save_file({n: expected[n] for n in [names[0], *names[1::3]]}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(ValueError, match=f"model-00002-of-00003.safetensors: tensor {names[0]} is also in"):
        load_llava(folder)


@pytest.fixture
def sharded(folder):
    """A folder with three shards and their index."""
    save_llava(load_llava(folder), folder, folder, shard_bytes=45_000)
    assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    return folder


def edit_index(folder, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_missing_shard(sharded):
    second = sharded / "model-00002-of-00003.safetensors"
    second.unlink()
    with pytest.raises(ValueError, match=f"{second}: missing shard, named by the index"):
        load_llava(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=f"{second}: missing shard, .* is one of 3"):
        load_llava(sharded)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda i: i.pop("weight_map"), "index.json: weight_map is not a map"),
        (lambda i: i.update(weight_map=[1]), "index.json: weight_map is not a map"),
        (lambda i: i["weight_map"].update(x="a" * 5000), "missing shard, named by the index"),
        (lambda i: i["weight_map"].update(x="../a.safetensors"), "index.json: weight_map is not a map"),
        (lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors"),
         "model-00001-of-00003.safetensors: has no tensor x, which the index places there"),
    ],
)
def test_broken_index(sharded, change, reason):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_llava(sharded)
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json: not valid JSON"):
        load_llava(sharded)


def test_files_outside_the_index_are_not_read(sharded):
    save_file({"extra": torch.zeros(1)}, sharded / "other.safetensors")
    load_llava(sharded)


def test_weights_that_are_no_floats(folder):
    rewrite(folder, lambda t: t.update({NAME: t[NAME].to(torch.int8)}))
    with pytest.raises(ValueError, match=re.escape(f"tensor {NAME} is I8, not floating-point (in model.saf")):
        load_llava(folder)


class Evil:
    def __reduce__(self):
        return print, ("code of a file ran",)


@pytest.mark.parametrize(
    "spoil", [lambda p: p.write_bytes(p.read_bytes()[:300]), lambda p: p.write_bytes(b""),
              lambda p: torch.save({"x": Evil()}, p), lambda p: torch.save([1, 2], p)],
)
def test_bin_files_are_not_trusted(folder, tmp_path, spoil, capfd):
    original = write_original(tmp_path / "original", "bin", folder)
    spoil(original / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ValueError, match="pytorch_model-00002-of-00002.bin: (not a readable|is no plain)") as error:
        load_llava(original)
    assert "\n" not in str(error.value) and "ran" not in capfd.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, tmp_path, value):
    rewrite(folder, lambda t: t[NAME].__setitem__((3, 5), value))
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors: tensor {NAME} holds NaN or inf")):
        load_llava(folder)
    clip, name = small.write_clip(tmp_path / "clip"), "text_projection.weight"
    rewrite(clip, lambda t: t[name].__setitem__((1, 2), value))
    with pytest.raises(ValueError, match=f"model.safetensors: tensor {name} holds NaN or infinity"):
        load_clip(clip)


def test_weights_too_large_for_the_dtype_asked_for(folder):
    rewrite(folder, lambda t: t[NAME].__setitem__((3, 5), 1e6))
    load_llava(folder, torch.bfloat16)
    with pytest.raises(ValueError, match=re.escape(f"tensor {NAME} holds NaN or infinity as float16")):
        load_llava(folder, torch.float16)


# ------------------------------------------------------------------------------- files as trainers leave them


def place(folder, write) -> dict[str, torch.Tensor]:
    """Take the single weight file away, let `write(tensors)` put another; returns the tensors."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    write(tensors)
    return tensors


def write_shards(tensors, folder) -> None:
    """Two shards and their index."""
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_the_single_file_wins_over_shards(folder, capsys):
    """As in transformers, and it is said; stale .bin files beside safetensors are not read either."""
    expected = tensors_of(folder)
    write_shards({n: t + 1 for n, t in expected.items()}, folder)
    torch.save({n: t + 2 for n, t in expected.items()}, folder / "pytorch_model.bin")
    assert_state(load_llava(folder), expected)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{folder}/model.safetensors: read instead of the shards that model.safetensors.index.json names,"
                    " as transformers does"]
    theirs = pytest.importorskip("transformers").LlavaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, expected["language_model.lm_head.weight"])


def test_foreign_files_are_passed_over(folder):
    """What a Trainer and other runtimes leave beside the weights."""
    expected = tensors_of(folder)
    for name in ("optimizer.safetensors", "consolidated.safetensors", "model.fp16.safetensors"):
        save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / name)
    torch.save({"lr": 1}, folder / "training_args.bin")
    assert_state(load_llava(folder), expected)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors, no pytorch_model.bin"):
        load_llava(folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "nested", "parameters"])
def test_forms_of_bin_files(folder, form):
    def write(tensors):
        state = {n: torch.nn.Parameter(t) for n, t in tensors.items()} if form == "parameters" else tensors
        state = {"state_dict": state, "epoch": 3} if form == "nested" else state
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=form != "legacy")

    expected = place(folder, write)
    assert_state(load_llava(folder), expected)


def test_a_legacy_bin_file_of_clip(tmp_path):
    """OpenAI's 336-pixel tower is published as one."""
    folder = small.write_clip(tmp_path)
    write = partial(torch.save, f=folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    expected = place(folder, write)
    assert_state(load_clip(folder), expected)


@pytest.mark.parametrize(
    "wrap", [lambda n: f"_orig_mod.{n}", lambda n: f"module.{n}", lambda n: f"_orig_mod.module.{n}",
             lambda n: n.replace("language_model.", "language_model._orig_mod.", 1)])
def test_prefixes_of_wrappers(folder, tmp_path, wrap):
    """torch.compile and DDP put words before the names."""
    expected = tensors_of(folder)
    rewrite(folder, lambda t: [t.update({wrap(n): t.pop(n)}) for n in list(t)])
    assert_state(load_llava(folder), expected)
    clip = small.write_clip(tmp_path / "clip")
    before = tensors_of(clip)
    rewrite(clip, lambda t: [t.update({wrap(n): t.pop(n)}) for n in list(t)])
    assert_state(load_clip(clip), before)
    rewrite(folder, lambda t: t.update({NAME: torch.zeros(30, 18)}))  # the same tensor twice
    with pytest.raises(ValueError, match="is also in model.safetensors, as"):
        load_llava(folder)


def test_empty_tensors_are_explained(folder):
    rewrite(folder, lambda t: t.update({NAME: torch.zeros(0)}))
    with pytest.raises(ValueError, match=re.escape(f"tensor {NAME} is empty, as ZeRO-3 leaves it (its zero")):
        load_llava(folder)


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.zeros(2, device="meta"), 5])
def test_bin_files_of_other_things(folder, value):
    place(folder, lambda t: torch.save(t | {"extra": value}, folder / "pytorch_model.bin"))
    with pytest.raises(ValueError, match="pytorch_model.bin: is no plain dictionary of tensors"):
        load_llava(folder)


# --------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub: repositories that are folders; yields the calls."""
    calls = []

    def download(name, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_hub_id_is_downloaded_a_folder_is_not(hub, tmp_path, monkeypatch):
    folder = small.write_llava(tmp_path / "owner" / "name")
    assert_state(load_llava("owner/name"), tensors_of(folder))
    (name, patterns), = hub
    assert name == "owner/name" and "*.safetensors" in patterns and "*.json" in patterns
    assert "pytorch_model*.bin" not in patterns
    assert resolve(folder) == folder and len(hub) == 1
    monkeypatch.chdir(tmp_path)
    assert resolve(Path("owner/name")) == Path("owner/name") and len(hub) == 1  # a folder of that name comes first


def test_bin_files_only_where_there_is_nothing_better(hub, tmp_path, folder):
    (tmp_path / "owner").mkdir()
    write_original(tmp_path / "owner" / "name", "bin", folder)
    resolve("owner/name")
    assert ["pytorch_model*.bin" in patterns for _, patterns in hub] == [False, True]


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "/owner/name"])
def test_what_is_neither_folder_nor_hub_id(hub, name):
    with pytest.raises(ValueError, match=f"{name}: no such folder, and not a hub id"):
        load_llava(name)
    assert not hub


def test_offline(monkeypatch, tmp_path):
    """The real client, offline and with an empty cache: one line."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="owner/name: no such folder, and the download failed") as error:
        load_llava("owner/name")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------ loading


MEMORY = """
import sys, torch
from model.checkpoint import load_llava

def status(field):
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(field)) * 1024

load_llava(sys.argv[1])  # torch imports parts of itself at first use
samples, to = [], torch.Tensor.to
torch.Tensor.to = lambda self, *a, **k: (samples.append(status("RssAnon")), to(self, *a, **k))[1]
for dtype in (torch.float16, torch.bfloat16):
    open("/proc/self/clear_refs", "w").write("5")
    samples.clear()
    before = status("RssAnon"), status("VmRSS")
    model = load_llava(sys.argv[2], dtype)
    samples.append(status("RssAnon"))
    print(sum(p.nbytes for p in model.parameters()), max(samples) - before[0], status("VmHWM") - before[1])
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_while_loading(tmp_path, llava_folder):
    """90 MB of fp16 weights loaded as they are, then as bf16, in a process of its own.

    Anonymous memory (RssAnon, sampled at every tensor) is what the process cannot give back. The high-water
    mark of all resident memory (VmHWM) also counts pages of the mapped file that were looked at. Converting
    needs the new weights and one mapped tensor at a time; without conversion the weights are the file's pages
    and cost no anonymous memory. Both ways both numbers stay within 1.15 times the weights; on top, each tensor's
    own mapping brings in some pages of its neighbours.
    """
    text = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8, head_dim=64,
                num_key_value_heads=8, vocab_size=2000)
    raw = {**small.LLAVA, "text_config": {**small.TEXT, **text}, "vision_feature_layer": -1}
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in small.Llava(llava_config(raw)).state_dict().items()}
    small.write(tmp_path, raw, {n: torch.zeros(s, dtype=torch.float16) for n, s in shapes.items()})
    command = [sys.executable, "-c", MEMORY, str(llava_folder), str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    for line, limit in zip(run.stdout.splitlines(), (0.15, 1.15), strict=True):
        weights, anonymous, resident = map(int, line.split())
        assert weights > 80e6 and resident < 1.15 * weights + len(shapes) * 2**17 and anonymous < limit * weights


def test_tied_embeddings(tmp_path, pixels):
    """One tensor in the file, one parameter in the model, and again one in the file that is written."""
    folder = small.write_llava(tmp_path / "in", dict(tie_word_embeddings=True))
    model = load_llava(folder)
    lm = model.language_model
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    with torch.no_grad():
        lm.lm_head.weight[5] += 1
    save_llava(model, tmp_path / "out", folder)
    assert "language_model.lm_head.weight" not in tensors_of(tmp_path / "out")
    assert torch.equal(logits(load_llava(tmp_path / "out")), logits(model))
    rewrite(folder, lambda t: t.pop("language_model.model.embed_tokens.weight"))
    with pytest.raises(ValueError, match="missing tensor language_model.model.embed_tokens.weight"):
        load_llava(folder)


def test_dtype_and_state(folder):
    model = load_llava(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert not any(p.is_meta for p in model.parameters())


def test_clip_is_frozen_and_strict(tmp_path):
    folder = small.write_clip(tmp_path)
    clip = load_clip(folder)
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    rewrite(folder, lambda t: t.pop("text_projection.weight"))
    with pytest.raises(ValueError, match="missing tensor text_projection.weight"):
        load_clip(folder)


# ---------------------------------------------------------------------------------------------------- writing


def test_round_trip(folder, tmp_path):
    """Every tensor comes back bit for bit, those that this code does not build included."""
    (folder / "tokenizer.json").write_text("{}")
    save_llava(load_llava(folder), tmp_path / "out", folder)
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == small.LLAVA


def test_shards_written(folder, tmp_path):
    """No file above the limit, an index that names them all, and nothing of an earlier save left."""
    out, expected, model = tmp_path / "out", tensors_of(folder), load_llava(folder)
    for limit, count in ((30_000, 5), (45_000, 3), (10**9, 1)):
        save_llava(model, out, folder, shard_bytes=limit)
        files = sorted(p.name for p in out.iterdir())
        weights = [f for f in files if f.endswith(".safetensors")]
        assert len(weights) == count and all((out / f).stat().st_size < limit + 8_000 for f in weights)
        assert files == sorted(["config.json", *weights, *(["model.safetensors.index.json"] if count > 1 else [])])
        assert_state(load_llava(out), expected)
    (out / "model-custom.safetensors").write_bytes(b"")
    save_llava(model, out, folder)
    assert (out / "model-custom.safetensors").exists()  # not ours


def test_a_save_that_fails_leaves_the_old_one(folder, tmp_path, monkeypatch):
    save_llava(load_llava(folder), tmp_path / "out", folder, shard_bytes=45_000)
    model, write, calls = load_llava(folder), tensor_files.save_file, []
    with torch.no_grad():
        model.language_model.lm_head.weight += 1

    def fail_late(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk full")
        write(*args, **options)

    monkeypatch.setattr(tensor_files, "save_file", fail_late)
    with pytest.raises(OSError, match="disk full"):
        save_llava(model, tmp_path / "out", folder, shard_bytes=45_000)
    assert_state(load_llava(tmp_path / "out"), tensors_of(folder))


def test_saving_over_the_source(folder):
    model = load_llava(folder)
    with torch.no_grad():
        model.multi_modal_projector.linear_1.bias += 1
    expected = logits(model)
    save_llava(model, folder, folder)
    assert torch.equal(logits(load_llava(folder)), expected)


def test_saving_merges_adapters_and_leaves_the_model(folder, tmp_path):
    model = load_llava(folder)
    base = logits(model)
    add_lora(model.language_model.model, rank=3, alpha=6.0)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    adapted = logits(model)
    save_llava(model, tmp_path / "out", folder)
    assert lora_layers(model) and torch.equal(logits(model), adapted)
    saved = logits(load_llava(tmp_path / "out"))
    torch.testing.assert_close(saved, adapted, rtol=0, atol=1e-4)
    assert not torch.allclose(saved, base, atol=0.1)
    state = {name: make() for name, make in merged_tensors(model).items()}
    merge_lora(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())


def test_storage_dtype(folder, tmp_path):
    save_llava(load_llava(folder), tmp_path / "out", folder, dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert {p.dtype for p in load_llava(tmp_path / "out").parameters()} == {torch.float32}


def test_writes_are_atomic(tmp_path, monkeypatch):
    """Nothing temporary stays behind; a write that fails leaves the old file as it was."""
    path = tmp_path / "model.safetensors"
    save_tensors({"a": torch.zeros(2)}, path)
    save_json({"a": 1}, tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "model.safetensors"]

    def fail(tensors, file, metadata=None):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"a": torch.ones(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.zeros(2))


# ----------------------------------------------------------------------------------------------------- families


TOWER_336 = dict(model_type="clip_vision_model", hidden_size=1024, image_size=336, intermediate_size=4096,
                 num_attention_heads=16, num_hidden_layers=24, patch_size=14, projection_dim=768)
HF_MISTRAL = dict(model_type="mistral", intermediate_size=14336, num_key_value_heads=8, rms_norm_eps=1e-5,
                  rope_theta=1e6, sliding_window=None, max_position_embeddings=32768, vocab_size=32064)
HF_YI = dict(model_type="llama", hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, vocab_size=64064,
             num_attention_heads=56, num_key_value_heads=8, rope_theta=5e6, max_position_embeddings=4096)
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
GRID_OF_ORIGINAL = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))  # (height, width)
MLP = dict(mm_vision_tower="openai/clip-vit-large-patch14-336", mm_projector_type="mlp2x_gelu",
           mm_vision_select_layer=-2, mm_vision_select_feature="patch")
ANYRES = dict(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=GRID)


def hf(text: dict, **fields) -> dict:
    return dict(model_type="llava_next", text_config=text, vision_config=TOWER_336, vision_feature_layer=-2,
                image_token_index=64000 if text.get("vocab_size") == 64064 else 32000, **fields)


def original(text: dict, name: str = "LlavaLlamaForCausalLM", **fields) -> dict:
    rows = text.get("vocab_size", 32000) // 1000 * 1000
    return {**text, **MLP, "model_type": "llava", "architectures": [name], "vocab_size": rows, **fields}


VICUNA = dict(model_type="llama", vocab_size=32064, rms_norm_eps=1e-5)
BIG = dict(VICUNA, hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40,
           num_key_value_heads=40)


@pytest.mark.parametrize(
    "raw, heads, grid, aspect, template",
    [
        (hf(VICUNA, image_grid_pinpoints=GRID), (32, 32, 128), tuple(map(tuple, GRID)), "anyres", "vicuna_v1"),
        (hf(BIG), (40, 40, 128), tuple(map(tuple, GRID)), "anyres", "vicuna_v1"),
        (hf(HF_MISTRAL), (32, 8, 128), tuple(map(tuple, GRID)), "anyres", "mistral_instruct"),
        (hf(HF_YI), (56, 8, 128), tuple(map(tuple, GRID)), "anyres", "chatml_direct"),
        (hf(VICUNA) | {"model_type": "llava"}, (32, 32, 128), (), "crop", "hf"),
        (hf(BIG) | {"model_type": "llava"}, (40, 40, 128), (), "crop", "hf"),
        (original(VICUNA, image_aspect_ratio="pad"), (32, 32, 128), (), "pad", "vicuna_v1"),
        (original(BIG, **ANYRES), (40, 40, 128), GRID_OF_ORIGINAL, "anyres", "vicuna_v1"),
        (original(HF_MISTRAL, "LlavaMistralForCausalLM", **ANYRES), (32, 8, 128), GRID_OF_ORIGINAL, "anyres",
         "mistral_instruct"),
        (original(HF_YI, **ANYRES), (56, 8, 128), GRID_OF_ORIGINAL, "anyres", "chatml_direct"),
        # Re-Align trains 1.6 with one padded view; the newline embedding in the file is then passed over.
        (original(VICUNA, **ANYRES | {"image_aspect_ratio": "pad"}), (32, 32, 128), (), "pad", "vicuna_v1"),
    ],
)
def test_published_families(tmp_path, raw, heads, grid, aspect, template):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read(tmp_path)
    text = config.text
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == heads
    assert (config.image_grid_pinpoints, config.aspect, config.template) == (grid, aspect, template)
    rows = 64000 if template == "chatml_direct" else 32000
    assert (text.vocab_size, config.image_token_index) == (rows, rows)
    assert config.vision.num_patches == 576 and config.vision_layers_used == 23
    assert text.rope_theta == {"mistral_instruct": 1e6, "chatml_direct": 5e6}.get(template, 1e4)


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(architectures=["LlavaMptForCausalLM"]), "architectures[0]='LlavaMptForCausalLM' is not supported"),
        (dict(mm_projector_type="linear"), "mm_projector_type='linear'"),
        (dict(mm_vision_select_feature="cls_patch"), "mm_vision_select_feature='cls_patch'"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end=True"),
        (dict(mm_vision_tower="google/siglip-so400m-patch14-384"), "siglip-so400m-patch14-384' is no CLIP folder"),
        (dict(mm_vision_select_layer=30), "mm_vision_select_layer=30 is not one of the tower's 25"),
        (dict(**ANYRES | {"mm_patch_merge_type": "flat"}), "mm_patch_merge_type='flat'"),
        (dict(image_aspect_ratio="highres"), "image_aspect_ratio='highres'"),
        (dict(**ANYRES | {"image_grid_pinpoints": "(1x1),...,(6x6)"}), "is not a list of two sizes each"),
        (dict(vocab_size=128256), "vocab_size=128256 is neither Vicuna's"),
    ],
)
def test_original_checkpoints_of_other_kinds_are_refused(change, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        llava_config({**original(VICUNA), **change}, "somewhere")


@pytest.mark.parametrize("window, limit", [(None, 32768), (4096, 4096), (65536, 32768)])
def test_sliding_window_bounds_the_length(window, limit):
    """Up to its length a sliding window is full attention."""
    text = llava_config(hf({**HF_MISTRAL, "sliding_window": window})).text
    assert text.max_position_embeddings == limit


# ------------------------------------------------------------------------------------------------- transformers


DECODERS = {
    "Vicuna": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=6, vocab_size=131),
    "Mistral": dict(model_type="mistral", sliding_window=None, rope_theta=1e6, vocab_size=131),
    "Yi": dict(num_key_value_heads=3, rope_theta=5e6, vocab_size=131),
}
IMAGE = 67  # the first of 64 rows that no text uses


def expand(*text: int) -> tuple[int, ...]:
    return (1, 5, *[IMAGE] * small.PATCHES, *text)


@pytest.fixture(scope="module", params=DECODERS)
def family(request, tmp_path_factory):
    """(our model, theirs) of a decoder family, from the same folder."""
    transformers = pytest.importorskip("transformers")
    folder = small.write_llava(tmp_path_factory.mktemp("family"), DECODERS[request.param], image_token_index=IMAGE)
    return load_llava(folder), transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()


def test_live_log_probs(family):
    """Logits and per-token log-probs; theirs with the rows that no text uses taken out of the softmax."""
    ours, theirs = family
    ids, pixels = torch.tensor(expand(7, 8, 9, 20, 30, 40)), small.pictures(1)
    with torch.no_grad():
        logits = theirs(input_ids=ids[None], pixel_values=pixels).logits[0]  # (T, 131)
        expected = logits[:, :IMAGE].log_softmax(-1)
        torch.testing.assert_close(ours.logits(ids, pixels), logits[:, :IMAGE], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.logits(ids, pixels).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    assert (logits.log_softmax(-1)[:, :IMAGE] - expected).abs().max() > 0.1  # the rows do matter


def test_live_greedy(family):
    """Token for token, where theirs may not pick the rows that no text uses."""
    ours, theirs = family
    for i in range(3):
        inputs = dict(input_ids=torch.tensor([expand(7, 8 + i)]), pixel_values=small.pictures(3)[i : i + 1])
        inputs |= dict(attention_mask=torch.ones_like(inputs["input_ids"]), suppress_tokens=list(range(IMAGE, 131)))
        expected = make.greedy(theirs, inputs, 16, eos_id=None)
        found = generate(ours, [small.views(3)[i]], [list(expand(7, 8 + i))], eos_id=-1, max_new_tokens=16)
        assert found[0][0] == expected.tolist()


def test_live_bf16(tmp_path):
    """bf16 weights: within the rounding that separates theirs from fp32."""
    transformers = pytest.importorskip("transformers")
    folder = small.write_llava(tmp_path, DECODERS["Mistral"], image_token_index=IMAGE)
    ids, pixels = torch.tensor(expand(7, 8, 9, 20, 30, 40)), small.pictures(1)
    with torch.no_grad():
        exact = load_llava(folder).logits(ids, pixels)
        ours = load_llava(folder, torch.bfloat16).logits(ids, pixels).float()
        their = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        theirs = their(input_ids=ids[None], pixel_values=pixels.bfloat16()).logits[0, :, :IMAGE].float()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
    assert (ours - theirs).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_live_original_layout_as_llava_hf(tmp_path, kind):
    """Original layout in, llava-hf out, in shards: transformers finds every tensor and computes the same."""
    transformers = pytest.importorskip("transformers")
    source = small.write_llava(tmp_path / "hf", DECODERS["Mistral"] | {"vocab_size": IMAGE}, image_token_index=IMAGE)
    settings = dict(architectures=["LlavaMistralForCausalLM"], **DECODERS["Mistral"] | {"vocab_size": IMAGE, "model_type": "llava_mistral"})
    model = load_llava(write_original(tmp_path / "original", kind, source, **settings))
    save_llava(model, tmp_path / "out", tmp_path / "original", shard_bytes=45_000)
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, pixels = torch.tensor(expand(7, 8, 9)), small.pictures(1)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids[None], pixel_values=pixels).logits[0, :, :IMAGE]
        torch.testing.assert_close(model.logits(ids, pixels), expected, rtol=1e-4, atol=1e-4)


NEXT = dict(model_type="llava_next", image_grid_pinpoints=[[17, 34], [34, 17]], image_token_index=IMAGE)


@pytest.mark.parametrize("kind", ["llava-hf", "safetensors", "bin"])
def test_live_tiles(tmp_path, kind):
    """LLaVA-1.6 in each layout, written in shards: transformers finds the newline embedding and every other
    tensor where it looks, and what it saves loads here again. Pictures in tiles: tests/test_anyres.py."""
    transformers = pytest.importorskip("transformers")
    folder = small.write_llava(tmp_path / "hf", {"vocab_size": 131}, **NEXT)
    if kind != "llava-hf":
        anyres = dict(ANYRES, image_grid_pinpoints=[[17, 34], [34, 17]], vocab_size=IMAGE)
        cut = {n: t[:IMAGE] if t.shape[0] == 131 else t for n, t in tensors_of(folder).items()}
        save_file(cut, folder / "model.safetensors", {"format": "pt"})
        folder = write_original(tmp_path / "original", kind, folder, **anyres)
    model = load_llava(folder)
    grid = ((17, 34), (34, 17)) if kind == "llava-hf" else ((34, 17), (17, 34))
    assert (model.config.image_grid_pinpoints, model.config.template) == (grid, "vicuna_v1")
    assert torch.equal(model.image_newline, small.weight("image_newline", (18,)))
    save_llava(model, tmp_path / "out", folder, shard_bytes=45_000)
    theirs, report = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([1, 5, 7, 8, 9])
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids[None]).logits[0, :, :IMAGE]
        x = model.language_model.model.embed_tokens(ids)
        states = model.language_model.model(x, torch.arange(5), Causal())
        torch.testing.assert_close(model.language_model.lm_head(states), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_llava(tmp_path / "theirs")
    assert again.config.image_grid_pinpoints == grid and again.config.text.vocab_size == IMAGE
    assert_state(again, model.state_dict())


def test_tiles_switched_off(tmp_path):
    """Re-Align's use of LLaVA-1.6: one padded view, no newline embedding."""
    source = small.write_llava(tmp_path / "hf", {"vocab_size": IMAGE}, **NEXT)
    folder = write_original(tmp_path / "original", "safetensors", source, image_aspect_ratio="pad",
                            mm_patch_merge_type="flat", vocab_size=IMAGE)
    model = load_llava(folder)
    assert not model.config.anyres and model.config.aspect == "pad" and "image_newline" not in model.state_dict()
    save_llava(model, tmp_path / "out", folder)
    assert "image_newline" not in tensors_of(tmp_path / "out")
    assert load_llava(tmp_path / "out").config.aspect == "pad"
