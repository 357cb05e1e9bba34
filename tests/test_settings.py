"""Image settings of a folder: every layout and number that `transformers` writes, and what is refused."""

import json

import pytest
import small
import torch
from PIL import Image
from test_checkpoint import write_original
from test_processor import tokenizer

from data.processor import ClipProcessor, Processor
from model.anyres import anyres
from model.checkpoint import load_llava, save_llava
from model.families.llava import find_aspect, llava_config, settings_folder
from model.settings import read_preprocessing
from model.views import CLIP_MEAN, CLIP_STD, Preprocessing, pad_to_square, preprocess

S = small.SIDE
OWN = dict(image_mean=[0.5, 0.25, 0.75], image_std=[0.5, 0.2, 0.1])
SQUARE = {"height": S, "width": S}
FULL = dict(
    image_processor_type="CLIPImageProcessor", size={"shortest_edge": S}, crop_size=SQUARE, do_resize=True,
    do_center_crop=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True, do_convert_rgb=True,
    resample=3, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD),
)
COUNTING = dict(  # fields of a processor that say how many image tokens a prompt gets
    image_token="<image>", num_additional_image_tokens=1, patch_size=5, processor_class="LlavaProcessor",
    vision_feature_select_strategy="default",
)


def write(folder, nested: bool = False, **settings):
    name, raw = "preprocessor_config.json", settings
    if nested:
        name, raw = "processor_config.json", {"image_processor": settings, **COUNTING}
    (folder / name).write_text(json.dumps(raw))
    return folder


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(small.photo(width, height))


# -------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in processor_config.json"])
@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", None])
@pytest.mark.parametrize("size, crop", [(S, S), ({"shortest_edge": S}, SQUARE), (None, None)])
def test_layouts(tmp_path, nested, kind, size, crop):
    """All of them say the same; null is as good as absent."""
    write(tmp_path, nested, **{**FULL, **OWN, "image_processor_type": kind, "size": size, "crop_size": crop})
    expected = Preprocessing(S, (0.5, 0.25, 0.75), (0.5, 0.2, 0.1), fill=(127, 63, 191))
    assert read_preprocessing(tmp_path, S) == expected


