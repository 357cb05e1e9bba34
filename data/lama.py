"""LaMa: fills a hole by a residual network that sees the whole image through Fourier convolutions.

Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting with Fourier Convolutions", WACV, arXiv
2109.07161; the Fourier convolution is that of Chi et al. 2020, "Fast Fourier Convolution", NeurIPS. AdaViP
removes objects with it.

    v            pixels                        (3, H, W) in [0, 1]
    m            hole                          (H, W) bool, True where to paint
    network      cat(v (1 - m), m)             (B, 4, H, W) -> (B, 3, H, W) in (0, 1); H and W multiples of 8
    result       m network + (1 - m) v         (3, H, W)

Channels C = 64, three halvings, 18 residual blocks at width 8 C = 2 C local + 6 C global. In each Fourier
convolution

    local'  = conv3x3(local) + conv3x3(global)
    global' = conv3x3(local) + spectral(global)
    spectral(x) = W_2 (a + F(a)),  a = relu(bn(W_1 x)),  F(a) = irfft(relu(bn(W_f rfft(a))))

with real and imaginary parts as channels c0_re, c0_im, c1_re, ... and orthonormal transforms. The model is
fp32, the Fourier part also under autocast: half precision has no transform for most sizes.

Weights: big-lama as published, 50,975,875 parameters, read by `load_lama`; names are those of the
published state dict, so nothing is translated but the prefix:

    model.                    the generator alone
    generator.model.          training checkpoints (best.ckpt of big-lama.zip), most safetensors exports
    model.generator.model.    big-lama.pt (TorchScript)

Departure: released code cuts the result off to bytes; data/corrupt.py's `to_image` rounds, so that pixels
outside the hole stay exactly what they were.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import BadInput
from data.inpaint import Fill, check
from model.tensors import check_tensors, describe, finite, read_file
from model.torchscript import script_tensors

PREFIXES = ("generator.model.", "model.generator.model.", "model.")
FIRST = "1.ffc.convl2l.weight"
HALVINGS = 3


def conv(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Conv2d:
    """Without bias; reflects at the edge, but for the 7 x 7 one, before which a layer of its own does."""
    padding = 1 if side == 3 else 0
    return nn.Conv2d(inputs, outputs, side, stride, padding, bias=False, padding_mode="reflect")


class FourierUnit(nn.Module):
    """F of the header: a convolution of the spectrum, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv_layer = conv(2 * channels, 2 * channels, 1)
        self.bn = nn.BatchNorm2d(2 * channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) fp32
        batch, channels, height, width = x.shape
        spectrum = torch.view_as_real(torch.fft.rfft2(x, norm="ortho"))  # (B, C, H, W / 2 + 1, 2)
        spectrum = spectrum.permute(0, 1, 4, 2, 3).reshape(batch, 2 * channels, height, -1)
        spectrum = F.relu(self.bn(self.conv_layer(spectrum)))
        pairs = spectrum.unflatten(1, (channels, 2)).permute(0, 1, 3, 4, 2).contiguous()
        return torch.fft.irfft2(torch.view_as_complex(pairs), s=(height, width), norm="ortho")


class Spectral(nn.Module):
    """spectral(x) of the header: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Sequential(conv(channels, channels // 2, 1), nn.BatchNorm2d(channels // 2), nn.ReLU())
        self.fu = FourierUnit(channels // 2)
        self.conv2 = conv(channels // 2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        with torch.autocast(x.device.type, enabled=False):
            waves = self.fu(x.float())
        return self.conv2(x + waves)


class FourierConv(nn.Module):
    """(local, global) -> (local, global), (B, C_l, H, W) and (B, C_g, H, W); no global part where C_g = 0."""

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int], side: int, stride: int = 1):
        super().__init__()
        self.convl2l = conv(inputs[0], outputs[0], side, stride)
        self.convl2g = conv(inputs[0], outputs[1], side, stride) if outputs[1] else None
        self.convg2l = conv(inputs[1], outputs[0], side, stride) if inputs[1] else None
        self.convg2g = Spectral(outputs[1]) if inputs[1] else None

    def forward(self, near: Tensor, far: Tensor | None) -> tuple[Tensor, Tensor | None]:
        near_out = self.convl2l(near)
        far_out = None if self.convl2g is None else self.convl2g(near)
        if far is not None:
            near_out, far_out = near_out + self.convg2l(far), far_out + self.convg2g(far)
        return near_out, far_out


class Layer(nn.Module):
    """Fourier convolution, batch norm and ReLU."""

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, int], side: int, stride: int = 1):
        super().__init__()
        self.ffc = FourierConv(inputs, outputs, side, stride)
        self.bn_l = nn.BatchNorm2d(outputs[0])
        self.bn_g = nn.BatchNorm2d(outputs[1]) if outputs[1] else None

    def forward(self, x: Tensor | tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        near, far = self.ffc(*x) if isinstance(x, tuple) else self.ffc(x, None)
        return F.relu(self.bn_l(near)), None if far is None else F.relu(self.bn_g(far))


class Block(nn.Module):
    """Two layers with a residual around them, for local and global channels alike."""

    def __init__(self, channels: tuple[int, int]):
        super().__init__()
        self.conv1, self.conv2 = Layer(channels, channels, 3), Layer(channels, channels, 3)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        near, far = self.conv2(self.conv1(x))
        return x[0] + near, x[1] + far


class Join(nn.Module):
    """(local, global) -> their channels one after the other."""

    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat(x, 1)


class Lama(nn.Module):
    """The generator; the indices of `model` are those of the published weights."""

    def __init__(self, channels: int = 64, blocks: int = 18):
        super().__init__()
        widths = [channels * 2**i for i in range(HALVINGS + 1)]
        split = widths[-1] // 4, 3 * widths[-1] // 4
        down = [Layer((a, 0), (b, 0), 3, 2) for a, b in zip(widths, widths[1:-1])]
        up = [layer for a, b in zip(widths[:0:-1], widths[-2::-1]) for layer in
              (nn.ConvTranspose2d(a, b, 3, 2, 1, output_padding=1), nn.BatchNorm2d(b), nn.ReLU())]
        self.model = nn.Sequential(
            nn.ReflectionPad2d(3), Layer((4, 0), (channels, 0), 7), *down, Layer((widths[-2], 0), split, 3, 2),
            *(Block(split) for _ in range(blocks)), Join(), *up,
            nn.ReflectionPad2d(3), nn.Conv2d(channels, 3, 7), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Masked image and mask (B, 4, H, W), sides multiples of 8 -> (B, 3, H, W)."""
        return self.model(x)


