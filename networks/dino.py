"""GroundingDINO: boxes around what a text names. AdaViP's second eye (arXiv 2504.15619, Eq. 6).

Liu et al. 2023, "Grounding DINO: Marrying DINO with Grounded Pre-Training for Open-Set Object Detection", arXiv
2303.05499. Deformable attention: Zhu et al. 2020, "Deformable DETR", arXiv 2010.04159.

    image   Swin -> maps at strides 8, 16, 32 and 64, 256 channels each, flattened one after another
    text    "dog. traffic light." -> BERT -> 256 channels; the tokens of a phrase see each other alone
    encoder six times: image and text attend to each other (fusion), text to its phrase, image to itself (deformable)
    start   the 900 image positions that fit some token best propose boxes; the queries themselves are learned
    decoder six times: queries attend to each other, to the text, to the image around their box, and refine the box
    score   sigmoid(query . token) for each of the 900 queries and each token

A tag's score is that of its best token, a query's tag the one of the best score.

Departures
- Released code tiles the text's attention masks in the wrong order when several captions form a batch, so that captions
  see through each other's masks. Here each has its own; a batch equals one at a time.
- Fusion scores are clamped at +-50,000 in released code against overflow in half precision; softmax needs no clamp.
- AdaViP names the model, not its settings: `threshold` is the released demo's box_threshold, `overlap` (of the boxes of
  one tag, above which the lesser one is dropped) is reconstructed.

Weights: groundingdino_swint_ogc.pth, groundingdino_swinb_cogcoor.pth, or in transformers' names; all sizes but the
numbers of heads are read off the tensors.

Shapes: B images, N positions of all levels, T text tokens, Q queries, D = 256, L levels, K points.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert
from torchvision.transforms.functional import normalize, pil_to_tensor

from common import BadInput
from data.tokenizer import load_tokenizer
from model.attention import mix
from model.clip import MLP
from networks import bert
from networks.layers import Attention, Head, centres
from networks.swin import Swin, SwinConfig
from networks.weights import Tensors, depth, fuse, load_weights, translated

PUBLISHED = ("groundingdino_swint_ogc.pth (0.7 GB) or groundingdino_swinb_cogcoor.pth (0.9 GB, both at github.com/"
             "IDEA-Research/GroundingDINO; huggingface.co/IDEA-Research/grounding-dino-*), which find boxes")
TOKENIZER = "tokenizer.json of huggingface.co/google-bert/bert-base-uncased (0.5 MB), with which GroundingDINO reads"
UNUSED = re.compile(r"^label_enc\.|position_ids$|^bert\.pooler\.|relative_position_index$|attn_mask$|swin\.layernorm\."
                    r"|^decoder\.bbox_embed\.|^bbox_embed\.[1-9]")  # the boxes' MLP is one, stored twelve times
NAMES = (  # as published -> as here
    (r"^transformer\.", ""), (r"^backbone\.0\.", "backbone."), (r"\.in_proj_", ".in_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."), (r"^bbox_embed\.0\.", "bbox_embed."),
)
PEER_NAMES = (  # of transformers -> as here
    (r"^model\.", ""), (r"^backbone\.conv_encoder\.model\.", "backbone."), (r"^text_backbone\.", "bert."),
    (r"^text_projection\.", "feat_map."), (r"^input_proj_vision\.", "input_proj."),
    (r"^query_position_embeddings\.", "tgt_embed."), (r"^encoder_output_bbox_embed\.", "enc_out_bbox_embed."),
    (r"^bbox_embed\.0\.", "bbox_embed."), (r"\.reference_points_head\.", ".ref_point_head."),
    # Swin
    (r"^(backbone\.)embeddings\.patch_embeddings\.projection\.", r"\1patch_embed.proj."),
    (r"^(backbone\.)embeddings\.norm\.", r"\1patch_embed.norm."), (r"^backbone\.encoder\.layers\.", "backbone.layers."),
    (r"(blocks\.\d+\.)attention\.self\.", r"\1attn."), (r"(blocks\.\d+\.)attention\.output\.dense\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."), (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"^backbone\.hidden_states_norms\.stage2\.", "backbone.norm1."),
    (r"^backbone\.hidden_states_norms\.stage3\.", "backbone.norm2."),
    (r"^backbone\.hidden_states_norms\.stage4\.", "backbone.norm3."),
    # the encoder's three kinds of layers
    (r"^encoder\.layers\.(\d+)\.fusion_layer\.", r"encoder.fusion_layers.\1."),
    (r"^encoder\.layers\.(\d+)\.text_enhancer_layer\.", r"encoder.text_layers.\1."),
    (r"^encoder\.layers\.(\d+)\.deformable_layer\.", r"encoder.layers.\1."),
    (r"\.vision_param$", ".gamma_v"), (r"\.text_param$", ".gamma_l"), (r"\.layer_norm_vision\.", ".layer_norm_v."),
    (r"\.layer_norm_text\.", ".layer_norm_l."), (r"vision_proj\.", "v_proj."), (r"text_proj\.", "l_proj."),
    (r"\.layer_?norm_before\.", ".norm1."), (r"\.layer_?norm_after\.", ".norm2."),
    (r"^(encoder\..*)\.self_attn_layer_norm\.", r"\1.norm1."), (r"^(encoder\..*)\.final_layer_norm\.", r"\1.norm2."),
    # the decoder's
    (r"\.encoder_attn_text_layer_norm\.", ".catext_norm."), (r"\.encoder_attn_text\.", ".ca_text."),
    (r"\.encoder_attn_layer_norm\.", ".norm1."), (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn_layer_norm\.", ".norm2."), (r"\.final_layer_norm\.", ".norm3."),
    (r"^decoder\.layer_norm\.", "decoder.norm."), (r"(?<!\.mlp)\.fc([12])\.", r".mlp.fc\1."),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POINTS = 4  # that a query samples, of each level and by each head
EDGE = 1e-3  # boxes are refined from places at least this far inside the image; transformers has 1e-5
SPECIAL = (101, 102, 1012, 1029)  # [CLS], [SEP], "." and "?": each ends a phrase
MOST_TOKENS = 256  # of a caption


# ------------------------------------------------------------------------------------------------------- positions


def sine(x: Tensor, channels: int, temperature: float) -> Tensor:
    """Angles (.., n) -> (.., n * channels): sine and cosine in turn, at falling frequencies."""
    frequency = temperature ** (-2 * (torch.arange(channels, device=x.device) // 2) / channels)  # (channels,)
    angles = 2 * math.pi * x[..., None] * frequency  # (.., n, channels)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(-3)


def image_positions(valid: Tensor, width: int) -> Tensor:
    """valid (B, H, W) bool -> (B, H * W, D): how far down and across among the valid pixels."""
    down, across = valid.cumsum(1).float(), valid.cumsum(2).float()
    down, across = down / (down[:, -1:] + 1e-6), across / (across[:, :, -1:] + 1e-6)
    return sine(torch.stack([down, across], -1), width // 2, 20).flatten(1, 2)


def phrases(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Token ids (T,), `length` of them no padding -> who sees whom (T, T) bool, and the position of each token in its
    phrase (T,).

    A phrase ends with a special token. [CLS], the last [SEP] and padding see themselves only.
    """
    visible, positions = torch.eye(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.long)
    begin = 0
    for end in (i for i, token in enumerate(ids.tolist()) if token in SPECIAL):
        if 0 < end < length - 1:
            visible[begin : end + 1, begin : end + 1] = True
            positions[begin : end + 1] = torch.arange(end + 1 - begin)
        begin = end + 1
    return visible, positions


