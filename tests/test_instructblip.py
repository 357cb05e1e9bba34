"""InstructBLIP: the prompt as trained, what the Q-Former reads, both vocabularies, LAVIS' files; against `transformers`
on small random weights."""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import small
import torch
from goldens import make
from PIL import Image
from safetensors.torch import load_file, save_file
from test_processor import tokenizer
from tokenizers import BertWordPieceTokenizer, Tokenizer
from tokenizers.models import WordLevel

from data.processor import Processor
from model.adapters import load_adapters, save_adapters
from model.checkpoint import _Unfilled, load_llava, save_llava
from model.config import LlamaConfig
from model.families import instructblip
from model.generate import generate
from model.instructblip import EvaConfig, InstructBlip, InstructBlipConfig, QFormerConfig
from model.logprobs import Scorer, Sequence, naive_logprobs, pack
from model.lora import add_lora, lora_layers
from model.views import single, stack
from tools.lavis import convert

QUERIES = small.INSTRUCTBLIP["num_query_tokens"]
WORDS = "is there a dog in the image ? what ##ever yes , cat sofa .".split()
LETTERS = [mark + letter for letter in "abcdefghijklmnopqrs" for mark in ("", "##") if mark + letter != "a"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *LETTERS]
TIGHT = dict(rtol=1e-4, atol=1e-4)
IMAGE = 67  # of 64 rows that no text uses the first
ROWS = 131
QUESTIONS = [(2, 7, 9, 3), (2, 3), (2, 20, 21, 22, 23, 24, 25, 3)]  # of the Q-Former's 61 tokens


def write(folder: Path, later: bool = True) -> Path:
    """A complete folder: weights, both tokenizers; the vocabulary with <image> and filler (`later`) or [PAD] alone."""
    text = tokenizer(["<unk>", "<s>", "</s>"], ("[PAD]", "<image>") if later else ("[PAD]",))
    size = text.get_vocab_size()
    fields = dict(image_token_index=size - 1) if later else dict(image_token_index=None)
    text_config = {"vocab_size": size + 9 if later else size, "max_position_embeddings": 1024}
    small.write_instructblip(folder, text_config, **fields)
    text.save(str(folder / "tokenizer.json"))
    (folder / "qformer_tokenizer").mkdir()
    (folder / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("instructblip"))


@pytest.fixture(scope="module")
def processor(folder) -> Processor:
    return Processor(folder)


# ------------------------------------------------------------------------------------------- prompt and images


def test_the_prompt_as_trained(processor):
    """32 (here 5) image tokens, </s> = 2, the text; the answer begins with a blank of its own and ends in </s>."""
    encode, image = processor.tokenizer.encode, processor.image_id
    assert processor.prompt("a dog") == [*[image] * QUERIES, 2, *encode("a dog")]
    assert processor.prompt("a dog", 0) == [2, *encode("a dog")]
    assert processor.response("Yes, a dog.") == [*encode("Yes, a dog."), 2] and processor.eos_id == 2
    assert processor.tokenizer.core.id_to_token(processor.response("Yes")[0]).startswith("▁")
    assert processor.decode(processor.response("Yes, a dog.")) == "Yes, a dog."
    assert processor.opening("Yes") == processor.response("Yes")[:-1]


def test_the_question(folder, processor, tmp_path):
    """Lower case, [CLS] and [SEP] around it; of a long one the last 126 tokens; the same from tokenizer.json."""
    place = VOCABULARY.index
    words = ["[CLS]", "is", "there", "a", "c", "##a", "##b", "?", "[SEP]"]
    assert processor.question("Is There a cab?") == tuple(map(place, words))
    long = processor.question("dog " * 70 + "cat " * 125 + "?")
    assert long == tuple(map(place, ["[CLS]", *["cat"] * 125, "?", "[SEP]"])) and len(long) == 128
    assert len(processor.question("cat " * 126)) == len(processor.question("cat " * 127)) == 128
    assert len(processor.question("cat " * 125)) == 127
    other = shutil.copytree(folder, tmp_path / "other")
    fast = BertWordPieceTokenizer(str(other / "qformer_tokenizer" / "vocab.txt"))
    fast.enable_truncation(5)
    fast.enable_padding(length=9)
    fast.save(str(other / "qformer_tokenizer" / "tokenizer.json"))
    (other / "qformer_tokenizer" / "vocab.txt").unlink()
    assert Processor(other).question("Is There a cab?") == tuple(map(place, words))


