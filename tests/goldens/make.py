"""Regenerate transformers.safetensors: what `transformers` computes on the checkpoints of tests/small.py.

    python tests/goldens/make.py

The file holds outputs only; inputs and weights come from tests/small.py. The tests that read it need neither
`transformers` nor the network.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

import small  # noqa: E402

GOLDENS = HERE / "transformers.safetensors"
PHOTOS = ((40, 24), (23, 57), (17, 17), (16, 90), (301, 18), (18, 301), (1, 3), (17, 33))  # width, height
TEXTS = ([65, 3, 50, 40], [65, 66, 7, 8, 40], [65, 40], [65, 1, 2, 3, 64, 5, 6, 7, 8, 9, 10, 40])
TEXTS_LEGACY = ([65, 3, 50, 66], [65, 4, 7, 8, 66], [65, 66], [65, 1, 2, 3, 64, 5, 6, 7, 8, 9, 10, 66])
PROMPTS = (small.prompt(7, 8, 9), small.prompt(11), small.prompt(12, 13, 14, 15, 16))
TOKENS = 24  # greedy continuation


def clip_outputs(folder: Path, texts: tuple) -> dict[str, Tensor]:
    """Hidden states of the vision tower and unit embeddings of pictures and texts."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    pixels = small.pictures(3)
    vision = clip.vision_model(pixels, output_hidden_states=True)
    longest, pad = max(map(len, texts)), texts[0][-1]
    ids = torch.tensor([t + [pad] * (longest - len(t)) for t in texts])
    images = clip.visual_projection(vision.pooler_output)
    words = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    result = {f"hidden.{i}": h for i, h in enumerate(vision.hidden_states)}
    return result | {"images": unit(images), "texts": unit(words)}


def llava_outputs(folder: Path) -> dict[str, Tensor]:
    """Logits of each prompt with its picture, and its greedy continuation."""
    from transformers import LlavaForConditionalGeneration

    llava = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    result = {}
    for i, prompt in enumerate(PROMPTS):
        inputs = dict(input_ids=torch.tensor([prompt]), pixel_values=small.pictures(3)[i : i + 1])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        result[f"logits.{i}"] = llava(**inputs).logits[0]
        result[f"greedy.{i}"] = greedy(llava, inputs, TOKENS, eos_id=None)
    return result


def greedy(llava, inputs: dict[str, Tensor], tokens: int, eos_id: int | None) -> Tensor:
    """New tokens of `transformers`' greedy search."""
    settings = dict(do_sample=False, max_new_tokens=tokens, eos_token_id=eos_id, pad_token_id=0)
    return llava.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]


def image_processor():
    """The slow (Pillow) image processor of CLIP for the small model's side."""
    import transformers

    # Version 5 gave the plain name to the torchvision implementation.
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": small.SIDE}, crop_size={"height": small.SIDE, "width": small.SIDE})


def preprocessed() -> dict[str, Tensor]:
    """Every photo through that processor."""
    processor = image_processor()
    results = (processor(Image.fromarray(small.photo(*size)), return_tensors="pt") for size in PHOTOS)
    return {f"{w}x{h}": r["pixel_values"][0] for (w, h), r in zip(PHOTOS, results)}


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def main() -> None:
    import transformers

    from model.tensors import save_tensors

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        parts = {
            "clip": clip_outputs(small.write_clip(root / "clip"), TEXTS),
            "legacy": clip_outputs(small.write_clip(root / "legacy", eos_token_id=2), TEXTS_LEGACY),
            "llava": llava_outputs(small.write_llava(root / "llava")),
            "photo": preprocessed(),
        }
    parts["legacy"] = {"texts": parts["legacy"]["texts"]}  # the rest is the same
    save_tensors({f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}, GOLDENS)
    print(f"{GOLDENS.name}: {GOLDENS.stat().st_size / 1024:.0f} KiB, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
