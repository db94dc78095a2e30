"""A user's own images: upright, in RGB, whatever the file is, or refused with a reason."""

import io
import sys
import time

import numpy as np
import pytest
from helpers import bit_flipped, truncated
from hostile_photos import (
    STORED,
    encoded,
    exif,
    heic_can_be_written,
    jpeg_of_size,
    picture,
    png_chunk,
    png_header,
    stored,
    turned,
    write_hostile_photos,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

import decoding
from decoding import MOST_PIXELS, UprightImage, as_bytes, photo_fault, reason_of
from photos import list_photos
from transforms import photo_pixels

KINDS = [
    "JPEG", "PNG", "WEBP", "TIFF",
    pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
]  # fmt: skip


def difference(a, b):
    return np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()


# ---------------------------------------------------------------- upright


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(kind, orientation):
    content = encoded(stored(picture(), orientation), kind, exif=exif(orientation))
    image = UprightImage(content)
    assert image.size == (96, 64)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert expected.size == (96, 64)
    assert difference(image.decoded(), expected) == 0
    assert difference(UprightImage(content).by_pillow(), expected) == 0


@pytest.mark.skipif(not heic_can_be_written(), reason="needs pillow-heif")
def test_heic_is_turned_once():
    upright = picture()
    for orientation in (1, 6):
        image = UprightImage(
            encoded(stored(upright, orientation), "HEIF", quality=100, exif=exif(orientation).tobytes())
        )
        assert image.size == upright.size
        assert np.abs(image.decoded().astype(int) - np.asarray(upright, int)).mean() < 6


def test_the_eight_turns_of_a_picture_are_one():
    pixels = [photo_pixels(UprightImage(turned(orientation)), 32) for orientation in range(1, 9)]
    assert all(bool((other == pixels[0]).all()) for other in pixels)
    assert pixels[0].float().std() > 10


def test_exif_behind_the_pixels_of_a_png_counts():
    content = encoded(stored(picture(), 6), "PNG")
    image = UprightImage(content[:-12] + png_chunk(b"eXIf", exif(6).tobytes()[6:]) + content[-12:])
    assert image.size == (96, 64)
    assert difference(image.decoded(), picture()) == 0


@pytest.mark.parametrize("block", [exif(0), exif(9), b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0garbage"])
def test_bad_exif_is_no_error(block):
    without = Image.open(io.BytesIO(encoded(picture(), "JPEG")))
    assert difference(UprightImage(encoded(picture(), "JPEG", exif=block)).decoded(), without) == 0


@given(st.sampled_from([1, *STORED]), st.integers(1, 300), st.integers(1, 300), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_reduced_images_are_large_enough(orientation, width, height, least_width, least_height):
    upright, least = picture().resize((width, height)), (least_width, least_height)
    image = UprightImage(encoded(stored(upright, orientation), "JPEG", exif=exif(orientation)))
    rows, columns, _ = image.decoded(least).shape
    assert image.size == (width, height)
    assert columns >= min(width, least[0])
    assert rows >= min(height, least[1])
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or min(width // least[0], height // least[1]) >= s)
    assert (rows, columns) == (-(-height // scale), -(-width // scale))


# ---------------------------------------------------------------- colours


def test_transparency_lies_over_white():
    """Against float64."""
    rgb, alpha = np.asarray(picture()), np.asarray(picture().convert("L").transpose(Image.Transpose.ROTATE_180))
    clear = picture()
    clear.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    assert difference(UprightImage(encoded(clear, "PNG")).decoded(), rgb * share + 255 * (1 - share)) <= 1
    grey = clear.convert("LA")
    levels = np.asarray(grey.getchannel("L"))[..., None].repeat(3, axis=2)
    assert difference(UprightImage(encoded(grey, "PNG")).decoded(), levels * share + 255 * (1 - share)) <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_is_white(kind):
    palette = picture().quantize(8)
    pixels = UprightImage(encoded(palette, kind, transparency=3)).decoded()
    clear = np.asarray(palette) == 3
    assert clear.any()
    assert (pixels[clear] == 255).all()
    assert difference(pixels[~clear], np.asarray(palette.convert("RGB"))[~clear]) == 0


def test_cmyk():
    """1 - min(1, C + K): Pillow's and every viewer's without profiles; as JPEG it is stored inverted."""
    for kind, most in (("TIFF", 1), ("JPEG", 6)):
        pixels = UprightImage(
            encoded(picture().convert("CMYK"), kind, **({"quality": 100} if most > 1 else {}))
        ).decoded()
        assert np.abs(pixels.astype(int) - np.asarray(picture(), int)).mean() < most


def test_levels_that_are_no_bytes():
    grey = np.asarray(picture().convert("L"))
    for values in (grey.astype(np.uint16) * 257, grey.astype(np.float32) / 255, grey.astype(np.float32)):
        image = Image.fromarray(values)
        pixels = UprightImage(encoded(image, "TIFF")).decoded()
        assert difference(pixels, grey[..., None]) == 0
    assert as_bytes(np.array([[-10.0, 90.0, np.nan]])).tolist() == [[0, 255, 26]]
    assert as_bytes(np.array([[0, 2**20]], np.int32)).tolist() == [[0, 255]]
    assert as_bytes(np.array([[7.0, 7.0]])).tolist() == [[7, 7]]


def test_one_bit_and_first_frames():
    assert set(np.unique(UprightImage(encoded(picture().convert("1"), "PNG")).decoded())) == {0, 255}
    others = [picture().transpose(Image.Transpose.ROTATE_180)]
    for kind, options in (("TIFF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        content = encoded(picture(), kind, save_all=True, append_images=others, **options)
        assert difference(UprightImage(content).decoded(), picture()) == 0


# ---------------------------------------------------------------- refused


def test_a_hostile_folder(tmp_path):
    expected = write_hostile_photos(tmp_path)
    assert len(expected) >= 60
    faults = {name: photo_fault(tmp_path / name) for name in list_photos(tmp_path)}
    assert {name: "unusable" if fault else "sound" for name, fault in faults.items()} == expected
    assert all("\n" not in fault and "0x" not in fault and str(tmp_path) not in fault for fault in faults.values())
    assert faults["empty.jpg"] == "is empty"
    assert faults["dangling.jpg"] == "is missing"
    assert faults["pipe.jpg"] == faults["socket.jpg"] == "is not a regular file"
    assert faults["text.jpg"].startswith("is not an image that can be read")


@pytest.mark.parametrize("content", [png_header(50000, 50000), png_header(12000, 12000), jpeg_of_size(65500, 65500)])
def test_bombs_are_refused_before_they_are_decoded(content, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
    with pytest.raises((decoding.UnusableImageError, Image.DecompressionBombError)) as refused:
        UprightImage(content)
    assert str(MOST_PIXELS) in reason_of(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_never_ends_but_in_pixels_or_a_reason(kind, tmp_path):
    generator = np.random.default_rng(3)
    content = encoded(picture(), kind)
    for damage in [truncated] * 15 + [bit_flipped] * 15:
        (tmp_path / "x.jpg").write_bytes(damage(content, generator))
        start = time.perf_counter()
        fault = photo_fault(tmp_path / "x.jpg")
        assert fault == " ".join(fault.split())
        assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_truncated_images_are_refused(kind):
    content = encoded(picture(), kind)
    for part in (0.3, 0.6, 0.9):
        with pytest.raises(Exception) as refused:
            UprightImage(content[: int(part * len(content))]).decoded(least=(1, 1))
        assert reason_of(refused.value).startswith(("does not decode", "is not an image"))


def test_heic_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoding._heic_registered.cache_clear()
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    try:
        fault = photo_fault(tmp_path / "a.heic")
    finally:
        decoding._heic_registered.cache_clear()
    assert fault == "HEIC needs pillow-heif: pip install -r requirements-extra.txt"


# ---------------------------------------------------------------- what the network sees


@pytest.mark.parametrize(("size", "S"), [((640, 427), 64), ((427, 640), 64), ((1000, 700), 96), ((200, 190), 64)])
def test_photo_pixels_are_those_of_a_whole_image_resized(size, S):
    """Against Pillow: decoded whole, resized, cut."""
    content = encoded(picture(300, 200).resize(size), "JPEG", quality=90)
    whole = Image.open(io.BytesIO(content))
    side = round(S * 256 / 224)
    width, height = (side * length // min(size) for length in size)
    left, top = round((width - S) / 2), round((height - S) / 2)
    expected = whole.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + S, top + S))
    pixels = photo_pixels(UprightImage(content), S).permute(1, 2, 0).numpy()
    assert pixels.shape == (S, S, 3)
    assert np.abs(pixels.astype(int) - np.asarray(expected, int)).mean() < 1.0


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (32, 32), (37, 70), (10000, 1), (1, 10000), (64, 73)])
def test_small_and_long_images(size):
    content = encoded(picture().resize(size), "PNG")
    pixels = photo_pixels(UprightImage(content), 64)
    assert (tuple(pixels.shape), str(pixels.dtype)) == ((3, 64, 64), "torch.uint8")
    if size == (32, 32):  # the border is kept
        expected = picture().resize(size).resize((64, 64), Image.Resampling.BILINEAR)
        assert difference(pixels.permute(1, 2, 0), expected) <= 1
