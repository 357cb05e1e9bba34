"""Opening pictures of every kind, good and bad; crop, pad and what decides between them."""

import io
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import small
import torch
from PIL import Image

from data import images
from data.images import image_size, open_image
from model.families.llava import find_aspect, llava_config
from model.views import Preprocessing, View, pad_to_square, preprocess, single, stack

GRID = ((17, 34), (34, 17), (34, 34))


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(small.photo(width, height))


def reopened(image: Image.Image, folder, name: str, **options) -> np.ndarray:
    """Saved to a file and opened with warnings as errors: nothing may be printed beside the one line."""
    image.save(folder / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(name, folder)
    assert opened.mode == "RGB"
    return np.asarray(opened)


# ----------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize(
    "mode, name",
    [("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("L", "a.png"), ("1", "a.png"), ("LA", "a.png"), ("P", "a.gif"),
     ("RGBA", "a.png"), ("YCbCr", "a.jpg"), ("RGB", "a.webp"), ("RGB", "a.bmp")],
)
def test_every_mode_becomes_what_convert_gives(tmp_path, mode, name):
    opened = reopened(photo(20, 12).convert(mode), tmp_path, name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    assert opened.shape == (12, 20, 3) and np.array_equal(opened, expected)


def test_transparency_is_dropped(tmp_path):
    """As LLaVA does: the colours that a viewer would hide show. Palettes with one or many transparent entries."""
    clear = photo(20, 12).convert("RGBA")
    clear.putalpha(0)
    assert np.array_equal(reopened(clear, tmp_path, "a.png"), small.photo(20, 12))
    palette = photo(20, 12).convert("P")
    plain = np.asarray(palette.convert("RGB"))
    for transparency in (3, bytes(range(256))):
        assert np.array_equal(reopened(palette, tmp_path, "p.png", transparency=transparency), plain)


def test_sixteen_bits_keep_their_high_byte(tmp_path):
    """v * 257 // 256 = v for a byte v; Pillow's own conversion would clip everything above 255 to white."""
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    opened = reopened(Image.fromarray(grey.astype(np.uint16) * 257), tmp_path, "a.png")
    assert np.array_equal(opened, np.repeat(grey[:, :, None], 3, axis=2))


def test_exif_orientation_is_not_applied(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6  # to be shown rotated by 90 degrees
    assert reopened(photo(20, 12), tmp_path, "a.png", exif=tag).shape == (12, 20, 3)


# -------------------------------------------------------------------------------------------------------- bad


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "no format that Pillow knows"),
        (b"no picture", "no format that Pillow knows"),
        (encoded(photo(90, 90), "PNG")[:900], "truncated|broken|image file"),
        (encoded(photo(90, 90), "JPEG")[:900], "truncated"),
        (encoded(photo(90, 90), "GIF")[:400], "no format"),
        (encoded(photo(90, 90), "PNG").replace(b"IDAT", b"IDAX"), ""),  # any reason
        (encoded(Image.new("1", (16385, 90)), "PNG"), "16385 x 90 pixels: one side is longer than 16384"),
        (encoded(Image.new("L", (4021, 20)), "PNG"), "4021 x 20 pixels: one side is more than 200 times the other"),
        (encoded(Image.new("1", (8193, 8192)), "PNG"), "8193 x 8192 pixels are more than 67108864"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "decompression bomb"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "mode F"),
        (encoded(Image.new("I", (9, 9)), "TIFF"), "mode I"),
        (b"P6 0 5 255\n", "no format"),
    ],
    ids=["empty", "text", "png cut", "jpeg cut", "gif cut", "png without data", "long", "thin", "large", "bomb",
         "float", "integers", "no width"],
)
def test_bad_pictures_give_one_line_that_names_the_file(tmp_path, content, reason):
    (tmp_path / "bad.img").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=rf"bad\.img: not a readable image \(.*({reason})") as error:
            open_image("bad.img", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ValueError, match="none.png: no such image"):
        open_image("none.png", tmp_path)
    with pytest.raises(ValueError, match="not a readable image"):
        open_image(".", tmp_path)


@pytest.mark.parametrize("image, name", [
    (Image.new("L", (4021, 20)), "a.png"), (Image.new("1", (16385, 90)), "a.png"), (Image.new("I", (9, 9)), "a.tif"),
    (Image.new("F", (9, 9)), "a.tif"), (Image.new("1", (8193, 8192)), "a.png"), (None, "a.png"),
])
def test_the_header_is_refused_by_the_words_that_refuse_the_picture(tmp_path, image, name):
    image.save(tmp_path / name) if image else (tmp_path / name).write_bytes(b"")
    said = []
    for read in (open_image, image_size):
        with pytest.raises(ValueError) as error:
            read(name, tmp_path)
        said.append(str(error.value))
    assert said[0] == said[1] and str(tmp_path / name) in said[0]


