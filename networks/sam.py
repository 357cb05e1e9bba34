"""Segment Anything: the mask of the object in a box. AdaViP's third eye (arXiv 2504.15619, Eq. 7).

Kirillov et al. 2023, "Segment Anything", arXiv 2304.02643. An image goes through a ViT once; then every box costs two
small transformer layers.

    image encoder   ViT on 1024 x 1024 pixels, attention in windows of 14 and over all 64 x 64 positions in four blocks;
                    score(q, k) = q k / sqrt(d) + q R_h[y_q - y_k] + q R_w[x_q - x_k]
    box             two corners, gamma(p) = [sin 2 pi G (2 p - 1), cos 2 pi G (2 p - 1)] + an embedding of the corner
    mask decoder    tokens (quality, masks, corners) and image attend to each other; a mask is the product of the image,
                    four times enlarged, with what a small MLP makes of its token

The scores are linear in q: with one-hot rows E_y, E_x of a key's position they are the ordinary product of
[q / sqrt(d), q R_h, q R_w] and [k, E_y, E_x], so no (4096, 4096) bias is ever made.

Released code can prompt with points and masks, too; here a prompt is a box, for which it takes the first mask
(multimask_output=False). What only points and masks need is passed over.

Weights: as published (sam_vit_b_01ec64.pth, ...) or in transformers' names; all sizes are read off the tensors.

Shapes: B images, S x S positions, C width of the encoder, D of the decoder (256), n boxes.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, pil_to_tensor

from model.clip import MLP
from networks.layers import Attention, Head, centres
from networks.swin import from_windows, pad_to, to_windows
from networks.weights import Tensors, depth, fuse, load_weights, translated

PUBLISHED = ("sam_vit_b_01ec64.pth (0.4 GB), sam_vit_l_0b3195.pth (1.2 GB) or sam_vit_h_4b8939.pth (2.6 GB,"
             " github.com/facebookresearch/segment-anything; huggingface.co/facebook/sam-vit-*), which cut objects out")
UNUSED = re.compile(r"prompt_encoder\.(mask_|not_a_point|point_embed\w*\.[01]\.|shared_embedding)")
PEER_NAMES = (  # of transformers -> as published
    (r"^vision_encoder\.", "image_encoder."), (r"^image_encoder\.layers\.", "image_encoder.blocks."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."), (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."), (r"\.neck\.conv2\.", ".neck.2."), (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"\.layer_norm(\d)\.", r".norm\1."), (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."), (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."), (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.layers.1."), (r"\.proj_in\.", ".layers.0."),
    (r"\.proj_out\.", ".layers.2."),
)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HEADS = 8  # of the mask decoder


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------- image encoder


class ImageAttention(nn.Module):
    """Attention among the positions of a window with relative positions: (N, S, S, C) -> the same."""

    def __init__(self, width: int, side: int, head_dim: int):
        super().__init__()
        self.side, self.head_dim = side, head_dim
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        S = self.side
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(3, 0, 4, 1, 2, 5)  # (N, heads, S, S, d)
        place = torch.arange(S, device=x.device)
        distance = place[:, None] - place + S - 1  # (S, S), query minus key
        down = torch.einsum("nhyxd,ykd->nhyxk", q, self.rel_pos_h[distance])  # (N, heads, S, S, S), q unscaled
        across = torch.einsum("nhyxd,xkd->nhyxk", q, self.rel_pos_w[distance])
        one_hot = torch.eye(S, device=x.device, dtype=q.dtype)
        rows, columns = one_hot[:, None].expand(S, S, S), one_hot[None].expand(S, S, S)  # of key (y, x): E_y, E_x
        where = torch.cat([rows, columns], -1).expand(*k.shape[:4], -1)  # (N, heads, S, S, 2 S)
        q = torch.cat([q / math.sqrt(self.head_dim), down, across], -1).flatten(2, 3)  # (N, heads, S * S, d + 2 S)
        k, v = torch.cat([k, where], -1).flatten(2, 3), v.flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, scale=1.0)  # (N, heads, S * S, d)
        return self.proj(y.transpose(1, 2).flatten(2).unflatten(1, (S, S)))


class ImageBlock(nn.Module):
    """(B, S, S, C) -> the same. Windows are padded after the norm, and padding takes part as it did in training."""

    def __init__(self, width: int, window: int, head_dim: int, hidden: int):
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = ImageAttention(width, window, head_dim)
        self.mlp = MLP(width, hidden, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        (_, S, _, _), w = x.shape, self.window
        padded = pad_to(self.norm1(x), w)
        windows = to_windows(padded, w)  # (B, n, w * w, C); one window where it is global
        y = self.attn(windows.flatten(0, 1).unflatten(1, (w, w)))
        y = from_windows(y.flatten(1, 2).unflatten(0, windows.shape[:2]), *padded.shape[1:3], w)
        x = x + y[:, :S, :S]
        return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """Pixels (B, 3, size, size) -> (B, D, S, S)."""

    def __init__(self, width: int, windows: list[int], side: int, patch: int, head_dim: int, hidden: int, out: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width))
        self.blocks = nn.ModuleList(ImageBlock(width, window, head_dim, hidden) for window in windows)
        self.neck = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), LayerNorm2d(out, eps=1e-6),
                                  nn.Conv2d(out, out, 3, padding=1, bias=False), LayerNorm2d(out, eps=1e-6))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed["proj"](pixels).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------ prompt and mask decoder


class PromptEncoder(nn.Module):
    """Boxes -> two tokens each; positions of the image."""

    def __init__(self, width: int):
        super().__init__()
        self.pe_layer = nn.ParameterDict({"positional_encoding_gaussian_matrix": torch.zeros(2, width // 2)})
        self.point_embeddings = nn.ModuleDict({name: nn.Embedding(1, width) for name in "23"})
        self.no_mask_embed = nn.Embedding(1, width)

    def positions(self, points: Tensor) -> Tensor:
        """(.., 2), x and y in 0..1 -> gamma, (.., D)."""
        angles = 2 * math.pi * (2 * points - 1) @ self.pe_layer["positional_encoding_gaussian_matrix"]
        return torch.cat([angles.sin(), angles.cos()], -1)

    def boxes(self, boxes: Tensor, size: int) -> Tensor:
        """(n, 4), pixels of the resized image -> (n, 2, D). A pixel's centre is half a pixel further."""
        corners = (boxes.unflatten(1, (2, 2)) + 0.5) / size  # (n, 2, 2)
        kinds = torch.cat([self.point_embeddings[name].weight for name in "23"])  # (2, D)
        return self.positions(corners.to(kinds)) + kinds

    def grid(self, side: int) -> Tensor:
        """Of the image's positions, (side * side, D)."""
        matrix = self.pe_layer["positional_encoding_gaussian_matrix"]
        return self.positions(centres(side, side, matrix.device).to(matrix)[0])


