"""RAM and RAM++: which of 4,585 tags fit an image. AdaViP's first eye (arXiv 2504.15619, Eq. 5).

RAM: Zhang et al. 2023, "Recognize Anything: A Strong Image Tagging Model", arXiv 2306.03514. RAM++: Huang et al. 2023,
"Open-Set Image Tagging with Multi-Grained Text Supervision", arXiv 2310.15200. The parts that tag; the models' caption
decoders are not needed and their tensors are passed over.

    x_1 .. x_144  = norm(Swin-L(image)), x_0 = their mean                     image tokens, 1536
    y             = W_image [x_0, .., x_144]                                  (B, 145, 512)
    RAM     q_c   = relu(W_word e_c)                                          label c, e_c of its text (512)
    RAM++   q_c   = relu(W_word sum_k w_ck e_ck)                              51 descriptions a label
            w_ck  = softmax_k(exp(s) <y_0 / |y_0|, e_ck>)                     s: `reweight_scale`
    tag c fits    sigmoid(w . head(q, y)_c + b) > threshold of c              head: two layers, each a cross-attention
                                                                              of the labels to the image and an MLP

The list of tags and a threshold for each are text files of the released code, ram_tag_list.txt and
ram_tag_list_threshold.txt (https://github.com/xinyu1205/recognize-anything, ram/data): a file of weights has neither.

    symbol          argument         shape
    image           pixels           (B, 3, 384, 384), see `preprocess`
    e_c, e_ck       label_embed      (labels, 512), (labels * 51, 512)
    logits          forward          (B, labels)

Departure: AdaViP names RAM, not its thresholds; `threshold` is reconstructed, and what the released demo uses are the
thresholds of the file.
"""

import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from common import BadInput
from networks import bert
from networks.swin import LARGE, Swin, SwinConfig
from networks.weights import Tensors, load_weights, translated

PUBLISHED = ("ram_plus_swin_large_14m.pth (3.0 GB, huggingface.co/xinyu1205/recognize-anything-plus-model) or"
             " ram_swin_large_14m.pth (5.6 GB, huggingface.co/xinyu1205/recognize_anything_model), which tag images")
LISTS = "github.com/xinyu1205/recognize-anything, folder ram/data"
# The image encoder's buffers, and the captioning half of the models.
UNUSED = re.compile(r"relative_position_index$|attn_mask$|^tag_encoder\.|^text_decoder\.|^label_enc\.|position_ids$"
                    r"|^tagging_head\.embeddings\.|^tagging_head\.pooler\.")
NAMES = ((r"vision_multi", "tagging_head"), (r"\.crossattention\.", ".attention."), *bert.NAMES)  # published -> here
SIZE, MEAN, STD = 384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Ram(nn.Module):
    """Pixels -> one logit a label.

    Args:
        swin, size: of the image encoder.
        labels: how many; `descriptions` of each, 1 in RAM.
        width, image_width: of the head, of what it sees; `heads`, `hidden` and `layers` of the head.
    """

    def __init__(self, labels: int, descriptions: int = 1, *, swin: SwinConfig = LARGE, size: int = SIZE,
                 width: int = 768, image_width: int = 512, heads: int = 4, hidden: int = 3072, layers: int = 2):
        super().__init__()
        self.size, self.descriptions = size, descriptions
        self.visual_encoder = Swin(swin, size)
        self.image_proj = nn.Linear(swin.width * 2 ** (len(swin.depths) - 1), image_width)
        self.label_embed = nn.Parameter(torch.zeros(labels * descriptions, image_width))
        self.wordvec_proj = nn.Linear(image_width, width)
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": nn.ModuleList(
            bert.Layer(width, heads, hidden, source=image_width) for _ in range(layers))})})
        self.fc = nn.Linear(width, 1)
        if descriptions > 1:
            self.reweight_scale = nn.Parameter(torch.zeros(()))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) -> logits (B, labels)."""
        (states,) = self.visual_encoder(pixels)  # (B, H, W, C)
        states = states.flatten(1, 2)  # (B, N, C)
        image = self.image_proj(torch.cat([states.mean(1, keepdim=True), states], 1))  # (B, 1 + N, E)
        labels = F.relu(self.wordvec_proj(self.label_vectors(image[:, 0])))  # (B or 1, labels, D)
        labels = labels.expand(len(pixels), -1, -1)
        for layer in self.tagging_head["encoder"]["layer"]:
            labels = layer(labels, image)  # labels do not see each other
        return self.fc(labels)[..., 0]

    def label_vectors(self, summary: Tensor) -> Tensor:
        """The labels' text embeddings (1, labels, E); RAM++ weighs its descriptions by the image's `summary` (B, E):
        (B, labels, E)."""
        if self.descriptions == 1:
            return self.label_embed[None]
        scores = F.normalize(summary, dim=-1) @ self.label_embed.T * self.reweight_scale.exp()  # (B, labels * K)
        weights = scores.unflatten(1, (-1, self.descriptions)).softmax(-1)  # (B, labels, K)
        # One product a label: (B, labels, K, E) would take half a gigabyte an image.
        return torch.einsum("blk,lke->ble", weights, self.label_embed.unflatten(0, (-1, self.descriptions)))

    @torch.no_grad()
    def tags(self, image: Image.Image, names: list[str], thresholds: Tensor) -> list[tuple[str, float]]:
        """(tag, probability) of those above their thresholds (labels,), likeliest first; a name that the list has twice
        comes once."""
        weight = self.fc.weight
        logits = self(preprocess(image, self.size)[None].to(weight.device, weight.dtype))[0]
        found: dict[str, float] = {}
        for name, score, least in zip(names, logits.float().sigmoid().tolist(), thresholds.tolist(), strict=True):
            if score > least:
                found[name] = max(score, found.get(name, 0.0))
        return sorted(found.items(), key=lambda item: -item[1])


def preprocess(image: Image.Image, size: int = SIZE) -> Tensor:
    """RGB image -> (3, size, size), stretched to a square."""
    image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return normalize(pil_to_tensor(image).float() / 255, MEAN, STD)


def read_tags(tags: Path, thresholds: Path | None = None, threshold: float = 0.68) -> tuple[list[str], Tensor]:
    """(names, thresholds): the two text files of the header, one line a label. Without the second file all have
    `threshold`, the constructor's default of the released code. BadInput on a missing or wrong file."""
    names = _lines(tags)
    if thresholds is None:
        return names, torch.full((len(names),), threshold)
    try:
        values = [float(line) for line in _lines(thresholds)]
    except ValueError as error:
        raise BadInput(f"{thresholds}: {error}") from None
    if len(values) != len(names):
        raise BadInput(f"{thresholds}: {len(values)} thresholds for the {len(names)} tags of {tags}")
    return names, torch.tensor(values)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a readable text file of tags ({error}); published in {LISTS}") from None


def load_ram(path: Path | str, labels: int, device: torch.device | str = "cpu", **sizes) -> Ram:
    """RAM or RAM++, by the names in the file, for that many tags. BadInput naming what does not fit.

    sizes: other ones than those published, arguments of `Ram`.
    """
    def build(found: Tensors) -> Ram:
        rows = len(found["label_embed"])
        plus = "reweight_scale" in found
        if rows % labels or (rows != labels) != plus:
            raise BadInput(f"{path}: label_embed has {rows} rows, which does not fit {labels} tags")
        return Ram(labels, rows // labels, **sizes)

    return load_weights(build, path, PUBLISHED, partial(translated, names=NAMES, unused=UNUSED), device)
