"""Every template's exact tokens, from both kinds of tokenizer file, against LLaVA's way of tokenising."""

import json
import re
from pathlib import Path

import pytest
import small
from tokenizers import normalizers

from data.processor import Processor, cut
from data.sentencepiece import read_sentencepiece
from model.families import llava as family
from model.families.llava import SPECIAL, TEMPLATES

MODEL = Path(__file__).parent / "goldens" / "tokenizer.model"
NO_PREFIX = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }; appended, it overrides
IMAGE = 540  # first id behind the vocabulary
QUESTION, ANSWER = "A dog?", "Yes."
SYSTEM = (
    "▁A ▁chat ▁between ▁a ▁curious ▁{0} ▁and ▁an ▁artificial ▁intelligence ▁assistant . ▁The ▁assistant"
    " ▁gives ▁helpful , ▁detailed , ▁and ▁polite ▁answers ▁to ▁the ▁{0} ' s ▁questions ."
)
TURN = "▁USER : ▁ <image> ▁ <0x0A> A ▁dog ? ▁ASSISTANT :"
EXACT = {  # (in front of the answer, answer)
    "hf": (f"<s> {TURN}", "▁Yes . </s>"),
    "vicuna_v1": (f"<s> {SYSTEM.format('user')} {TURN}", "▁Yes . </s>"),
    "llava_v1": (f"<s> {SYSTEM.format('human')} {TURN}", "▁Yes . </s>"),
    "mistral_instruct": ("<s> ▁ [ INST ] ▁ <image> ▁ <0x0A> A ▁dog ? ▁[/ INST ]", "▁Yes . ▁ </s>"),
    "chatml_direct": (
        "<|im_start|> system <0x0A> A ns wer ▁the ▁questions . <|im_end|> <|im_start|> user <0x0A> <image>"
        " <0x0A> A ▁dog ? <|im_end|> <|im_start|> assistant <0x0A>", "Y es . <|im_end|>",
    ),
}


def folder(path: Path, kind: str, dummy_prefix: bool = True) -> Path:
    """A LLaVA folder with the golden vocabulary as tokenizer.model, or as llava-hf's tokenizer.json."""
    path.mkdir(exist_ok=True)
    raw = {**small.LLAVA, "text_config": {**small.TEXT, "vocab_size": IMAGE + 1}, "image_token_index": IMAGE}
    (path / "config.json").write_text(json.dumps(raw))
    (path / "tokenizer.model").write_bytes(MODEL.read_bytes() + (b"" if dummy_prefix else NO_PREFIX))
    if kind == "json":
        tokenizer, _ = read_sentencepiece(path / "tokenizer.model")
        prefix = [normalizers.Prepend("▁")] if dummy_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<image>"])
        tokenizer.save(str(path / "tokenizer.json"))
        (path / "tokenizer.model").write_bytes(b"must not be read")
    return path


@pytest.fixture(params=["model", "json"])
def processors(request, tmp_path):
    """Template name -> processor; Yi's vocabulary, of chatml_direct, has no dummy prefix."""
    return lambda name: Processor(folder(tmp_path / name, request.param, name != "chatml_direct"), name)


