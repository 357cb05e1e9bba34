"""networks/swin.py against transformers, as GroundingDINO uses it (any size) and as RAM does (fixed size)."""

import re

import pytest
import torch

from networks.swin import Swin, SwinConfig, from_windows, shift_mask, to_windows

CONFIG = SwinConfig(12, (2, 2, 2), (1, 2, 4), 4)


def share(ours: torch.nn.Module, theirs: torch.nn.Module, names: dict[str, str]) -> None:
    """Random weights in ours, the same in theirs, by whatever names their state dict has."""
    torch.manual_seed(0)
    state = {k: torch.randn_like(v) * 0.3 + (1 if "norm" in k and k.endswith("weight") else 0)
             for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    wanted, given = theirs.state_dict(), {}
    for name, tensor in state.items():
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            found = [(name.replace("qkv", part), rows) for part, rows in parts]
        else:
            found = [(name, tensor)]
        for key, rows in found:
            for pattern, replacement in names.items():
                key = re.sub(pattern, replacement, key)
            assert key in wanted and wanted[key].shape == rows.shape, key
            given[key] = rows
    missing = [k for k in wanted if k not in given and not re.search("relative_position_index|^swin.layernorm", k)]
    assert not missing, missing
    theirs.load_state_dict(given, strict=False)


def peer_names(theirs: torch.nn.Module) -> dict[str, str]:
    """The names differ between versions of transformers; they are found in its state dict."""
    keys = " ".join(theirs.state_dict())
    new = "q_proj" in keys
    return {
        r"^patch_embed\.proj": "embeddings.patch_embeddings.projection", r"^patch_embed\.norm": "embeddings.norm",
        r"^layers\.": "encoder.layers.", r"\.norm1\.": ".layernorm_before.", r"\.norm2\.": ".layernorm_after.",
        r"\.attn\.relative_position_bias_table": ".attention.relative_position_bias.relative_position_bias_table"
        if new else ".attention.self.relative_position_bias_table",
        **({r"\.attn\.query": ".attention.q_proj", r"\.attn\.key": ".attention.k_proj",
            r"\.attn\.value": ".attention.v_proj", r"\.attn\.proj": ".attention.o_proj"} if new else
           {r"\.attn\.(query|key|value)": r".attention.self.\1", r"\.attn\.proj": ".attention.output.dense",
            r"\.mlp\.fc1": ".intermediate.dense", r"\.mlp\.fc2": ".output.dense"}),
        r"^norm(\d)\.": lambda m: f"hidden_states_norms.stage{int(m[1]) + 1}.", r"^norm\.": "layernorm.",
    }


def swin_config(transformers, size: int):
    return transformers.SwinConfig(
        image_size=size, patch_size=4, embed_dim=CONFIG.width, depths=list(CONFIG.depths), num_heads=list(CONFIG.heads),
        window_size=CONFIG.window, out_features=["stage2", "stage3"], drop_path_rate=0.0)


@pytest.mark.parametrize("size", [(61, 39), (64, 64), (9, 50)])
def test_any_size_equals_transformers(size):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SwinBackbone(swin_config(transformers, 64)).eval()
    ours = Swin(CONFIG).eval()
    inner = any(name.startswith("swin.") for name in theirs.state_dict())
    share(ours, theirs, {**peer_names(theirs), **({r"^(embeddings|encoder)": r"swin.\1"} if inner else {})})
    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, wanted = ours(pixels), theirs(pixels).feature_maps
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.permute(0, 3, 1, 2), b, atol=2e-5, rtol=1e-5)


def test_fixed_size_equals_transformers():
    """64 pixels: maps of 16, 8 and 4, so the last stage is one window, which never shifts."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SwinModel(swin_config(transformers, 64)).eval()
    ours = Swin(CONFIG, size=64).eval()
    share(ours, theirs, peer_names(theirs))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (found,), wanted = ours(pixels), theirs(pixels).last_hidden_state
    torch.testing.assert_close(found.flatten(1, 2), wanted, atol=2e-5, rtol=1e-5)
    assert [block.shift for block in ours.layers[2].blocks] == [0, 0]
    assert [block.shift for block in Swin(CONFIG).layers[2].blocks] == [0, 2]  # any size: it does


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="takes 64"):
        Swin(CONFIG, size=64)(torch.zeros(1, 3, 64, 60))


def test_windows():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = to_windows(x, 2)
    assert windows[0, 1, :, 0].tolist() == [2, 3, 8, 9] and windows.shape == (2, 6, 4, 1)
    assert torch.equal(from_windows(windows, 4, 6, 2), x)


def test_the_mask_parts_what_the_shift_joined():
    """One window of 4 x 4 moved by 1: its last row and column come from the other side."""
    mask = shift_mask(4, 4, 4, 1)[0].view(4, 4, 4, 4)
    assert not mask[:3, :3, :3, :3].any() and not mask[3, 3, 3, 3]
    assert (mask[3, :3, :3] == -100).all() and (mask[3, 0, 3, 3] == -100) and not mask[3, :3, 3, :3].any()


def test_bf16():
    model = Swin(CONFIG).to(torch.bfloat16)
    assert [m.dtype for m in model(torch.randn(1, 3, 30, 20).bfloat16())] == [torch.bfloat16] * 2
