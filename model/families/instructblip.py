"""InstructBLIP on Vicuna 7B and 13B: everything that a checkpoint's files decide. The network is in
model/instructblip.py.

Dai et al. 2023, arXiv 2305.06500. Two layouts: that of the hub (Salesforce/instructblip-vicuna-7b and -13b), which is
read and written, its names being those of the model; and LAVIS' three files, which tools/lavis.py converts.

    query_tokens                       (1, 32, 768)      LAVIS: query_tokens
    qformer.X                                            Qformer.bert.X
    vision_model.X, .post_layernorm                      visual_encoder.X, ln_vision
    language_projection                                  llm_proj
    language_model.model.X, .lm_head                     Vicuna v1.1's own files

The norm after the tower has eps 1e-5 in LAVIS and 1e-6 in `transformers`: `post_layernorm_eps` in vision_config, a
field of ours, else `layer_norm_eps`.

Vocabulary. Both tables have rows for [PAD], and since late 2024 for <image> and filler (32064 rows for 32000 tokens;
earlier 32001, and no image token in config.json). No text contains them, so they take no part in the softmax, as in
LLaVA. A model of the earlier kind is saved as one of the later, which today's `transformers` needs.

Prompt, as trained by LAVIS: no chat template, the image before the token that begins the text, and that token is </s>:

    <image> x 32 </s> {prompt} {answer} </s>

    <image> … <image> </s> ▁A ▁dog ? | ▁Yes . </s>         "|" is where the answer begins

Prompt and answer are tokenised one by one, so the answer begins with "▁". The Q-Former reads the prompt alone, in the
uncased WordPiece of BERT in qformer_tokenizer/, [CLS] {prompt} [SEP]; of more than 128 tokens the last ones.

Images are resized to a square without regard to their aspect ratio: `aspect` "resize".

Departures. LAVIS generates with 5 beams and a repetition penalty of 1.5, here it is greedily or by sampling. It trains
on the last 128 tokens of a longer prompt; here the decoder reads all of it. It keeps the Q-Former and the projection in
fp32; here they have the dtype of the rest. T5 decoders are not supported.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from PIL import Image
from tokenizers import BertWordPieceTokenizer, Tokenizer

from common import BadInput
from model.config import Template, llama_config, read_config, refuse, section, shared, take, token_ids, value
from model.instructblip import EvaConfig, InstructBlip, InstructBlipConfig, QFormerConfig
from model.layouts import adapter_base, by_name, unwrapped
from model.settings import read_preprocessing
from model.tensors import Stored, list_tensors
from model.views import Preprocessing, Size, View, preprocess, single

Model = InstructBlip

SPECIAL = ("<s>", "</s>")
TEMPLATES = {"instructblip": Template("", "<image>", "</s>{prompt}", "{answer}", "</s>")}
SEVERAL_IMAGES = False  # the Q-Former was trained on one
QUESTION = 128  # most tokens of a question that the Q-Former reads
NO_TEXT = ("[PAD]", "<pad>", "<image>")
PADDING = 64  # the tables of the later vocabulary have a multiple of it as rows
READER = ("qformer_tokenizer/tokenizer.json", "qformer_tokenizer/vocab.txt")  # the first that is there counts
COMPANIONS = (*READER, *(f"qformer_tokenizer/{name}" for name in (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")))


# ---------------------------------------------------------------------------------------------- configuration


def instructblip_config(raw: dict, where: str = "config.json") -> InstructBlipConfig:
    """Read a config.json of the hub's layout. Raises BadInput on what is not InstructBLIP on a LLaMA."""
    eva, bert, decoder = (section(raw, name, where) for name in ("vision_config", "qformer_config", "text_config"))
    refuse(eva, f"{where}: vision_config", hidden_act=("gelu",), qkv_bias=(True, None))
    refuse(bert, f"{where}: qformer_config", hidden_act=("gelu",), position_embedding_type=("absolute", None))
    refuse({"model_type": None} | decoder, f"{where}: text_config", model_type=("llama",))
    vision = take(EvaConfig, {"post_layernorm_eps": eva.get("layer_norm_eps")} | eva, f"{where}: vision_config")
    qformer = take(QFormerConfig, bert, f"{where}: qformer_config")
    shared(vision.hidden_size, vision.num_attention_heads, f"{where}: vision_config")
    shared(qformer.hidden_size, qformer.num_attention_heads, f"{where}: qformer_config")
    if vision.patch_size > vision.image_size:
        raise BadInput(f"{where}: vision_config: patch_size={vision.patch_size} is larger than"
                       f" image_size={vision.image_size}")
    if qformer.max_position_embeddings < QUESTION:
        raise BadInput(f"{where}: qformer_config: max_position_embeddings={qformer.max_position_embeddings} is fewer"
                       f" than the {QUESTION} tokens of a question")
    text = llama_config(decoder, f"{where}: text_config")
    return InstructBlipConfig(vision, qformer, text, value(raw, ("num_query_tokens",), 32, where),
                              value(raw, ("image_token_index", "image_token_id"), text.vocab_size, where))