class TwoWayLayer(nn.Module):
    """Tokens and image attend to each other. The first layer's self-attention replaces the tokens, without places."""

    def __init__(self, width: int, hidden: int, inner: int, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, HEADS)
        self.cross_attn_token_to_image, self.cross_attn_image_to_token = (
            Attention(width, HEADS, inner) for _ in range(2))
        self.mlp = MLP(width, hidden, "relu")
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, image: Tensor, token_places: Tensor, image_places: Tensor,
                ) -> tuple[Tensor, Tensor]:
        """tokens and their places (n, T, D), image (n, S * S, D) and its places (S * S, D)."""
        if self.first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            placed = tokens + token_places
            tokens = self.norm1(tokens + self.self_attn(placed, placed, tokens))
        seen = self.cross_attn_token_to_image(tokens + token_places, image + image_places, image)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        seen = self.cross_attn_image_to_token(image + image_places, tokens + token_places, tokens)
        return tokens, self.norm4(image + seen)


class MaskDecoder(nn.Module):
    """Image (1, D, S, S), places and box tokens (n, 2, D) -> masks (n, 4 S, 4 S) as logits, their quality (n,)."""

    def __init__(self, width: int, hidden: int, inner: int, layers: int, quality_hidden: int, masks: int = 4):
        super().__init__()
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(masks, width)
        self.transformer = nn.ModuleDict({
            "layers": nn.ModuleList(TwoWayLayer(width, hidden, inner, i == 0) for i in range(layers)),
            "final_attn_token_to_image": Attention(width, HEADS, inner), "norm_final_attn": nn.LayerNorm(width)})
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2), LayerNorm2d(width // 4, eps=1e-6), nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2), nn.GELU())
        self.output_hypernetworks_mlps = nn.ModuleList(Head(width, width, width, width // 8) for _ in range(masks))
        self.iou_prediction_head = Head(width, quality_hidden, quality_hidden, masks)

    def forward(self, image: Tensor, places: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        n, side = len(boxes), image.shape[-1]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # (1 + masks, D)
        tokens = given = torch.cat([own.expand(n, -1, -1), boxes], 1)  # (n, T, D); as they come in, also their places
        image = image.flatten(2).transpose(1, 2).expand(n, -1, -1)  # (n, S * S, D)
        for layer in self.transformer.layers:
            tokens, image = layer(tokens, image, given, places)
        seen = self.transformer.final_attn_token_to_image(tokens + given, image + places, image)
        tokens = self.transformer.norm_final_attn(tokens + seen)
        large = self.output_upscaling(image.transpose(1, 2).unflatten(2, (side, side)))  # (n, D / 8, 4 S, 4 S)
        kernel = self.output_hypernetworks_mlps[0](tokens[:, 1])  # (n, D / 8): the first mask is that of one object
        return torch.einsum("nc,nchw->nhw", kernel, large), self.iou_prediction_head(tokens[:, 0])[:, 0]


class Sam(nn.Module):
    """Image encoder, prompt encoder and mask decoder; sizes as read off the tensors (`load_sam`)."""

    def __init__(self, encoder: dict, decoder: dict):
        super().__init__()
        self.image_encoder = ImageEncoder(**encoder)
        self.prompt_encoder = PromptEncoder(encoder["out"])
        self.mask_decoder = MaskDecoder(encoder["out"], **decoder)
        self.side, self.size = encoder["side"], encoder["side"] * encoder["patch"]

    def forward(self, pixels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (1, 3, size, size), boxes (n, 4) in them -> mask logits (n, 4 S, 4 S), predicted IoU (n,)."""
        image = self.image_encoder(pixels) + self.prompt_encoder.no_mask_embed.weight[..., None, None]
        places = self.prompt_encoder.grid(self.side)
        masks, quality = zip(*(self.mask_decoder(image, places, self.prompt_encoder.boxes(part, self.size))
                               for part in boxes.split(32)))
        return torch.cat(masks), torch.cat(quality)

    @torch.no_grad()
    def masks(self, image: Image.Image, boxes: Tensor) -> Tensor:
        """RGB image and boxes (n, 4), n > 0, left, top, right, bottom in its pixels -> (n, H, W) bool."""
        weight = self.image_encoder.pos_embed
        pixels, (height, width) = preprocess(image, self.size)
        scale = torch.tensor([width / image.width, height / image.height] * 2)
        logits, _ = self(pixels[None].to(weight), (boxes * scale).to(weight.device))
        logits = F.interpolate(logits[:, None].float(), (self.size, self.size), mode="bilinear")[..., :height, :width]
        logits = F.interpolate(logits, (image.height, image.width), mode="bilinear")
        return (logits[:, 0] > 0).cpu()


def preprocess(image: Image.Image, size: int = 1024) -> tuple[Tensor, tuple[int, int]]:
    """RGB image -> (3, size, size), its longer side resized to `size`, zeros below or on the right; (height, width) of
    what is not padding."""
    scale = size / max(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    pixels = pil_to_tensor(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)).float()
    return F.pad(normalize(pixels, MEAN, STD), (0, size - width, 0, size - height)), (height, width)


def convert(tensors: Tensors) -> Tensors:
    """As published or in transformers' names -> as here."""
    names = PEER_NAMES if "shared_image_embedding.positional_embedding" in tensors else ()
    found = translated(tensors, (*names, (r"\.lin([12])\.", r".fc\1.")), UNUSED)
    return fuse(found, (".q_proj.", ".k_proj.", ".v_proj."), ".in_proj.")


def sizes(found: Tensors) -> tuple[dict, dict]:
    """Arguments of `ImageEncoder` and `MaskDecoder`, off the tensors."""
    places, patch = found["image_encoder.pos_embed"], found["image_encoder.patch_embed.proj.weight"]
    blocks = range(depth(found, "image_encoder.blocks."))
    tables = [found[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in blocks]
    encoder = dict(width=places.shape[-1], windows=[(len(table) + 1) // 2 for table in tables], side=places.shape[1],
                   patch=patch.shape[-1], head_dim=tables[0].shape[1], out=len(found["image_encoder.neck.0.weight"]),
                   hidden=len(found["image_encoder.blocks.0.mlp.fc1.weight"]))
    inside = "mask_decoder.transformer."
    decoder = dict(hidden=len(found[f"{inside}layers.0.mlp.fc1.weight"]), layers=depth(found, f"{inside}layers."),
                   inner=found[f"{inside}final_attn_token_to_image.out_proj.weight"].shape[1],
                   quality_hidden=len(found["mask_decoder.iou_prediction_head.layers.0.weight"]))
    return encoder, decoder


def load_sam(path: Path | str, device: torch.device | str = "cpu") -> Sam:
    """SAM of any size. BadInput naming what does not fit."""
    return load_weights(lambda found: Sam(*sizes(found)), path, PUBLISHED, convert, device)