def tokens(processor: Processor, ids: list[int]) -> str:
    return " ".join("<image>" if i == IMAGE else processor.tokenizer.core.id_to_token(i) for i in ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_exact_tokens(processors, name):
    """One image token; the dangling ▁ on both sides of it; the ▁ in front of mistral_instruct's </s>."""
    processor = processors(name)
    assert tokens(processor, processor.prompt(QUESTION, 1)) == EXACT[name][0]
    assert tokens(processor, processor.response(ANSWER)) == EXACT[name][1]
    assert processor.response(ANSWER)[-1] == processor.eos_id == processor.tokenizer.id(TEMPLATES[name].stop)
    assert processor.prompt(QUESTION).count(IMAGE) == small.PATCHES


def test_the_documented_tokens_are_these():
    """The docstring's table: "…" stands for what is left out, "|" is where the answer begins."""
    table = family.__doc__.split("where the answer begins:")[1]
    rows = dict(line.split(maxsplit=1) for line in table.strip().splitlines())
    assert list(rows) == list(TEMPLATES) == list(EXACT)
    for name, row in rows.items():
        pattern = re.escape(row).replace("…", ".*")
        assert re.fullmatch(pattern, " | ".join(EXACT[name])), name


def test_the_documented_letters_are_the_templates():
    """The docstring's first table, ⏎ for a line break and {system, word} for the system sentences."""
    table = family.__doc__.split("to the letter:\n\n")[1].split("\n\n")[0].replace("\n" + " " * 23, "")
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    for name, word in (("vicuna_v1", "user"), ("llava_v1", "human")):
        rows[name] = rows[name].replace(f"{{system, {word}}}", family.SYSTEM.format(word))
    assert rows == {name: (t.before + t.image + t.after + t.answer + t.stop).replace("\n", "⏎")
                    for name, t in TEMPLATES.items()}


def llava(sp, text: str) -> list[int]:
    """LLaVA's tokenizer_image_token on its slow tokenizer: chunks around <image>, special tokens cut out."""
    read = lambda part: [sp.piece_to_id(part)] if part in SPECIAL else sp.encode(part)
    chunks = [[i for part in cut(chunk, SPECIAL) for i in read(part)] for chunk in text.split("<image>")]
    return [i for chunk in chunks for i in (IMAGE, *chunk)][1:]


@pytest.mark.parametrize("question", [QUESTION, "Is there\na cat here?", "犬は 走る", " what  is it? ", "dog."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_equals_llava(processors, name, question):
    """The ids are those of LLaVA's whole conversation, and the prompt is what its label mask hides.

    LLaVA tokenises everything up to and with "ASSISTANT: ", takes 2 off the count (the BOS and the last blank's
    ▁) and masks the BOS and that many ids behind it.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = processors(name)
    plain = MODEL.read_bytes() + (NO_PREFIX if name == "chatml_direct" else b"")
    sp = sentencepiece.SentencePieceProcessor(model_proto=plain)
    before, image, after, answer, stop = TEMPLATES[name]
    for text in (ANSWER, "a dog\nand 2 cats ", "  blanks", "é犬"):
        whole = before + image + after.format(prompt=question) + answer.format(answer=text) + stop
        prompt = processor.prompt(question, 1)
        assert prompt + processor.response(text) == llava(sp, whole)
        if name in ("vicuna_v1", "llava_v1"):
            instruction = whole.split("ASSISTANT: ")[0] + "ASSISTANT: "
            masked = 1 + len(llava(sp, instruction)) - 2  # BOS and the counted rest
            assert llava(sp, whole)[:masked] == prompt
        assert processor.decode(processor.response(text)) == text


def test_equals_transformers(tmp_path):
    """transformers' LlamaTokenizer, asked part by part with its dummy prefix, has the same ids."""
    transformers = pytest.importorskip("transformers")
    processor = Processor(folder(tmp_path, "json"), "vicuna_v1")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    oracle = transformers.LlamaTokenizer(vocab=raw["vocab"], merges=[tuple(m) for m in raw["merges"]])
    before, image, after, answer, stop = TEMPLATES["vicuna_v1"]
    parts = [before.removeprefix("<s>"), image.removeprefix("<image>") + after.format(prompt=QUESTION) + answer.format(answer=ANSWER)]
    first, second = (oracle.encode(part, add_special_tokens=False) for part in parts)
    assert [1, *first, IMAGE, *second, 2] == processor.prompt(QUESTION, 1) + processor.response(ANSWER)
    oracle.save_pretrained(tmp_path)  # its tokenizer.json prefixes in a pre-tokeniser, not a normaliser
    again = Processor(tmp_path, "vicuna_v1")
    assert again.prompt(QUESTION, 1) + again.response(ANSWER) == [1, *first, IMAGE, *second, 2]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_without_an_image(processors, name):
    """Neither image tokens nor the line break after them: the text is one part, with one dummy prefix."""
    processor, template = processors(name), TEMPLATES[name]
    bos, _, text = (template.before + template.after.format(prompt=QUESTION)).partition(">")
    expected = [i for part in cut(bos + ">" + text, SPECIAL)
                for i in ([processor.tokenizer.id(part)] if part in SPECIAL else processor.tokenizer.encode(part))]
    assert processor.prompt(QUESTION, 0) == expected
    assert IMAGE not in expected and "<0x0A> A ▁dog" not in tokens(processor, expected) or name == "chatml_direct"
    view = processor.image(None)
    assert len(view.pixels) == len(view.rows) == 0


@pytest.mark.parametrize("name", TEMPLATES)
def test_opening_is_the_beginning_of_the_response(processors, name):
    """An answer that is to be continued: nothing behind it, no ▁ alone for the empty one."""
    processor = processors(name)
    assert processor.opening("") == []
    assert processor.response("") == [processor.eos_id]
    opening = processor.opening("A dog")
    assert processor.response("A dog is here")[: len(opening)] == opening


@pytest.mark.parametrize("token", ["<image>", *SPECIAL, "<unk>"])
@pytest.mark.parametrize("name", ["vicuna_v1", "chatml_direct"])
def test_special_tokens_in_text_are_refused(processors, name, token):
    processor = processors(name)
    for call in (processor.prompt, processor.response, processor.opening):
        with pytest.raises(ValueError, match=re.escape(f"contains the special token {token}: 'what{token}")):
            call(f"what{token} is it?")


def test_template_comes_from_the_config_unless_named(tmp_path):
    """llava-hf's LLaVA-1.5 has "hf"; another name gives another prompt; an unknown one is refused."""
    place = folder(tmp_path, "model")
    assert Processor(place).template is TEMPLATES["hf"]
    assert Processor(place, "llava_v1").template is TEMPLATES["llava_v1"]
    with pytest.raises(ValueError, match="no template 'v1' .there are: hf, vicuna_v1, "):
        Processor(place, "v1")


def test_an_original_folder(tmp_path):
    """Decoder fields at the top and tokenizer.model: vicuna_v1; the image token is the first free id."""
    place = folder(tmp_path, "model")
    raw = {**small.TEXT, "model_type": "llava", "vocab_size": IMAGE, "architectures": ["LlavaLlamaForCausalLM"],
           "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
           "mm_projector_type": "mlp2x_gelu"}
    (place / "config.json").write_text(json.dumps(raw))
    processor = Processor(place)
    assert processor.template is TEMPLATES["vicuna_v1"]
    assert tokens(processor, processor.prompt(QUESTION, 1)) == EXACT["vicuna_v1"][0]
    assert processor.prompt(QUESTION).count(IMAGE) == 24 * 24


def test_a_vocabulary_without_the_templates_tokens_is_refused(tmp_path):
    place = folder(tmp_path, "model")
    (place / "tokenizer.model").write_bytes(MODEL.read_bytes().replace(b"<|im_end|>", b"<|im_END|>"))
    with pytest.raises(ValueError, match=r"tokenizer.model: has no token <\|im_end\|>"):
        Processor(place, "chatml_direct")


def test_an_answer_that_merges_with_the_tag_is_refused(tmp_path):
    """A vocabulary with the pieces "⏎" and "⏎⏎": the ids behind "assistant⏎" would depend on the answer."""
    place = folder(tmp_path, "model", dummy_prefix=False)
    score = b"\x15\x00\x00\x80\xbf"  # -1
    pieces = b"\x0a\x08\x0a\x01\n" + score + b"\x0a\x09\x0a\x02\n\n" + score
    (place / "tokenizer.model").write_bytes(MODEL.read_bytes() + pieces)
    raw = {**small.LLAVA, "text_config": {**small.TEXT, "vocab_size": IMAGE + 2}}
    (place / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="merges with the 'assistant.n' before it"):
        Processor(place, "chatml_direct").response("\nYes.")