def read(folder: Path) -> InstructBlipConfig:
    """The configuration of a folder, rows that no text uses taken off the vocabulary.

    They come after the last token of tokenizer.json that is none of NO_TEXT; without that file every row counts.
    Raises BadInput naming the file and the setting that does not fit.
    """
    config, path = instructblip_config(read_config(folder), str(folder / "config.json")), folder / "tokenizer.json"
    size = config.text.vocab_size
    ids = [i for token, i in token_ids(path) if token not in NO_TEXT] if path.is_file() else []
    rows = min(size, 1 + max(ids, default=size - 1))
    return replace(config, text=replace(config.text, vocab_size=rows), surplus_rows=size - rows)


def hf_config(config: InstructBlipConfig) -> dict:
    """config.json of the hub's layout, for tables of `text.vocab_size` rows."""
    eva, bert = ({"hidden_act": "gelu", **asdict(part)} for part in (config.vision, config.qformer))
    return {
        "model_type": "instructblip",
        "architectures": ["InstructBlipForConditionalGeneration"],
        "vision_config": {"model_type": "instructblip_vision_model", "qkv_bias": True, **eva},
        "qformer_config": {"model_type": "instructblip_qformer", "encoder_hidden_size": eva["hidden_size"], **bert},
        "text_config": {"model_type": "llama", "hidden_act": "silu", **asdict(config.text)},
        "num_query_tokens": config.num_query_tokens,
        "image_token_index": config.image_token_index,
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def converted_config(config: InstructBlipConfig, raw: dict) -> dict | None:
    """config.json with an image token, and rows for it, where the source has none; else None."""
    if raw.get("image_token_index", raw.get("image_token_id")) is not None:
        return None
    rows = PADDING * (config.image_token_index // PADDING + 1)
    return {**raw, "image_token_index": config.image_token_index,
            "text_config": {**raw["text_config"], "vocab_size": rows}}


# ----------------------------------------------------------------------------------------------------- tensors


def canonical(name: str) -> str:
    """Name in the model of a tensor in the file: the same, but for what wrappers put before it."""
    return unwrapped(name)


def saved_name(name: str) -> str:
    """The same: the model has the hub's names."""
    return name


def peft_name(name: str) -> str:
    """Name in the model -> name in `transformers`' model: the same."""
    return name


def tensors(folder: Path) -> dict[str, Stored]:
    """Name in the model -> place, for all tensors of a folder, or of the model that adapters go onto."""
    return by_name(list_tensors(adapter_base(folder) or folder), canonical)


def may_ignore(config: InstructBlipConfig, name: str) -> bool:
    """Nothing, besides what no family needs (model/checkpoint.py)."""
    return False


# ------------------------------------------------------------------------------------------ prompt and images


def question_reader(folder: Path) -> Callable[[str], tuple[int, ...]]:
    """Question -> the ids that the Q-Former reads. BadInput naming the file that does not fit or is missing."""
    path = next((folder / name for name in READER if (folder / name).is_file()), None)
    if path is None:
        raise BadInput(f"{folder}: has no {' and no '.join(READER)}, with which the Q-Former reads questions")
    try:
        wordpiece = Tokenizer.from_file(str(path)) if path.suffix == ".json" else BertWordPieceTokenizer(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{path}: not a readable tokenizer ({' '.join(str(error).split())[:200]})") from None
    wordpiece.no_padding()
    wordpiece.no_truncation()
    first, last = (wordpiece.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    rows, largest = read(folder).qformer.vocab_size, max(wordpiece.get_vocab().values(), default=0)
    if first is None or last is None or largest >= rows:
        raise BadInput(f"{path}: needs the tokens [CLS] and [SEP], and ids below {rows} (its largest is {largest})")

    def question(text: str) -> tuple[int, ...]:
        ids = wordpiece.encode(text, add_special_tokens=False).ids
        return (first, *ids[-(QUESTION - 2) :], last)

    return question


def find_aspect(folder: Path, config: InstructBlipConfig, asked: str | None) -> str:
    """The only way. BadInput on another."""
    if asked not in (None, "resize"):
        raise BadInput(f"aspect {asked!r}: InstructBLIP's images are resized to a square (resize), nothing else")
    return "resize"


def settings_folder(folder: Path) -> Path:
    """Where the image settings are: with the model."""
    return folder


def preprocessing(folder: Path, config: InstructBlipConfig, aspect: str) -> Preprocessing:
    """The folder's numbers. BadInput naming the file and the setting that does not fit or is not supported."""
    side = config.vision.image_size
    how = read_preprocessing(folder, side, aspect, kinds=("Blip",))
    if how.resize not in (None, (side, side)):
        raise BadInput(f"{folder}: images are resized to {how.resize}, the vision tower takes {side} x {side}")
    return replace(how, resize=(side, side))


def view(image: Image.Image, aspect: str, how: Preprocessing, config: InstructBlipConfig) -> View:
    """RGB image -> one tile."""
    return single(preprocess(image, how), config.tile_tokens)


def image_tokens(size: Callable[[], Size], aspect: str, how: Preprocessing, config: InstructBlipConfig) -> int:
    """len(rows) of `view`."""
    return config.tile_tokens