def test_the_size_is_read_from_the_header(tmp_path):
    """(height, width), also where the pixels are cut off and of 16-bit files."""
    (tmp_path / "cut.jpg").write_bytes(encoded(photo(90, 60), "JPEG")[:900])
    Image.fromarray(np.zeros((6, 9), np.uint16)).save(tmp_path / "deep.png")
    assert image_size("cut.jpg", tmp_path) == (60, 90) and image_size("deep.png", tmp_path) == (6, 9)
    assert image_size("scene:3") == (96, 96)
    with pytest.raises(ValueError, match="cut.jpg: not a readable image .*truncated"):
        open_image("cut.jpg", tmp_path)


@pytest.mark.parametrize("read", [open_image, image_size])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero", "."):
        with pytest.raises(ValueError, match="not a readable image .no regular file"):
            read(name, tmp_path)
    for name in ("a\0b.png", "x" * 5000):
        with pytest.raises(ValueError, match="not a readable image"):
            read(name, tmp_path)
    with pytest.raises(ValueError, match="image reference 'scene:999"):
        read("scene:" + "9" * 5000)


def test_a_zero_sized_picture(tmp_path):
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        preprocess(Image.new("RGB", (0, 5)), Preprocessing(small.SIDE))
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        images._check_size(0, 5)


def test_a_thin_picture_within_the_limit(tmp_path):
    """200 : 1 is the thinnest that is taken."""
    assert reopened(Image.new("RGB", (400, 2)), tmp_path, "a.png").shape == (2, 400, 3)


# ------------------------------------------------------------------------------------------------ crop and pad


def test_pad_by_hand():
    """4 x 1: three rows are missing, (4 - 1) // 2 = 1 above, 2 below; int(255 * mean) = 122, 116, 104."""
    padded = np.asarray(pad_to_square(Image.new("RGB", (4, 1), (1, 2, 3))))
    assert padded.shape == (4, 4, 3)
    assert [tuple(row[0]) for row in padded.tolist()] == [(122, 116, 104), (1, 2, 3), (122, 116, 104), (122, 116, 104)]
    tall = np.asarray(pad_to_square(Image.new("RGB", (1, 4), (1, 2, 3))))
    assert np.array_equal(tall, padded.transpose(1, 0, 2))


@pytest.mark.parametrize("size", [(40, 24), (23, 57), (17, 17), (16, 90), (301, 18), (1, 3)])
def test_live_pad_equals_transformers(size):
    """LlavaImageProcessor with do_pad, pixel for pixel."""
    pil = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    theirs = pil.LlavaImageProcessorPil(
        size={"shortest_edge": small.SIDE}, crop_size={"height": small.SIDE, "width": small.SIDE}, do_pad=True
    )
    expected = theirs(photo(*size), return_tensors="pt")["pixel_values"][0]
    ours = preprocess(pad_to_square(photo(*size)), Preprocessing(small.SIDE))
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_stack_by_hand():
    """Views of 1 and 2 tiles with 4 patches: the second one's features start at 4; -1 stays."""
    one = single(torch.zeros(3, 2, 2), 4)
    two = View(torch.ones(2, 3, 2, 2), torch.tensor([0, 7, -1]))
    pixels, rows = stack([one, two, one], 4)
    assert pixels.shape == (4, 3, 2, 2) and pixels[:, 0, 0, 0].tolist() == [0, 1, 1, 0]
    assert [r.tolist() for r in rows] == [[0, 1, 2, 3], [4, 11, -1], [12, 13, 14, 15]]


NEXT = dict(model_type="llava_next", image_grid_pinpoints=GRID)
LLAVA_PAD = dict(image_processor_type="LlavaImageProcessor", do_pad=True)


@pytest.mark.parametrize(
    "config, preprocessor, asked, expected",
    [
        ({}, None, None, "crop"),
        ({}, dict(image_processor_type="CLIPImageProcessor", do_pad=True), None, "crop"),
        ({}, LLAVA_PAD, None, "pad"),
        ({}, LLAVA_PAD, "crop", "crop"),
        (dict(image_aspect_ratio="pad"), None, None, "pad"),
        (dict(image_aspect_ratio="pad"), None, "crop", "crop"),
        (NEXT, dict(image_processor_type="LlavaNextImageProcessor", do_pad=True), None, "anyres"),
        (NEXT, None, "pad", "pad"),
    ],
)
def test_the_checkpoint_decides_unless_asked(tmp_path, config, preprocessor, asked, expected):
    if preprocessor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert find_aspect(tmp_path, llava_config({**small.LLAVA, **config}), asked) == expected


def test_aspects_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="aspect 'square' is none of crop, pad, anyres"):
        find_aspect(tmp_path, llava_config(small.LLAVA), "square")
    with pytest.raises(ValueError, match="config.json: anyres needs image_grid_pinpoints, there are none"):
        find_aspect(tmp_path, llava_config(small.LLAVA), "anyres")
    config = SimpleNamespace(aspect="anyres", anyres=True, image_grid_pinpoints=((17, 34), (17, 30)),
                             vision=SimpleNamespace(image_size=17))
    with pytest.raises(ValueError, match=r"\(17, 30\) is no multiple of 17"):
        find_aspect(tmp_path, config, None)