def test_the_oldest_layout(tmp_path):
    """openai/clip-vit-base-patch32 as first published."""
    write(tmp_path, feature_extractor_type="CLIPFeatureExtractor", size=S, crop_size=S, do_resize=True,
          do_center_crop=True, do_normalize=True, resample=3, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    assert read_preprocessing(tmp_path, S) == Preprocessing(S)


def test_no_settings_are_clips(tmp_path):
    assert read_preprocessing(tmp_path, S) == Preprocessing(S)
    write(tmp_path, nested=True)
    (tmp_path / "processor_config.json").write_text(json.dumps(COUNTING))  # as versions before 5 wrote it
    assert read_preprocessing(tmp_path, S) == Preprocessing(S)


def test_the_nested_settings_count_where_both_are_there(tmp_path):
    """As transformers 5 reads them; a processor_config.json without settings leaves those of the other file."""
    write(write(tmp_path, nested=True, **OWN), do_normalize=False)
    assert read_preprocessing(tmp_path, S).mean == (0.5, 0.25, 0.75)
    (tmp_path / "processor_config.json").write_text(json.dumps(COUNTING))
    assert read_preprocessing(tmp_path, S).mean == (0, 0, 0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["LlavaImageProcessor", "LlavaImageProcessorFast", "LlavaImageProcessorPil"])
def test_do_pad_is_shown_padded(tmp_path, nested, kind):
    """With the file's mean colour, whether or not it normalises: 51, 102, 204 above and below a white picture."""
    config = {**small.LLAVA, "text_config": {**small.TEXT, "vocab_size": 400}, "image_token_index": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, nested, **{**FULL, "image_processor_type": kind, "do_pad": True, "do_normalize": False,
                               "image_mean": [0.2, 0.4, 0.8]})
    view = Processor(tmp_path).view(Image.new("RGB", (3 * S, S), (255, 255, 255)))
    assert view.pixels.shape == (1, 3, S, S)
    torch.testing.assert_close(view.pixels[0, :, 0, 5], torch.tensor([51, 102, 204]) / 255)
    torch.testing.assert_close(view.pixels[0, :, S // 2, 5], torch.ones(3))


def test_clip_folders_read_them_too(tmp_path):
    text = {**small.CLIP_TEXT, "vocab_size": 400, "eos_token_id": 3}
    (tmp_path / "config.json").write_text(json.dumps({**small.CLIP_BOTH, "text_config": text}))
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, nested=True, **{**FULL, **OWN})
    Image.new("RGB", (30, 50), (255, 0, 51)).save(tmp_path / "a.png")
    pixels = ClipProcessor(tmp_path).image("a.png", tmp_path)
    torch.testing.assert_close(pixels[:, 3, 5], torch.tensor([1, -1.25, -5.5]))
    write(tmp_path, nested=True, **{**FULL, "image_processor_type": "LlavaImageProcessor", "do_pad": True})
    with pytest.raises(ValueError, match="processor_config.json: image_processor: LlavaImageProcessor does not"):
        ClipProcessor(tmp_path)


def test_an_original_checkpoint_goes_by_its_tower(llava_folder, tmp_path):
    """And what `save_llava` writes of it reads back the same settings; so do nested ones of llava-hf's layout."""
    original = write_original(tmp_path / "original", "bin", llava_folder)
    write(tmp_path / "tower", **{**FULL, **OWN})
    expected = read_preprocessing(settings_folder(original), S, "pad")
    assert expected.mean == (0.5, 0.25, 0.75)
    save_llava(load_llava(original), tmp_path / "out", original)
    assert read_preprocessing(tmp_path / "out", S, "pad") == expected
    pad = {**FULL, **OWN, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    source = write(small.write_llava(tmp_path / "in"), nested=True, **pad)
    save_llava(load_llava(source), tmp_path / "again", source)
    assert read_preprocessing(tmp_path / "again", S, "pad") == expected
    assert find_aspect(tmp_path / "again", llava_config(small.LLAVA), None) == "pad"


# -------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(image_processor_type="SiglipImageProcessor"), "image_processor_type='SiglipImageProcessor' is"),
        (dict(image_processor_type=3), "image_processor_type=3 is not supported"),
        (dict(crop_size={"height": 336, "width": 336}), "crop_size=.* does not fit the vision tower's 17 x 17"),
        (dict(crop_size={"height": S, "width": 9}), "crop_size=.* does not fit the vision tower's 17 x 17"),
        (dict(size={"longest_edge": S}), "size={'longest_edge': 17} is not supported"),
        (dict(size={"shortest_edge": S, "longest_edge": 99}), "size=.* is not supported"),
        (dict(size=10**30), "size=10+ is not supported"),
        (dict(size=[S, S]), r"size=\[17, 17\] is not supported"),
        (dict(size={"height": S}), "size={'height': 17} is not supported"),
        (dict(do_center_crop=False), "do_center_crop=False needs a size of height 17 and width 17"),
        (dict(do_resize=False), "do_resize=False is not supported"),
        (dict(do_rescale=False), "do_rescale=False is not supported"),
        (dict(rescale_factor=1 / 127.5), "rescale_factor=0.0078.* is not supported"),
        (dict(do_normalize="no"), "do_normalize='no' is not supported"),
        (dict(resample="bicubic"), "resample='bicubic' is not supported"),
        (dict(image_mean=[122.8, 116.7, 104.1]), "image_mean=.* is not three numbers from 0 to 1"),
        (dict(image_mean=[0.5]), "image_mean=.* is not three numbers"),
        (dict(image_mean=[True, True, True]), "image_mean=.* is not three numbers"),
        (dict(image_std=[0.5, 0.5, 0]), "image_std=.* divides by 0"),
        (dict(image_std="0.5"), "image_std='0.5' is not three numbers"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, nested, change, reason):
    where = "processor_config.json: image_processor: " if nested else "preprocessor_config.json: "
    with pytest.raises(ValueError, match=where + reason):
        read_preprocessing(write(tmp_path, nested, **FULL | change), S)


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_damaged_files(tmp_path, name):
    for content, reason in ((b"{", "not valid JSON"), (b"[]", "a JSON object"), (b"\xff", "not UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: ({reason})"):
            read_preprocessing(tmp_path, S)
    if name == "processor_config.json":
        (tmp_path / name).write_text('{"image_processor": [1]}')
        with pytest.raises(ValueError, match="processor_config.json: image_processor is no object"):
            read_preprocessing(tmp_path, S)


def test_tiles_must_be_those_of_the_model(tmp_path):
    """The same pinpoints in both files, tiles of the tower's side; a tile processor without tiles is refused."""
    grid = [[S, 2 * S], [2 * S, S]]
    config = llava_config({**small.LLAVA, "model_type": "llava_next", "image_grid_pinpoints": grid})
    tiles = {**FULL, "image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    write(tmp_path, **tiles, image_grid_pinpoints=grid)
    assert find_aspect(tmp_path, config, None) == "anyres"
    with pytest.raises(ValueError, match="LlavaNextImageProcessor makes tiles, .*config.json takes none"):
        find_aspect(tmp_path, llava_config(small.LLAVA), None)
    assert find_aspect(tmp_path, llava_config(small.LLAVA), "pad") == "pad"
    write(tmp_path, **tiles, image_grid_pinpoints=[[S, 2 * S]])
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_grid_pinpoints=\[\[17, 34\]\] is not"):
        find_aspect(tmp_path, config, None)
    write(tmp_path, **{**tiles, "size": {"shortest_edge": 20}})
    with pytest.raises(ValueError, match="size={'shortest_edge': 20} is not the side of a tile, 17"):
        read_preprocessing(tmp_path, S, "anyres")
    assert read_preprocessing(tmp_path, S, "pad").resize == 20


# ---------------------------------------------------------------------------------------------- transformers

SETTINGS = [
    {},
    OWN,
    dict(do_normalize=False),
    dict(do_normalize=False, **OWN),
    *(dict(resample=number) for number in (0, 1, 2, 4, 5)),
    dict(size={"shortest_edge": 20}),
    dict(size={"shortest_edge": 12}),
    dict(size={"height": 20, "width": 31}),
    dict(size={"height": 9, "width": 20}),
    dict(size=SQUARE, do_center_crop=False, crop_size={"height": 224, "width": 224}),
]
PICTURES = ((40, 24), (23, 57), (17, 17), (5, 4), (101, 18))


@pytest.mark.parametrize("settings", SETTINGS, ids=map(str, SETTINGS))
@pytest.mark.parametrize("pad", [False, True])
def test_live_pixels_equal_transformers(tmp_path, settings, pad):
    pil = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    defaults = {"size": {"shortest_edge": S}, "crop_size": SQUARE, "do_pad": pad}
    theirs = pil.LlavaImageProcessorPil(**defaults | settings)
    theirs.save_pretrained(tmp_path)
    aspect = find_aspect(tmp_path, llava_config(small.LLAVA), None)
    how = read_preprocessing(tmp_path, S, aspect)
    assert aspect == ("pad" if pad else "crop")
    for size in PICTURES:
        image = pad_to_square(photo(*size), how.fill) if pad else photo(*size)
        expected = theirs(photo(*size), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(preprocess(image, how), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("settings", [OWN, dict(do_normalize=False), dict(resample=2), dict(size=SQUARE)], ids=str)
def test_live_tiles_equal_transformers(tmp_path, settings):
    pil = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    grid = [[S, 2 * S], [2 * S, S], [2 * S, 2 * S]]
    theirs = pil.LlavaNextImageProcessorPil(
        **{"size": {"shortest_edge": S}, "crop_size": SQUARE, "image_grid_pinpoints": grid} | settings)
    theirs.save_pretrained(tmp_path)
    how = read_preprocessing(tmp_path, S, "anyres")
    for size in PICTURES:
        expected = theirs(photo(*size), return_tensors="pt")["pixel_values"][0]
        ours = anyres(photo(*size), tuple(map(tuple, grid)), how, small.PATCHES).pixels
        torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)


def test_live_whole_processors(tmp_path):
    """A LlavaProcessor with tokenizer and all, saved by transformers, is read as it will be used there."""
    transformers = pytest.importorskip("transformers")
    pil = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    config = {**small.LLAVA, "text_config": {**small.TEXT, "vocab_size": 400}, "image_token_index": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer().save(str(tmp_path / "t.json"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), eos_token="</s>")
    images = pil.LlavaImageProcessorPil(size={"shortest_edge": S}, crop_size=SQUARE, do_pad=True, **OWN)
    theirs = transformers.LlavaProcessor(images, words, patch_size=5, vision_feature_select_strategy="default")
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    processor = Processor(tmp_path)
    expected = images(photo(40, 24), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor.view(photo(40, 24)).pixels, expected, rtol=0, atol=5e-6)
    # Both files: transformers takes the nested settings, and so do we.
    write(tmp_path, **{**FULL, "do_normalize": False})
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    torch.testing.assert_close(again(photo(40, 24), return_tensors="pt")["pixel_values"], expected)
    torch.testing.assert_close(Processor(tmp_path).view(photo(40, 24)).pixels, expected, rtol=0, atol=5e-6)
