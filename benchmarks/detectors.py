"""Seconds and memory of RAM++, GroundingDINO and SAM at full size, one image on one core, random weights.

    python benchmarks/detectors.py
    python benchmarks/detectors.py --only sam_h

Each network runs in a process of its own, so that its peak of resident memory is its own. With random weights there is
nothing to find: GroundingDINO is asked for ten tags, SAM for ten boxes.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from networks import dino, ram, sam  # noqa: E402
from networks.bert import BertConfig  # noqa: E402
from networks.swin import BASE, TINY  # noqa: E402

VITS = {"sam_b": (768, 12, 64, (2, 5, 8, 11)), "sam_l": (1024, 24, 64, (5, 11, 17, 23)),
        "sam_h": (1280, 32, 80, (7, 15, 23, 31))}  # width, blocks, head width, global blocks
BOXES = torch.tensor([[40.0 * i, 30.0 * i, 40.0 * i + 200, 30.0 * i + 150] for i in range(10)])
IDS = torch.tensor([[101, *(t for i in range(10) for t in (2000 + i, 1012)), 102]])


def build(name: str):
    """(network, what it does with an image) for a row of the table."""
    if name == "ram++":
        model = ram.Ram(4585, 51)
        return model, lambda image: model(ram.preprocess(image)[None])
    if name in VITS:
        width, blocks, head, whole = VITS[name]
        encoder = dict(width=width, windows=[64 if i in whole else 14 for i in range(blocks)], side=64, patch=16,
                       head_dim=head, out=256, hidden=4 * width)
        model = sam.Sam(encoder, dict(hidden=2048, inner=128, layers=2, quality_hidden=256))
        return model, lambda image: model.masks(image, BOXES)
    model = dino.Dino(TINY if name == "dino_t" else BASE, BertConfig())

    def find(image: Image.Image):
        pixels = dino.preprocess(image)[None]
        return model(model.maps(pixels), torch.ones(1, *pixels.shape[-2:], dtype=torch.bool), IDS, IDS > 0)

    return model, find


@torch.no_grad()
def measure(name: str) -> None:
    """Print one row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, work = build(name)
    model.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8))
    weights = sum(p.numel() for p in model.parameters())
    started = time.process_time()
    work(image)
    cpu = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"| {name} | {weights / 1e6:.1f} | {cpu:.1f} | {peak:.1f} |", flush=True)


def main() -> None:
    """The table, a process a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("ram++", "dino_t", "dino_b", *VITS)
    parser.add_argument("--only", choices=names, help="one network, in this process")
    args = parser.parse_args()
    if args.only:
        return measure(args.only)
    print("| network | million weights | CPU s an image | peak resident GiB |", "|---" * 4 + "|", sep="\n",
          flush=True)
    for name in names:
        subprocess.run([sys.executable, __file__, "--only", name], check=True)


if __name__ == "__main__":
    main()