# ---------------------------------------------------------------------------------------------------------- layers


class DeformableAttention(nn.Module):
    """Each query looks at K points of each level near its place, and nowhere else."""

    def __init__(self, width: int, heads: int, levels: int):
        super().__init__()
        self.heads, self.levels = heads, levels
        self.sampling_offsets = nn.Linear(width, heads * levels * POINTS * 2)
        self.attention_weights = nn.Linear(width, heads * levels * POINTS)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, image: Tensor, places: Tensor, shapes: list[tuple[int, int]], valid: Tensor,
                ) -> Tensor:
        """query (B, Q, D), image (B, N, D), valid (B, N) bool; places (B, Q, L, 2), a point in each level, or
        (B, Q, L, 4), a box around which to look -> (B, Q, D)."""
        B, Q, _ = query.shape
        values = self.value_proj(image).masked_fill(~valid[..., None], 0).unflatten(-1, (self.heads, -1))
        shape = (self.heads, self.levels, POINTS)
        weights = self.attention_weights(query).unflatten(-1, (self.heads, -1)).softmax(-1)  # (B, Q, heads, L K)
        offsets = self.sampling_offsets(query).unflatten(-1, (*shape, 2))  # (B, Q, heads, L, K, 2)
        places = places[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if places.shape[-1] == 2:
            sizes = torch.tensor([(w, h) for h, w in shapes], device=query.device)  # (L, 2)
            points = places + offsets / sizes[:, None]
        else:
            points = places[..., :2] + offsets / POINTS * places[..., 2:] / 2
        # In fp32: positions of a large map are finer than bf16.
        grids = (2 * points.float() - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B heads, Q, K, 2)
        seen = []
        for grid, (h, w), level in zip(grids, shapes, values.split([h * w for h, w in shapes], 1)):
            level = level.permute(0, 2, 3, 1).reshape(B * self.heads, -1, h, w).float()  # (B heads, d, h, w)
            seen.append(F.grid_sample(level, grid, align_corners=False))  # (B heads, d, Q, K), zeros outside
        weights = weights.transpose(1, 2).reshape(B * self.heads, 1, Q, -1)
        mixed = (torch.cat(seen, -1) * weights).sum(-1)  # (B heads, d, Q)
        return self.output_proj(mixed.unflatten(0, (B, -1)).permute(0, 3, 1, 2).flatten(2).to(query.dtype))


class Fusion(nn.Module):
    """Image and text attend to each other. What goes on is the normalised input, not the input itself."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.gamma_v, self.gamma_l = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.layer_norm_v, self.layer_norm_l = nn.LayerNorm(width), nn.LayerNorm(width)
        into, out = ("v", "l", "values_v", "values_l"), ("out_v", "out_l")
        self.attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, inner) for name in into}
                                  | {f"{name}_proj": nn.Linear(inner, width) for name in out})

    def forward(self, image: Tensor, text: Tensor, valid: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, N, D), text (B, T, D), valid (B, N) and words (B, T) bool, False at padding."""
        image, text = self.layer_norm_v(image), self.layer_norm_l(text)
        given = {"v": image, "l": text, "values_v": image, "values_l": text}
        v, t, values_v, values_t = (self.attn[f"{name}_proj"](x).unflatten(-1, (self.heads, -1))
                                    for name, x in given.items())  # (B, N or T, heads, d)
        to_image = mix(v, t, values_t, mask=words[:, None, None]).flatten(2)
        to_text = mix(t, v, values_v, mask=valid[:, None, None]).flatten(2)
        image = image + self.gamma_v * self.attn["out_v_proj"](to_image)
        return image, text + self.gamma_l * self.attn["out_l_proj"](to_text)


class EncoderLayer(nn.Module):
    """Attention, of text to its phrases or of the image to its surroundings, then an MLP; post-norm."""

    def __init__(self, attention: nn.Module, width: int, hidden: int):
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(width, hidden, "relu")
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, *inputs) -> Tensor:
        """x (B, T or N, D) and the inputs of its attention."""
        x = self.norm1(x + self.self_attn(*inputs))
        return self.norm2(x + self.mlp(x))


