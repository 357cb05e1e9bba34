"""Build the sprite atlas of the scene world from two openly licensed emoji packages.

    npm pack emoji-datasource-google@16.0.0        (Noto Emoji, 64 px PNG)
    npm pack @lobehub/fluent-emoji-3d@1.1.0        (Microsoft Fluent Emoji 3D, 256 px WebP)

Unpack both archives into FOLDER/emoji-datasource-google and FOLDER/@lobehub/fluent-emoji-3d (`npm install
--ignore-scripts` gives the same layout with FOLDER = node_modules), then run

    python tools/sprites.py FOLDER

The result, in data/sprites: `atlas_12.png`, `atlas_24.png`, `atlas_36.png` (RGBA, COLUMNS tiles a row, the same order
in all three) and `index.json` (category, package and code point of every tile). Every size is stored rather than scaled
at run time, so a rendered scene is the same bytes with every version of Pillow. Licences: data/sprites/LICENSE.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from common import write_text, written_whole

SIZES = (12, 24, 36)                                        # pixels: one, two, three cells of the grid
COLUMNS = 16
FAINT = 12                                                  # alpha up to this is noise of the resampling

# Category -> code points; each is taken from both packages.
ART = {
    "person": "1f9cd-200d-2642-fe0f 1f9cd-200d-2640-fe0f", "bicycle": "1f6b2", "car": "1f697 1f699",
    "motorcycle": "1f3cd-fe0f 1f6f5", "airplane": "2708-fe0f 1f6e9-fe0f", "train": "1f682 1f686",
    "truck": "1f69a 1f6fb", "boat": "26f5 1f6a4", "traffic light": "1f6a6", "bird": "1f426 1f986",
    "cat": "1f408 1f408-200d-2b1b", "dog": "1f415 1f429", "horse": "1f40e", "sheep": "1f411",
    "cow": "1f404 1f402", "elephant": "1f418", "zebra": "1f993", "giraffe": "1f992",
    "backpack": "1f392", "umbrella": "2602-fe0f", "handbag": "1f45c", "sports ball": "26bd 1f3c0",
    "kite": "1fa81", "skateboard": "1f6f9", "bottle": "1f37e 1f9f4", "wine glass": "1f377",
    "cup": "2615 1f964", "fork": "1f374", "knife": "1f52a", "spoon": "1f944", "bowl": "1f35a 1f957",
    "banana": "1f34c", "apple": "1f34e 1f34f", "sandwich": "1f96a", "carrot": "1f955", "pizza": "1f355",
    "donut": "1f369", "cake": "1f382 1f370", "chair": "1fa91", "couch": "1f6cb-fe0f",
    "potted plant": "1fab4", "tv": "1f4fa", "laptop": "1f4bb", "mouse": "1f5b1-fe0f",
    "keyboard": "2328-fe0f", "cell phone": "1f4f1", "book": "1f4d5 1f4d8 1f4d6", "clock": "23f0 1f550",
    "vase": "1f3fa", "teddy bear": "1f9f8",
}
LEFT_HALF = ("fork",)                                       # the image shows a fork and a knife


def source(folder: Path, package: str, code: str) -> Path:
    """The image of one code point; Fluent drops the variation selector of some names."""
    if package == "noto":
        return folder / "emoji-datasource-google" / "img" / "google" / "64" / f"{code}.png"
    assets = folder / "@lobehub" / "fluent-emoji-3d" / "assets"
    exact = assets / f"{code}.webp"
    return exact if exact.exists() else assets / f"{code.replace('-fe0f', '')}.webp"


def tile(image: Image.Image, size: int) -> Image.Image:
    """Crop to the drawn pixels, centre in a square, scale to size x size."""
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > FAINT else 0).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.array(square.resize((size, size), Image.Resampling.LANCZOS))
    pixels[pixels[..., 3] <= FAINT] = 0
    return Image.fromarray(pixels)


def open_sprite(folder: Path, category: str, package: str, code: str) -> Image.Image:
    """The image of one object in RGBA. Raises ValueError when its file is missing."""
    path = source(folder, package, code)
    if not path.exists():
        raise ValueError(f"{category}: no image {path}")
    image = Image.open(path).convert("RGBA")
    return image.crop((0, 0, image.width // 2, image.height)) if category in LEFT_HALF else image


def build(folder: Path, out: Path) -> None:
    """Write the three atlases and the index into `out`; ValueError if an image is missing."""
    index = [(category, package, code) for category, codes in ART.items()
             for code in codes.split() for package in ("noto", "fluent")]
    images = [open_sprite(folder, *row) for row in index]
    rows = -(-len(index) // COLUMNS)
    for size in SIZES:
        atlas = Image.new("RGBA", (COLUMNS * size, rows * size))
        for number, image in enumerate(images):
            atlas.paste(tile(image, size), (number % COLUMNS * size, number // COLUMNS * size))
        with written_whole(out / f"atlas_{size}.png") as temporary:
            atlas.save(temporary, format="PNG", optimize=True)
    lines = ",\n  ".join(json.dumps(row) for row in index)
    write_text(out / "index.json", f'{{"columns": {COLUMNS}, "tiles": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="build the sprite atlas from unpacked emoji packages")
    parser.add_argument("folder", type=Path, help="folder that holds both unpacked npm packages")
    build(parser.parse_args().folder, Path(__file__).resolve().parents[1] / "data" / "sprites")
