"""networks/sam.py against transformers, on small random weights."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common import BadInput
from networks import sam

ENCODER = dict(width=32, windows=[3, 8, 3], side=8, patch=4, head_dim=8, out=32, hidden=48)
DECODER = dict(hidden=40, inner=16, layers=2, quality_hidden=24)


def build() -> sam.Sam:
    torch.manual_seed(0)
    model = sam.Sam(ENCODER, DECODER).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.2)
        if "norm" in name and name.endswith("weight") or ".neck.1.weight" in name or ".neck.3.weight" in name:
            p.data += 1
    return model


def published(model: sam.Sam) -> dict[str, torch.Tensor]:
    """Its tensors as they are published: query, key and value of the decoder apart, other names in the MLPs."""
    state = {name.replace(".mlp.fc", ".mlp.lin"): tensor for name, tensor in model.state_dict().items()}
    parts = {name.replace(".in_proj.", f".{part}_proj."): rows for name, tensor in state.items() if ".in_proj." in name
             for part, rows in zip("qkv", tensor.chunk(3))}
    return {name: tensor for name, tensor in state.items() if ".in_proj." not in name} | parts


def to_peer(name: str) -> str:
    """As published -> names of transformers."""
    import re

    for pattern, replacement in (
        (r"^image_encoder\.", "vision_encoder."), (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
        (r"\.patch_embed\.proj\.", ".patch_embed.projection."), (r"\.neck\.0\.", ".neck.conv1."),
        (r"\.neck\.1\.", ".neck.layer_norm1."), (r"\.neck\.2\.", ".neck.conv2."), (r"\.neck\.3\.", ".neck.layer_norm2."),
        (r"\.norm(\d)\.", r".layer_norm\1."), (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
        (r"^prompt_encoder\.pe_layer\.\w+$", "shared_image_embedding.positional_embedding"),
        (r"\.point_embeddings\.", ".point_embed."), (r"\.output_upscaling\.0\.", ".upscale_conv1."),
        (r"\.output_upscaling\.1\.", ".upscale_layer_norm."), (r"\.output_upscaling\.3\.", ".upscale_conv2."),
        (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.proj_in."),
        (r"(mlps\.\d|prediction_head)\.layers\.1\.", r"\1.layers.0."),
        (r"(mlps\.\d|prediction_head)\.layers\.2\.", r"\1.proj_out."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture
def peer(tmp_path):
    """(transformers' model with our weights, the file it saves)."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config=dict(hidden_size=32, output_channels=32, num_hidden_layers=3, num_attention_heads=4, image_size=32,
                           patch_size=4, mlp_dim=48, window_size=3, global_attn_indexes=[1], num_pos_feats=16),
        prompt_encoder_config=dict(hidden_size=32, image_size=32, patch_size=4, mask_input_channels=16),
        mask_decoder_config=dict(hidden_size=32, mlp_dim=40, num_attention_heads=8, iou_head_hidden_dim=24,
                                 layer_norm_eps=1e-5))
    torch.manual_seed(3)
    model = transformers.SamModel(config).eval()
    state = {to_peer(name): tensor for name, tensor in published(build()).items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(sam.UNUSED.search(key) for key in result.missing_keys), result.missing_keys
    model.prompt_encoder.shared_embedding = model.shared_image_embedding
    model.save_pretrained(tmp_path)
    return model, tmp_path / "model.safetensors"


def test_it_equals_transformers(peer):
    theirs, path = peer
    pixels, boxes = torch.randn(1, 3, 32, 32), torch.tensor([[3.0, 4, 20, 30], [0, 0, 31, 9], [10, 11, 12, 13]])
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels, input_boxes=boxes[None], multimask_output=False)
        for ours in (build(), sam.load_sam(path)):
            masks, quality = ours(pixels, boxes)
            torch.testing.assert_close(masks, wanted.pred_masks[0, :, 0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(quality, wanted.iou_scores[0, :, 0], atol=1e-5, rtol=1e-5)


def test_published_files_are_read(tmp_path):
    model, path = build(), tmp_path / "sam.pth"
    more = {"prompt_encoder.not_a_point_embed.weight": torch.zeros(1, 32),
            "prompt_encoder.point_embeddings.0.weight": torch.zeros(1, 32),
            "prompt_encoder.mask_downscaling.0.weight": torch.zeros(4, 1, 2, 2)}
    torch.save({**published(model), **more}, path)
    loaded, pixels, boxes = sam.load_sam(path), torch.randn(1, 3, 32, 32), torch.tensor([[3.0, 4, 20, 30]])
    assert all(map(torch.equal, loaded(pixels, boxes), model(pixels, boxes)))


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(BadInput, match=r"not found; wanted is sam_vit_b_01ec64\.pth \(0\.4 GB\)"):
        sam.load_sam(tmp_path / "sam.pth")
    state = published(build())
    state["mask_decoder.iou_token.weight"] = torch.zeros(2, 32)
    del state["image_encoder.neck.2.weight"]
    save_file({name: t.contiguous() for name, t in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match=r"missing tensor image_encoder\.neck\.2\.weight; tensor mask_decoder\.iou_token"):
        sam.load_sam(tmp_path / "a.safetensors")


def test_other_files_are_refused_by_name(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match=r"other\.safetensors: no tensor image_encoder\.pos_embed; wanted is sam_vit_b"):
        sam.load_sam(tmp_path / "other.safetensors")


def test_masks_have_the_images_size():
    """Boxes are scaled as the image is, its padding is cut off, and many boxes equal one at a time."""
    model = build()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8))
    boxes = torch.tensor([[5.0, 5, 60, 30], [1, 2, 9, 39]]).repeat(20, 1)
    masks = model.masks(image, boxes)
    assert masks.shape == (40, 40, 70) and masks.dtype == torch.bool and torch.equal(masks[:2], masks[38:])
    assert torch.equal(model.masks(image, boxes[1:2])[0], masks[1])
    pixels, (height, width) = sam.preprocess(image, 32)
    assert (height, width) == (18, 32) and not pixels[:, 18:].any() and pixels[:, :18].any()
    seen = []
    model.forward = lambda pixels, boxes: (seen.append(boxes), (torch.ones(len(boxes), 32, 32), None))[1]
    assert model.masks(image, boxes[:1]).all()
    left = torch.where(torch.arange(32) < 16, 1.0, -1.0).expand(1, 32, 32)
    model.forward = lambda pixels, boxes: (left, None)
    (half,) = model.masks(image, boxes[:1])  # what is shown is 32 x 18: padding is below, half of 70 columns is mask
    assert half[:, :33].all() and not half[:, 37:].any()
    torch.testing.assert_close(seen[0], boxes[:1] * torch.tensor([32 / 70, 18 / 40] * 2))


def test_published_sizes():
    """Parameters of ViT-B: 93,735,472 and the matrix of 256 numbers, less what only points and masks need."""
    with torch.device("meta"):
        model = sam.Sam(dict(width=768, windows=[14, 14, 64] * 4, side=64, patch=16, head_dim=64, out=256, hidden=3072),
                        dict(hidden=2048, inner=128, layers=2, quality_hidden=256))
    downscaling = (4 * 4 + 4) + 8 + (16 * 4 * 4 + 16) + 32 + (256 * 16 + 256)
    assert sum(p.numel() for p in model.parameters()) == 93_735_472 + 256 - 3 * 256 - downscaling


def test_bf16():
    masks, _ = build().bfloat16()(torch.randn(1, 3, 32, 32).bfloat16(), torch.tensor([[3.0, 4, 20, 30]]))
    assert masks.isfinite().all()