def lama_fill(model: Lama) -> Fill:
    """A fill as in data/inpaint.py, (pixels (3, H, W), hole (H, W)) -> pixels, from 9 x 9 pixels on."""

    @torch.no_grad()
    def fill(pixels: Tensor, hole: Tensor) -> Tensor:
        check(pixels, hole)
        height, width = hole.shape
        if min(height, width) < 9:
            raise BadInput(f"an image of {width} x {height} pixels: LaMa needs 9 x 9")
        mask = hole[None].to(pixels.dtype)
        given = symmetric_pad(torch.cat([pixels * (1 - mask), mask])[None])  # (1, 4, H + .., W + ..)
        weight = model.model[1].ffc.convl2l.weight
        painted = model(given.to(weight.device, weight.dtype))[0, :, :height, :width]
        return torch.where(hole, painted.to(pixels.device, pixels.dtype), pixels)

    return fill


def symmetric_pad(x: Tensor, multiple: int = 8) -> Tensor:
    """Mirror (.., H, W) below and on the right, edge pixels repeated, until both sides are multiples."""
    height, width = (-side % multiple for side in x.shape[-2:])
    x = torch.cat([x, x[..., x.shape[-2] - height :, :].flip(-2)], -2)
    return torch.cat([x, x[..., x.shape[-1] - width :].flip(-1)], -1)


def load_lama(path: Path | str, device: torch.device | str = "cpu") -> Lama:
    """Load weights; width and number of blocks are read off them. BadInput naming the file and the tensor.

    - .safetensors
    - TorchScript archive (big-lama.pt): only its tensors are read, none of its code (model/torchscript.py).
    - other torch files (best.ckpt): with weights_only=True. When torch refuses such a file, export it once
      where it came from: save_file of safetensors on its "state_dict".
    """
    path = Path(path)
    tensors = script_tensors(path)
    found = _generator(read_file(path) if tensors is None else tensors, path)
    if found[FIRST].ndim != 4 or not len(found[FIRST]):
        raise BadInput(f"{path}: tensor {FIRST} is {tuple(found[FIRST].shape)}, expected 4 sizes")
    blocks = {name.split(".")[0] for name in found if ".conv1.ffc." in name}
    with torch.device("meta"):
        model = Lama(len(found[FIRST]), len(blocks))
    wanted = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    counted = {name for name in {*wanted, *found} if name.endswith("num_batches_tracked")}  # integers; may be missing
    check_tensors({t.name: t for t in describe(found, path) if t.name not in counted},
                  {name: tuple(tensor.shape) for name, tensor in wanted.items() if name not in counted}, path)
    for name, tensor in found.items():
        finite(tensor, f"{path}: tensor {name}")
    state = {f"model.{name}": found.get(name, torch.zeros((), dtype=torch.long)) for name in wanted}
    model.load_state_dict(state, assign=True)
    return model.to(device, torch.float32).eval().requires_grad_(False)


def _generator(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The generator's tensors without their prefix; a training checkpoint holds others besides."""
    for prefix in PREFIXES:
        if prefix + FIRST in tensors:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    raise BadInput(f"{path}: no LaMa generator: tensor {FIRST} is not there under {', '.join(PREFIXES)}")