def test_live_question(folder, processor):
    """`transformers`' uncased BERT tokenizer, truncated on the left."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab=str(folder / "qformer_tokenizer" / "vocab.txt"), truncation_side="left")
    for text in ("Is there a Dog?", "Whatever, CAFÉ", "cat " * 127 + "dog", ""):
        assert list(processor.question(text)) == theirs(text, truncation=True, max_length=128)["input_ids"], text


@pytest.mark.parametrize("file, content, reason", [
    ("vocab.txt", None, "has no qformer_tokenizer/tokenizer.json and no qformer_tokenizer/vocab.txt"),
    ("vocab.txt", "a\nb\n", "vocab.txt: not a readable tokenizer (sep_token not found in the vocabulary)"),
    ("vocab.txt", "\n".join([*VOCABULARY, *(f"w{i}" for i in range(20))]), "and ids below 61 (its largest"),
    ("tokenizer.json", Tokenizer(WordLevel({"a": 0}, "a")).to_str(), "needs the tokens [CLS] and [SEP], and ids"),
    ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer"),
])
def test_unusable_question_tokenizers_are_named(folder, tmp_path, file, content, reason):
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "qformer_tokenizer" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        Processor(other)


@pytest.mark.parametrize("size", make.PHOTOS)
def test_live_pixels(processor, size):
    """BlipImageProcessor's: resized to a square, whatever the aspect ratio."""
    blip = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    image = Image.fromarray(small.photo(*size))
    theirs = blip.BlipImageProcessorPil(size={"height": small.SIDE, "width": small.SIDE})
    expected = theirs(image, return_tensors="pt")["pixel_values"]
    view = processor.view(image)
    torch.testing.assert_close(view.pixels, expected, rtol=0, atol=1e-6)
    assert view.rows.tolist() == list(range(QUERIES)) and processor.image_tokens("scene:1") == QUERIES


@pytest.mark.parametrize("settings, reason", [
    (dict(image_processor_type="BlipImageProcessor", size={"height": 18, "width": 18}), "resized to (18, 18)"),
    (dict(image_processor_type="CLIPImageProcessor"), "'CLIPImageProcessor' is not supported (supported: Blip"),
    (dict(size={"shortest_edge": 20}), "resized to 20, the vision tower takes 17 x 17"),
])
def test_other_image_settings_are_refused(folder, tmp_path, settings, reason):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape(reason)):
        Processor(other)
    with pytest.raises(ValueError, match="resized to a square .resize., nothing else"):
        Processor(folder, aspect="pad")


