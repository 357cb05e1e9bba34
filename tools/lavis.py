"""InstructBLIP as LAVIS publishes it, in three places, to one folder in the hub's layout, which train.py takes.

    python -m tools.lavis --trained instruct_blip_vicuna7b_trimmed.pth --tower eva_vit_g.pth --vicuna vicuna-7b-v1.1 \\
        --vocabulary bert-base-uncased/vocab.txt --out DIR

    --trained      {"model": ...}: Q-Former, queries, projection and the norm after the tower
    --tower        EVA-CLIP's ViT-g; its last block, of which LAVIS builds nothing, is left out
    --vicuna       a LLaMA folder: weights of version 1.1, and tokenizer
    --vocabulary   the words of BERT, uncased

Every tensor keeps its dtype. Missing, unexpected and mis-shaped tensors are named. The tower's norm gets LAVIS' eps of
1e-5, which `transformers` does not know: there it is 1e-6.
"""

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import run_script, written_whole
from model.checkpoint import BUFFERS
from model.config import llama_config, read_config
from model.families.instructblip import READER, hf_config
from model.instructblip import EvaConfig, InstructBlip, InstructBlipConfig, QFormerConfig
from model.layouts import by_name, copy_companions, renamed
from model.tensors import Stored, check_tensors, list_file, list_tensors, read_one, save_json, save_shards

TRAINED = (
    (r"^Qformer\.bert\.", "qformer."), (r"^qformer\.embeddings\.LayerNorm\.", "qformer.embeddings.layernorm."),
    (r"\.(attention|crossattention)\.self\.", r".\1.attention."),
    (r"^llm_proj\.", "language_projection."), (r"^ln_vision\.", "vision_model.post_layernorm."),
)
TOWER = (
    (r"^cls_token$", "embeddings.class_embedding"), (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."), (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."), (r"\.attn\.proj\.", ".self_attn.projection."), (r"\.attn\.", ".self_attn."),
    (r"^", "vision_model."),
)
DECODER = ((r"^", "language_model."),)
FUSED = "self_attn.qkv.bias"  # on the hub: query, key (zero), value


def convert(trained: Path, tower: Path, vicuna: Path, vocabulary: Path, out: Path,
            vision: EvaConfig = EvaConfig(post_layernorm_eps=1e-5),
            qformer: QFormerConfig = QFormerConfig(vocab_size=30523)) -> None:
    """Write the folder. Raises BadInput naming the file and the tensor or setting that does not fit."""
    found = {name: tensor for stored, names in (
        (list_file(trained), TRAINED), (list_file(tower), TOWER), (list_tensors(vicuna), DECODER),
    ) for name, tensor in by_name(stored, partial(renamed, renames=names)).items()}
    queries = found["query_tokens"].shape[1] if "query_tokens" in found else 32
    text = llama_config(read_config(vicuna), str(vicuna / "config.json"))
    config = InstructBlipConfig(vision, qformer, text, queries)
    tensors = gather(found, config, trained.parent)
    out.mkdir(parents=True, exist_ok=True)
    copy_companions(vicuna, out, vicuna)
    with written_whole(out / READER[1]) as temporary:
        shutil.copyfile(vocabulary, temporary)
    save_shards(tensors, out)
    save_json(hf_config(config) | {"image_token_index": None}, out / "config.json")


def gather(found: dict[str, Stored], config: InstructBlipConfig, where: Path) -> dict[str, Callable[[], Tensor]]:
    """Name on the hub -> function that makes the tensor. Raises BadInput on what does not fit."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in InstructBlip(config).state_dict().items()}
    width, wanted = (config.vision.hidden_size,), {n: s for n, s in shapes.items() if not n.endswith(FUSED)}
    halves = {name: [name.replace("qkv.bias", half) for half in ("q_bias", "v_bias")]
              for name in shapes if name.endswith(FUSED)}
    check_tensors(found, wanted | {half: width for pair in halves.values() for half in pair}, where,
                  partial(_left_out, config.vision.num_hidden_layers))
    return {name: partial(_fuse, *(found[half] for half in halves[name])) if name in halves
            else partial(read_one, found[name]) for name in shapes}


def _left_out(layers: int, name: str) -> bool:
    """True for the tower's last block and for index buffers."""
    return name.startswith(f"vision_model.encoder.layers.{layers}.") or bool(BUFFERS.search(name))


def _fuse(query: Stored, value: Stored) -> Tensor:
    q, v = read_one(query), read_one(value)
    return torch.cat([q, torch.zeros_like(q), v])


def main() -> None:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("trained", "tower", "vicuna", "vocabulary", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script(main, "tools.lavis")
