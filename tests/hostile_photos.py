"""A folder of images as users have them: every format, every turn, odd names, damage, and what is no image at all."""

import io
import os
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features
from sklearn.datasets import load_sample_images

T = Image.Transpose
# EXIF's orientation -> what makes of an upright picture the one that is stored
STORED = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE,
          8: T.ROTATE_270}  # fmt: skip
ORIENTATION = 0x0112


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """A crop of a photograph."""
    return Image.fromarray(load_sample_images().images[0][100 : 100 + height, 200 : 200 + width])


def mosaic() -> Image.Image:
    """Blocks of 16 pixels of one colour each: as `turned` encodes it, JPEG keeps it the same however it is turned."""
    return picture().resize((10, 7)).resize((160, 112), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """An upright picture as a camera that was turned stores it."""
    return image.transpose(STORED[orientation]) if orientation in STORED else image


def turned(orientation: int) -> bytes:
    """The mosaic as a JPEG that a camera held otherwise made."""
    return encoded(stored(mosaic(), orientation), "JPEG", quality=100, subsampling=0, exif=exif(orientation))


def heic_can_be_written() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return "HEIF" in Image.SAVE


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is large, with no pixels to speak of."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A JPEG whose header says that it is of another size."""
    content = bytearray(encoded(picture(), "JPEG"))
    start = content.index(b"\xff\xc0")
    content[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def sound_contents() -> dict[str, bytes]:
    """Every format and mode that can be used, by file name."""
    image, grey = picture(), np.asarray(picture().convert("L"))
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(grey))
    palette = image.quantize(32)
    frames = {"save_all": True, "append_images": [image.transpose(T.ROTATE_180), image]}
    found = {
        "plain.jpg": encoded(image, "JPEG"),
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "grey.jpeg": encoded(image.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "cmyk.tif": encoded(image.convert("CMYK"), "TIFF"),
        "two.mpo": encoded(image, "MPO", save_all=True, append_images=[image]),
        "plain.png": encoded(image, "PNG"),
        "alpha.png": encoded(clear, "PNG"),
        "grey_alpha.png": encoded(clear.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "16bit.png": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "1bit.png": encoded(image.convert("1"), "PNG"),
        "float.tiff": encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "pages.tiff": encoded(image, "TIFF", compression="tiff_lzw", **frames),
        "plain.webp": encoded(image, "WEBP"),
        "moving.webp": encoded(image, "WEBP", **frames),
        "moving.gif": encoded(palette, "GIF", save_all=True, append_images=[palette.transpose(T.ROTATE_180)]),
        "plain.bmp": encoded(image, "BMP"),
        "one_pixel.png": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "line.png": encoded(Image.new("RGB", (10000, 1), "blue"), "PNG"),
        "bad_exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0nothing"),
        "orientation_99.jpg": encoded(image, "JPEG", exif=exif(99)),
        "zip_behind.jpg": encoded(image, "JPEG") + b"PK\x05\x06" + bytes(18),
        "png_named.jpg": encoded(image, "PNG"),
        "UPPER.JPG": encoded(image, "JPEG"),
        "no_suffix": encoded(image, "WEBP"),
    }
    found |= {f"turned{o}.jpg": turned(o) for o in range(1, 9)}
    found |= {"plain.avif": encoded(image, "AVIF")} if features.check("avif") else {}
    return found | ({"plain.heic": encoded(image, "HEIF")} if heic_can_be_written() else {})


def unusable_contents() -> dict[str, bytes]:
    """Damage, bombs, and what is no image, by file name."""
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture(), "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    return {
        "empty.jpg": b"",
        "text.jpg": b"not an image\n",
        "page.png": b"<!doctype html><html></html>",
        "archive.png": archive.getvalue(),
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": encoded(picture(), "WEBP")[:400],
        "truncated.gif": encoded(picture(), "GIF")[:900],
        "truncated.bmp": encoded(picture(), "BMP")[:900],
        "begins_only.png": png[:20],
        "begins_only": jpeg[:30],
        "bomb.png": png_header(50000, 50000),
        "bomb.jpg": jpeg_of_size(65500, 65500),
        "zeros.tif": b"II*\0" + bytes(100),
        "noise.avif": b"\0\0\0\x1cftypavif" + np.random.default_rng(0).bytes(300),
        "noise.heic": b"\0\0\0\x1cftypheic" + np.random.default_rng(1).bytes(300),
    }


ODD_NAMES = ("new\nline.jpg", "two  spaces .jpg", "quote's \"name\".jpg", "\U0001f408.jpg", "n" * 196 + ".jpg",
             "-flag.jpg", "semi;colon&.jpg", "sub folder/deep/er/x.jpg", "comma,.jpg",
             os.fsdecode(b"\xff\xfe.jpg"))  # fmt: skip


def write_hostile_photos(folder: Path) -> dict[str, str]:
    """Fill a folder with about 75 entries. Returns name -> "sound" or "unusable" for all that are listed as images;
    hidden files, and those whose suffix is no image's, are not."""
    sound, unusable = sound_contents(), unusable_contents()
    sound |= dict.fromkeys(ODD_NAMES, sound["plain.jpg"])
    ignored = {".hidden.jpg": sound["plain.jpg"], ".cache/x.jpg": sound["plain.jpg"], "notes.txt": b"a", "README": b"b",
               "Thumbs.db": b"\xd0\xcf\x11\xe0", "film.mp4": b"\0\0\0\x18ftypmp42", "nothing": b""}  # fmt: skip
    for name, content in (sound | unusable | ignored).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = dict.fromkeys(sound, "sound") | dict.fromkeys(unusable, "unusable")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.jpg").write_bytes(sound["plain.jpg"])
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listening:
        place = os.open(folder, os.O_RDONLY)  # a socket's path must be short
        listening.bind(f"/proc/self/fd/{place}/socket.jpg" if Path("/proc/self/fd").exists() else "socket.jpg")
        os.close(place)
    links = {"link.jpg": "plain.jpg", "dangling.jpg": "nowhere.jpg", "self.jpg": "self.jpg", "around": ".",
             "linked_folder": "folder.jpg"}  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found |= {"folder.jpg/inside.jpg": "sound", "link.jpg": "sound"}
    found |= dict.fromkeys(("pipe.jpg", "socket.jpg", "dangling.jpg", "self.jpg"), "unusable")
    if os.geteuid() != 0:
        (folder / "secret.jpg").write_bytes(sound["plain.jpg"])
        (folder / "secret.jpg").chmod(0)
        found["secret.jpg"] = "unusable"
    return found