def test_blip_settings_are_read(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    settings = dict(image_processor_type="BlipImageProcessorFast", size={"height": 17, "width": 17}, image_mean=[0.5] * 3,
                    resample=2)
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    how = Processor(other).preprocessing
    assert (how.mean, how.resample, how.resize, how.size) == ((0.5,) * 3, 2, (17, 17), 17)


# --------------------------------------------------------------------------------------------------- strictness


def change(part: str, **values):
    return {part: {**small.INSTRUCTBLIP[part], **values}}


@pytest.mark.parametrize("fields, reason", [
    (change("vision_config", hidden_act="quick_gelu"), "vision_config: hidden_act='quick_gelu' is not supported"),
    (change("vision_config", qkv_bias=False), "vision_config: qkv_bias=False is not supported"),
    (change("vision_config", num_attention_heads=5), "vision_config: 24 is no multiple of 5"),
    (change("vision_config", patch_size=18), "patch_size=18 is larger than image_size=17"),
    (change("qformer_config", num_attention_heads=3), "qformer_config: 20 is no multiple of 3"),
    (change("qformer_config", position_embedding_type="relative_key"), "='relative_key' is not supported"),
    (change("qformer_config", max_position_embeddings=127), "max_position_embeddings=127 is fewer than the 128"),
    (change("text_config", model_type="t5"), "text_config: model_type='t5' is not supported (supported: ['llama'])"),
    (dict(qformer_config=None), "has no qformer_config"),
    (dict(num_query_tokens=0), "num_query_tokens=0 is not between 1 and"),
])
def test_what_is_not_supported_is_named(fields, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        instructblip.instructblip_config({**small.INSTRUCTBLIP, **fields}, "config.json")


NAME = "qformer.encoder.layer.2.crossattention.attention.key.weight"


@pytest.mark.parametrize("edit, reason", [
    (lambda t: t.pop(NAME), f"missing tensor {NAME}"),
    (lambda t: t.update({NAME: torch.zeros(24, 20)}), f"tensor {NAME} is (24, 20), expected (20, 24)"),
    (lambda t: t.update({NAME.replace("2", "1"): t[NAME].clone()}), "unexpected tensor qformer.encoder.layer.1.cross"),
    (lambda t: t.update({"vision_model.encoder.layers.3.mlp.fc1.bias": torch.zeros(40)}), "unexpected tensor vision_m"),
])
def test_every_tensor_must_fit(tmp_path, edit, reason):
    folder = small.write_instructblip(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_llava(folder)


def test_position_ids_of_old_files_are_passed_over(tmp_path):
    folder = small.write_instructblip(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"qformer.embeddings.position_ids": torch.arange(130)[None]}, folder / "model.safetensors")
    load_llava(folder)


@pytest.mark.parametrize("decoder, weights", [
    (LlamaConfig(vocab_size=32064), 7_913_726_720),
    (LlamaConfig(vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                 num_attention_heads=40, num_key_value_heads=40), 14_192_093_952),
])
def test_sizes_are_the_published_ones(decoder, weights):
    """Of the 7B and 13B on the hub, from the defaults that their config.json files leave out."""
    config = InstructBlipConfig(EvaConfig(), QFormerConfig(vocab_size=30523), decoder)
    with torch.device("meta"), _Unfilled():
        assert sum(p.numel() for p in InstructBlip(config).parameters()) == weights
    raw = instructblip.hf_config(config)
    assert instructblip.instructblip_config(raw) == config
    assert instructblip.instructblip_config({**raw, "vision_config": {}}).vision == config.vision


# ------------------------------------------------------------------------------------------------- transformers


def their_class():
    return pytest.importorskip("transformers").InstructBlipForConditionalGeneration


@pytest.fixture(scope="module", params=[dict(), dict(num_query_tokens=1, image_size=33, layers=4)])
def peer(request, tmp_path_factory):
    """(their model, the folder it saved): all weights drawn, the tower's key biases as well."""
    kind, options = their_class(), dict(request.param)
    raw = {**small.INSTRUCTBLIP, "text_config": {**small.TEXT, "vocab_size": ROWS}, "image_token_index": IMAGE}
    raw["vision_config"] = {**raw["vision_config"], "image_size": options.pop("image_size", small.SIDE)}
    raw["qformer_config"] = {**raw["qformer_config"], "num_hidden_layers": options.pop("layers", 3)}
    model = kind(kind.config_class(**{**raw, **options})).eval()
    model.load_state_dict(small.fill(model.state_dict()))
    folder = tmp_path_factory.mktemp("peer")
    model.save_pretrained(folder)
    text = tokenizer(["<unk>", "<s>", "</s>"])
    vocabulary = {token: i for token, i in text.get_vocab().items() if i < IMAGE - 1} | {"<s>": IMAGE - 1}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return model, folder


def ids_of(model, *text: int) -> list[int]:
    return [IMAGE] * model.config.num_query_tokens + [2, *text]


def pixels_of(model, n: int = 1) -> torch.Tensor:
    return small.pictures(n, model.config.vision_config.image_size)


def their_logits(model, ids, pixels, question) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels,
                     qformer_input_ids=torch.tensor([question])).logits[0, :, :IMAGE]


@pytest.mark.parametrize("question", QUESTIONS)
def test_live_logits(peer, question):
    theirs, folder = peer
    ours, pixels = load_llava(folder), pixels_of(theirs)
    assert ours.config.surplus_rows == 64 and ours.config.text.vocab_size == IMAGE
    for text in ((7,), (7, 8, 9, 20, 30, 40)):
        ids = ids_of(theirs, *text)
        with torch.no_grad():
            found = ours.logits(torch.tensor(ids), pixels, None, question)
        torch.testing.assert_close(found, their_logits(theirs, ids, pixels, question), **TIGHT)


def test_live_bf16(peer):
    """bf16 weights: within the rounding that separates theirs from fp32."""
    theirs, folder = peer
    ids, pixels, question = ids_of(theirs, 7, 8, 9), pixels_of(theirs), QUESTIONS[2]
    half = their_class().from_pretrained(folder, dtype=torch.bfloat16).eval()
    exact = their_logits(theirs, ids, pixels, question)
    with torch.no_grad():
        ours = load_llava(folder, torch.bfloat16).logits(torch.tensor(ids), pixels, None, question).float()
    rounded = their_logits(half, ids, pixels.bfloat16(), question).float()
    assert (ours - exact).norm() < 1.5 * (rounded - exact).norm()
    assert (ours - rounded).norm() < 0.1 * exact.norm()


def test_live_packed_scores(peer):
    """Two images; questions of different length about the same one, padded in the Q-Former: as one at a time, as theirs.
    The tower runs once an image."""
    theirs, folder = peer
    model, views = load_llava(folder), [single(p, theirs.config.num_query_tokens) for p in pixels_of(theirs, 2)]
    asked = [(0, QUESTIONS[0], (7, 8)), (0, QUESTIONS[2], (9,)), (1, QUESTIONS[1], (7, 8)), (1, QUESTIONS[2], (9,))]
    sequences = [Sequence(i, tuple(ids_of(theirs, *text)), response, False, question)
                 for i, question, text in asked for response in ((11, 12, 2), (13, 2))]
    pixels, rows = stack(views, theirs.config.num_query_tokens)
    with torch.no_grad():
        logps, mask = Scorer(model)(pack(sequences, rows, IMAGE), model.vision_features(pixels))
        naive = naive_logprobs(model, sequences, views)
    for row, keep, expected, s in zip(logps, mask, naive, sequences):
        torch.testing.assert_close(row[keep], expected, **TIGHT)
        logits = their_logits(theirs, [*s.prompt, *s.response[:-1]], pixels[s.image][None], s.question)
        labels = torch.tensor(s.response)[:, None]
        torch.testing.assert_close(row[keep], logits[len(s.prompt) - 1 :].log_softmax(-1).gather(1, labels)[:, 0], **TIGHT)
    assert not torch.allclose(logps[0], logps[2], atol=1e-2)  # another question


def test_live_greedy(peer):
    """Token for token, three prompts and questions of different length in one batch."""
    theirs, folder = peer
    model, pixels = load_llava(folder), pixels_of(theirs, 3)
    prompts = [ids_of(theirs, 7, *range(8, 8 + i)) for i in range(3)]
    views = [single(p, theirs.config.num_query_tokens) for p in pixels]
    ours = generate(model, views, prompts, eos_id=-1, questions=QUESTIONS, max_new_tokens=16)
    for found, prompt, view, question in zip(ours, prompts, views, QUESTIONS):
        inputs = dict(input_ids=torch.tensor([prompt]), pixel_values=view.pixels,
                      qformer_input_ids=torch.tensor([question]))
        inputs |= dict(attention_mask=torch.ones_like(inputs["input_ids"]), suppress_tokens=list(range(IMAGE, ROWS)))
        assert found[0] == make.greedy(theirs, inputs, 16, eos_id=None).tolist()


def loads_whole(folder: Path):
    """Their model of a folder, every tensor found."""
    model, report = their_class().from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_live_save(peer, tmp_path):
    """In shards, with merged adapters: theirs loads it with equal logits; the rows that no text uses are carried over."""
    theirs, folder = peer
    model = load_llava(folder)
    torch.manual_seed(0)
    add_lora(model.language_model, 2, 4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_llava(model, tmp_path, folder, shard_bytes=45_000)
    ids, pixels, question = ids_of(theirs, 7, 8), pixels_of(theirs), QUESTIONS[0]
    with torch.no_grad():
        expected = model.logits(torch.tensor(ids), pixels, None, question)
    saved = loads_whole(tmp_path)
    torch.testing.assert_close(their_logits(saved, ids, pixels, question), expected, **TIGHT)
    assert not torch.allclose(expected, their_logits(theirs, ids, pixels, question), atol=1e-2)
    assert torch.equal(saved.language_model.lm_head.weight[IMAGE:], theirs.language_model.lm_head.weight[IMAGE:])


def test_live_earlier_vocabulary(tmp_path):
    """[PAD] alone, no image token in config.json: what is saved has one, and theirs computes the same with it."""
    folder = write(tmp_path / "earlier", later=False)
    model, processor = load_llava(folder), Processor(folder)
    size = len(load_file(folder / "model.safetensors")["language_model.lm_head.weight"])
    assert (model.config.text.vocab_size, model.config.image_token_index) == (size - 1, size)
    save_llava(model, tmp_path / "later", folder)
    theirs = loads_whole(tmp_path / "later")
    assert theirs.config.text_config.vocab_size % 64 == 0 and theirs.config.image_token_index == size
    ids, question = processor.prompt("a dog"), processor.question("a dog")
    with torch.no_grad():
        expected = model.logits(torch.tensor(ids), small.pictures(1), None, question)
        found = theirs(input_ids=torch.tensor([ids]), pixel_values=small.pictures(1),
                       qformer_input_ids=torch.tensor([question])).logits[0, :, : size - 1]
        again = load_llava(tmp_path / "later").logits(torch.tensor(ids), small.pictures(1), None, question)
    torch.testing.assert_close(found, expected, **TIGHT)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert Processor(tmp_path / "later").prompt("a dog") == ids


@pytest.mark.parametrize("projection", [False, True])
def test_live_peft(peer, tmp_path, projection):
    """Adapters both ways, the projection trained as well."""
    peft, (theirs, folder) = pytest.importorskip("peft"), peer
    ids, pixels, question = ids_of(theirs, 7, 8), pixels_of(theirs), QUESTIONS[0]
    model = load_llava(folder).requires_grad_(False)
    torch.manual_seed(0)
    add_lora(model.language_model, 2, 4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    model.language_projection.requires_grad_(projection)
    with torch.no_grad():
        model.language_projection.weight += 0.1 * projection
        expected = model.logits(torch.tensor(ids), pixels, None, question)
    save_adapters(model, tmp_path / "ours", folder)
    names = {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "ours" / "adapter_model.safetensors")}
    assert all(re.sub(r"lora_[AB]\.", "", name) in theirs.state_dict() for name in names)
    wrapped = peft.PeftModel.from_pretrained(their_class().from_pretrained(folder), tmp_path / "ours").eval()
    torch.testing.assert_close(their_logits(wrapped, ids, pixels, question), expected, **TIGHT)
    wrapped.save_pretrained(tmp_path / "theirs")
    again = load_llava(folder)
    load_adapters(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.logits(torch.tensor(ids), pixels, None, question), expected, **TIGHT)


# -------------------------------------------------------------------------------------------------------- LAVIS


LAVIS = (  # name on the hub -> name in LAVIS' files
    (r"^vision_model\.post_layernorm\.", "ln_vision."), (r"^language_projection\.", "llm_proj."),
    (r"^vision_model\.embeddings\.class_embedding", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.", "blocks."), (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.qkv\.", ".attn.qkv."), (r"\.self_attn\.projection\.", ".attn.proj."),
    (r"^qformer\.embeddings\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."), (r"^qformer\.", "Qformer.bert."),
    (r"\.(attention|crossattention)\.attention\.", r".\1.self."), (r"^language_model\.", ""),
)


def write_lavis(source: Path, folder: Path) -> None:
    """The checkpoint in `source` as LAVIS publishes it: trained.pth, eva.pth, vicuna/ and BERT's vocabulary."""
    trimmed, eva, vicuna = {}, {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for pattern, replacement in LAVIS:
            name = re.sub(pattern, replacement, name)
        if name.endswith("attn.qkv.bias"):
            q, k, v = tensor.chunk(3)
            assert not k.any()
            eva |= {name.replace("qkv.bias", "q_bias"): q.clone(), name.replace("qkv.bias", "v_bias"): v.clone()}
        elif re.match(r"blocks|cls|pos|patch", name):
            eva[name] = tensor
        else:
            (vicuna if name.startswith(("model.", "lm_head")) else trimmed)[name] = tensor
    eva |= {name.replace("blocks.0", "blocks.3"): tensor for name, tensor in eva.items() if name.startswith("blocks.0")}
    trimmed["Qformer.bert.embeddings.position_ids"] = torch.arange(130)[None]
    (folder / "vicuna").mkdir(parents=True)
    torch.save({"model": trimmed}, folder / "trained.pth")
    torch.save(eva, folder / "eva.pth")
    save_file(vicuna, folder / "vicuna" / "model.safetensors")
    rows = len(vicuna["lm_head.weight"])
    (folder / "vicuna" / "config.json").write_text(json.dumps({**small.TEXT, "vocab_size": rows}))
    shutil.copyfile(source / "tokenizer.json", folder / "vicuna" / "tokenizer.json")
    shutil.copyfile(source / "qformer_tokenizer" / "vocab.txt", folder / "vocab.txt")


SMALL = dict(vision=EvaConfig(24, 40, 3, 3, small.SIDE, 5, post_layernorm_eps=1e-5),
             qformer=QFormerConfig(61, 20, 28, 3, 2, 130))


@pytest.fixture
def lavis(tmp_path):
    """A complete folder whose key biases are zero, and its weights as LAVIS has them."""
    source = write(tmp_path / "hub")
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("qkv.bias"):
            tensors[name].chunk(3)[1].zero_()
    save_file(tensors, source / "model.safetensors")
    write_lavis(source, tmp_path)
    return tmp_path


def convert_small(lavis: Path, **more) -> Path:
    convert(*(lavis / name for name in ("trained.pth", "eva.pth", "vicuna", "vocab.txt", "out")), **SMALL | more)
    return lavis / "out"


def test_lavis_files_are_converted(lavis):
    """The same weights under the hub's names; the norm after the tower with 1e-5, kept when it is saved again."""
    model, source = load_llava(convert_small(lavis)), load_llava(lavis / "hub")
    expected = source.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.vision_model.post_layernorm.eps == 1e-5 and source.vision_model.post_layernorm.eps == 1e-6
    assert inspect.signature(convert).parameters["vision"].default == EvaConfig(post_layernorm_eps=1e-5)
    assert model.vision_model.encoder.layers[0].layer_norm1.eps == 1e-6
    processor, published = Processor(lavis / "out"), Processor(lavis / "hub")
    assert processor.prompt("a dog", 0) == published.prompt("a dog", 0)
    assert processor.question("a dog?") == published.question("a dog?")
    save_llava(model, lavis / "again", lavis / "out")
    again = load_llava(lavis / "again")
    assert again.vision_model.post_layernorm.eps == 1e-5 and again.config.image_token_index is not None
    assert Processor(lavis / "again").question("a dog?") == published.question("a dog?")


@pytest.mark.parametrize("file, edit, reason", [
    ("eva.pth", lambda t: t.pop("blocks.1.attn.v_bias"), "missing tensor vision_model.encoder.layers.1.self_attn.v_bias"),
    ("eva.pth", lambda t: t.update(head=torch.zeros(2)), "unexpected tensor vision_model.head"),
    ("trained.pth", lambda t: t["model"].pop("query_tokens"), "missing tensor query_tokens"),
])
def test_lavis_files_that_do_not_fit(lavis, file, edit, reason):
    state = torch.load(lavis / file)
    edit(state)
    torch.save(state, lavis / file)
    with pytest.raises(ValueError, match=re.escape(reason)):
        convert_small(lavis)
    assert not (lavis / "out").exists()


def test_live_lavis(lavis):
    """Theirs on the converted weights, with LAVIS' eps put in by hand."""
    model = load_llava(convert_small(lavis))
    save_llava(model, lavis / "again", lavis / "out")
    theirs = loads_whole(lavis / "again")
    theirs.vision_model.post_layernorm.eps = 1e-5
    image = model.config.image_token_index
    ids, pixels, question = [*[image] * QUERIES, 2, 7, 8], small.pictures(1), QUESTIONS[0]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels,
                          qformer_input_ids=torch.tensor([question])).logits[0]
        found = model.logits(torch.tensor(ids), pixels, None, question)
    torch.testing.assert_close(found, expected[:, : found.shape[1]], **TIGHT)