class QueryLayer(nn.Module):
    """Queries attend to each other, to the text, and to the image around their boxes; post-norm."""

    def __init__(self, width: int, heads: int, levels: int, hidden: int):
        super().__init__()
        self.self_attn, self.ca_text = Attention(width, heads), Attention(width, heads)
        self.cross_attn = DeformableAttention(width, heads, levels)
        self.mlp = MLP(width, hidden, "relu")
        self.norm1, self.norm2, self.norm3, self.catext_norm = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, x: Tensor, places: Tensor, text: Tensor, words: Tensor, image: Tensor, boxes: Tensor,
                shapes: list, valid: Tensor) -> Tensor:
        """x and places (B, Q, D), boxes (B, Q, L, 4)."""
        placed = x + places
        x = self.norm2(x + self.self_attn(placed, placed, x))
        x = self.catext_norm(x + self.ca_text(x + places, text, text, words[:, None]))
        x = self.norm1(x + self.cross_attn(x + places, image, boxes, shapes, valid))
        return self.norm3(x + self.mlp(x))


# --------------------------------------------------------------------------------------------------------- network


class Dino(nn.Module):
    """Image and caption -> boxes and scores.

    Args:
        width: D. heads: of the decoder, twice those of fusion and text. hidden: of the image's and the queries' MLPs.
        fusion: inner width of the fusion. text_hidden: of the text layers' MLPs.
    """

    tokenizer: Tokenizer  # of bert-base-uncased, set by `load_dino`

    def __init__(self, swin: SwinConfig, text: bert.BertConfig, *, width: int = 256, heads: int = 8, hidden: int = 2048,
                 fusion: int = 1024, text_hidden: int = 1024, encoder: int = 6, decoder: int = 6, queries: int = 900):
        super().__init__()
        widths = [swin.width * 2**i for i in (1, 2, 3)]
        levels = len(widths) + 1
        self.backbone = Swin(swin)
        self.input_proj = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(w, width, 1), nn.GroupNorm(32, width)) for w in widths]
            + [nn.Sequential(nn.Conv2d(widths[-1], width, 3, 2, 1), nn.GroupNorm(32, width))])
        self.level_embed = nn.Parameter(torch.zeros(levels, width))
        self.bert, self.feat_map = bert.Bert(text), nn.Linear(text.hidden_size, width)
        self.encoder = nn.ModuleDict({
            "fusion_layers": nn.ModuleList(Fusion(width, fusion, heads // 2) for _ in range(encoder)),
            "text_layers": nn.ModuleList(
                EncoderLayer(Attention(width, heads // 2), width, text_hidden) for _ in range(encoder)),
            "layers": nn.ModuleList(
                EncoderLayer(DeformableAttention(width, heads, levels), width, hidden) for _ in range(encoder))})
        self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.enc_out_bbox_embed, self.bbox_embed = (Head(width, width, width, 4) for _ in range(2))
        self.tgt_embed = nn.Embedding(queries, width)
        self.decoder = nn.ModuleDict({
            "layers": nn.ModuleList(QueryLayer(width, heads, levels, hidden) for _ in range(decoder)),
            "norm": nn.LayerNorm(width), "ref_point_head": Head(2 * width, width, width)})

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """pixels (B, 3, H, W) -> one map a level, (B, D, h, w). They depend on no text."""
        found = [x.permute(0, 3, 1, 2) for x in self.backbone(pixels)]
        return [project(x) for project, x in zip(self.input_proj, [*found, found[-1]])]

    def forward(self, maps: list[Tensor], inside: Tensor, ids: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes and scores.

        Args:
            maps: of `maps`.
            inside: (B, H, W) bool, False at pixels that only pad an image.
            ids, words: (B, T) token ids of the captions and which of them are no padding.
        Returns: logits (B, Q, T), -inf at padding; boxes (B, Q, 4), centre and size, in shares of the padded image.
        """
        shapes = [tuple(x.shape[-2:]) for x in maps]
        masks = [F.interpolate(inside[:, None].float(), shape)[:, 0].bool() for shape in shapes]
        valid = torch.cat([m.flatten(1) for m in masks], 1)  # (B, N)
        ratios = torch.stack([torch.stack([m[:, 0].float().mean(1), m[:, :, 0].float().mean(1)], -1) for m in masks], 1)
        image = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, N, D)
        width = image.shape[-1]
        places = torch.cat([image_positions(m, width).to(image) + e for m, e in zip(masks, self.level_embed)], 1)
        points = [centres(*m.shape[1:], m.device) / ratios[:, None, i] for i, m in enumerate(masks)]
        points = torch.cat(points, 1)[:, :, None] * ratios[:, None]  # (B, N, L, 2), a point of each level
        image, text = self.encode(image, places, points, shapes, valid, ids, words)
        states, boxes = self.propose(image, text, masks, words)
        for layer in self.decoder["layers"]:
            seen = boxes[:, :, None] * ratios.repeat(1, 1, 2)[:, None]  # (B, Q, L, 4)
            centre_last = seen[:, :, 0, [1, 0, 2, 3]]  # y, x, w, h
            query_places = self.decoder["ref_point_head"](sine(centre_last, width // 2, 10_000).to(image))
            states = layer(states, query_places, text, words, image, seen, shapes, valid)
            before, boxes = boxes, (self.bbox_embed(states).float() + torch.logit(boxes, EDGE)).sigmoid()
        states = self.decoder["norm"](states)
        # The boxes of the last layer: from its normalised states and the boxes before it.
        boxes = (self.bbox_embed(states).float() + torch.logit(before, EDGE)).sigmoid()
        logits = (states @ text.transpose(1, 2)).float()  # (B, Q, T)
        return logits.masked_fill(~words[:, None], float("-inf")), boxes

    def encode(self, image: Tensor, places: Tensor, points: Tensor, shapes: list, valid: Tensor, ids: Tensor,
               words: Tensor) -> tuple[Tensor, Tensor]:
        """Image (B, N, D) and text (B, T, D), each having read the other."""
        blocks = [phrases(row, n) for row, n in zip(ids.cpu(), words.sum(1).tolist())]
        visible, positions = (torch.stack(x).to(ids.device) for x in zip(*blocks))
        text = self.feat_map(self.bert(ids, visible, positions))
        text_places = sine(positions[..., None].float(), text.shape[-1], 10_000).to(text)
        for fuse_both, read, look in zip(*(self.encoder[name] for name in ("fusion_layers", "text_layers", "layers"))):
            image, text = fuse_both(image, text, valid, words)
            placed = text + text_places
            text = read(text, placed, placed, text, visible)
            image = look(image, image + places, image, points, shapes, valid)
        return image, text

    def propose(self, image: Tensor, text: Tensor, masks: list[Tensor], words: Tensor) -> tuple[Tensor, Tensor]:
        """The learned queries (B, Q, D) and the boxes (B, Q, 4) that the image's best positions give them."""
        proposals = []
        for level, mask in enumerate(masks):
            height, width = mask[:, :, 0].sum(1), mask[:, 0].sum(1)  # (B,)
            full = torch.tensor([mask.shape[2], mask.shape[1]], device=mask.device)
            middle = centres(*mask.shape[1:], mask.device) * full / torch.stack([width, height], -1)[:, None]
            proposals.append(torch.cat([middle, torch.full_like(middle, 0.05 * 2**level)], -1))
        proposals = torch.cat(proposals, 1)  # (B, N, 4)
        usable = ((proposals > 0.01) & (proposals < 0.99)).all(-1)  # padding lies beyond 1
        proposals = torch.logit(proposals).masked_fill(~usable[..., None], float("inf"))
        states = self.enc_output_norm(self.enc_output(image.masked_fill(~usable[..., None], 0)))
        scores = (states @ text.transpose(1, 2)).masked_fill(~words[:, None], float("-inf")).amax(-1)  # (B, N)
        best = scores.topk(min(len(self.tgt_embed.weight), scores.shape[1]), 1).indices[..., None]  # (B, Q, 1)
        boxes = self.enc_out_bbox_embed(states.gather(1, best.expand(-1, -1, states.shape[-1]))).float()
        boxes = (boxes + proposals.gather(1, best.expand(-1, -1, 4))).sigmoid()
        return self.tgt_embed.weight[: boxes.shape[1]].expand(len(image), -1, -1), boxes

    @torch.no_grad()
    def boxes(self, image: Image.Image, tags: list[str], *, threshold: float = 0.35, overlap: float = 0.7,
              ) -> list[tuple[str, float, tuple[float, float, float, float]]]:
        """(tag, score, (left, top, right, bottom) in pixels), best first.

        Args:
            threshold: least score of a box.
            overlap: reconstructed: boxes of one tag that share more (intersection over union) count as one.
        """
        pixels = preprocess(image)[None].to(self.feat_map.weight)
        device, maps, found = pixels.device, self.maps(pixels), []
        inside = torch.ones(1, *pixels.shape[-2:], dtype=torch.bool, device=device)
        for ids, spans in captions(tags, self.tokenizer):
            row = torch.tensor([ids], device=device)
            logits, boxes = self(maps, inside, row, torch.ones_like(row, dtype=torch.bool))
            scores = torch.stack([logits[0, :, a:b].amax(-1) for _, (a, b) in spans], -1).sigmoid()  # (Q, tags)
            best, which = scores.max(-1)
            for i in (best > threshold).nonzero()[:, 0].tolist():
                found.append((spans[which[i]][0], best[i].item(), boxes[0, i].cpu()))
        if not found:
            return []
        corners = box_convert(torch.stack([box for *_, box in found]), "cxcywh", "xyxy").clamp(0, 1)
        corners = corners * torch.tensor([image.width, image.height] * 2)
        labels = torch.tensor([tags.index(tag) for tag, *_ in found])
        kept = batched_nms(corners, torch.tensor([score for _, score, _ in found]), labels, overlap)
        return [(found[i][0], found[i][1], tuple(corners[i].tolist())) for i in kept.tolist()]


def captions(tags: list[str], tokenizer: Tokenizer) -> list[tuple[list[int], list[tuple[str, tuple[int, int]]]]]:
    """Tags -> captions "dog. traffic light." of at most MOST_TOKENS tokens: (ids, [(tag, its first and end token)])."""
    start, end, stop = SPECIAL[:3]
    result: list = []
    for tag in dict.fromkeys(tags):
        words = tokenizer.encode(tag.lower().strip(), add_special_tokens=False).ids
        if not words or len(words) + 3 > MOST_TOKENS:
            raise BadInput(f"the tag {tag!r:.60} has {len(words)} tokens, wanted are 1 to {MOST_TOKENS - 3}")
        if not result or len(result[-1][0]) + len(words) + 2 > MOST_TOKENS:
            result.append(([start], []))
        ids, spans = result[-1]
        spans.append((tag, (len(ids), len(ids) + len(words))))
        ids += [*words, stop]
    return [([*ids, end], spans) for ids, spans in result]


def preprocess(image: Image.Image, shortest: int = 800, longest: int = 1333) -> Tensor:
    """RGB image -> (3, H, W): the shorter side `shortest` pixels, unless the longer one would exceed `longest`."""
    low, high = min(image.size), max(image.size)
    if high / low * shortest > longest:
        shortest = round(longest * low / high)
    size = [int(shortest * side / low) for side in image.size]
    pixels = pil_to_tensor(image.convert("RGB").resize(size, Image.Resampling.BILINEAR)).float() / 255
    return normalize(pixels, MEAN, STD)


# ---------------------------------------------------------------------------------------------------------- loading


def convert(tensors: Tensors) -> Tensors:
    """As published or in transformers' names -> as here."""
    names = NAMES if any(name.endswith("feat_map.weight") for name in tensors) else PEER_NAMES
    found = fuse(translated(tensors, (*names, *bert.NAMES), UNUSED),
                 (".attn.query.", ".attn.key.", ".attn.value."), ".attn.qkv.")  # Swin's
    return fuse(found, (".query.", ".key.", ".value."), ".in_proj.")


def build(found: Tensors, heads: int = 8, bert_heads: int = 12) -> Dino:
    """The network of the tensors' sizes."""
    table = "backbone.layers.{}.blocks.0.attn.relative_position_bias_table"
    stages = range(depth(found, "backbone.layers."))
    window = (math.isqrt(len(found[table.format(0)])) + 1) // 2
    swin = SwinConfig(len(found["backbone.patch_embed.proj.weight"]),
                      tuple(depth(found, f"backbone.layers.{i}.blocks.") for i in stages),
                      tuple(found[table.format(i)].shape[1] for i in stages), window)
    words = found["bert.embeddings.word_embeddings.weight"]
    text = bert.BertConfig(
        vocab_size=len(words), hidden_size=words.shape[1], num_hidden_layers=depth(found, "bert.encoder.layer."),
        num_attention_heads=bert_heads, intermediate_size=len(found["bert.encoder.layer.0.intermediate.dense.weight"]),
        max_position_embeddings=len(found["bert.embeddings.position_embeddings.weight"]))
    return Dino(swin, text, width=len(found["feat_map.weight"]), heads=heads,
                hidden=len(found["encoder.layers.0.mlp.fc1.weight"]),
                fusion=len(found["encoder.fusion_layers.0.attn.v_proj.weight"]),
                text_hidden=len(found["encoder.text_layers.0.mlp.fc1.weight"]),
                encoder=depth(found, "encoder.layers."), decoder=depth(found, "decoder.layers."),
                queries=len(found["tgt_embed.weight"]))


def load_dino(path: Path | str, tokenizer: Path | str, device: torch.device | str = "cpu", **heads: int) -> Dino:
    """GroundingDINO with either Swin. BadInput naming what does not fit.

    Args:
        tokenizer: tokenizer.json of bert-base-uncased.
        heads: other numbers than those published, arguments of `build`.
    """
    words = load_tokenizer(Path(tokenizer))
    model = load_weights(lambda found: build(found, **heads), path, PUBLISHED, convert, device)
    model.tokenizer = words
    return model
