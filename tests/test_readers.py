import hashlib
import io
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import data
import decoding
import readers
from utils import InputError, RunError


def nuswide(root):
    return data.Source("NUSWIDE", "I", 1, root / "datasets", root / "data")


def files(folder, *names):
    return readers.ImageFiles(folder, np.array(names), np.zeros((len(names), 21), np.uint8))


def test_flickr25k_lists_are_read_as_they_stand(photo_root):
    folder = photo_root / "data" / "Flickr25k"
    images = readers.read_flickr25k(folder, photo_root / "datasets" / "Flickr25K" / "mirflickr")
    assert images.names.tolist() == [f"im{i}.jpg" for i in range(1, 126)]
    assert images.labels.dtype == np.uint8
    np.testing.assert_array_equal(images.labels, np.loadtxt(folder / "targets.txt"))
    assert images.picture(3).mode == "RGB"
    part = images.subset(np.array([5, 2]))
    assert part.names.tolist() == ["im6.jpg", "im3.jpg"]
    np.testing.assert_array_equal(part.labels, images.labels[[5, 2]])


def test_nuswide_lists_are_read_as_they_stand(photo_root):
    path = photo_root / "data" / "Nuswide" / "test.txt"
    images = readers.read_nuswide(path, photo_root)
    rows = [line.split() for line in path.read_text().splitlines()]
    assert images.names.tolist() == [row[0] for row in rows]
    assert images.labels.tolist() == [[int(x) for x in row[1:]] for row in rows]


def test_a_byte_order_mark_is_no_part_of_a_name(photo_root, tmp_path):
    original = (photo_root / "data" / "Nuswide" / "test.txt").read_bytes()
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbf" + original)
    assert readers.read_nuswide(tmp_path / "test.txt", tmp_path).names[0] == "sky/0000.jpg"


def test_large_images_are_decoded_without_a_word_and_bombs_refused(tmp_path, monkeypatch, recwarn):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9000)
    images = files(tmp_path, *["a.jpg"] * 500)
    assert images.faults(2) == {}
    assert images.picture(0).size == (100, 100)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "does not decode" in images.faults(2)["a.jpg"]
    with pytest.raises(RunError, match=r"a.jpg became unreadable"):
        images.picture(0)


def test_windows_line_ends_and_trailing_blank_lines_are_fine(photo_root, tmp_path):
    original = (photo_root / "data" / "Nuswide" / "test.txt").read_bytes()
    (tmp_path / "test.txt").write_bytes(original.replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert len(readers.read_nuswide(tmp_path / "test.txt", tmp_path)) == 20


ROW = " 0" * 21


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (f"a/1.jpg{ROW}\na/2.jpg{ROW} 1\n", r"list.txt:2: 22 labels instead of 21"),
        (f"a/1.jpg{ROW}\na/2.jpg{ROW[:-2]}\n", r"list.txt:2: 20 labels instead of 21"),
        (f"a/1.jpg{ROW[:-1]}2\n", r"list.txt:1: a label is '2' instead of 0 or 1"),
        (f"a/1.jpg{ROW[:-1]}x\n", r"list.txt:1: a label is 'x'"),
        (f"a/1.jpg{ROW}\n\na/2.jpg{ROW}\n", r"list.txt:2: the line is empty"),
        (f"a/1.jpg{ROW}\na/2.jpg{ROW}\na/1.jpg{ROW}\n", r"list.txt:3: 'a/1.jpg' stands in line 1 already"),
        (f"./a/1.jpg{ROW}\na/2.jpg{ROW}\na//1.jpg{ROW}\n", r"list.txt:3: 'a//1.jpg' stands in line 1 already"),
        (f".{ROW}\n", r"list.txt:1: '.' is no path below the image folder"),
        (f"../1.jpg{ROW}\n", r"list.txt:1: '../1.jpg' is no path below the image folder"),
        (f"a/../../1.jpg{ROW}\n", r"list.txt:1: .*is no path below"),
        (f"/etc/passwd{ROW}\n", r"list.txt:1: .*is no path below"),
        (f"a\\1.jpg{ROW}\n", r"list.txt:1: .*is no path below"),
        ("", r"list.txt is empty"),
        ("\n\n", r"list.txt is empty"),
        (b"\xff\xfe\x00", r"list.txt is not a readable text file"),
        (None, r"list.txt is missing: scripts/prepare_nuswide.py makes it"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(content, words, tmp_path):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as caught:
        readers.read_nuswide(path, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_different_length(photo_root, tmp_path):
    shutil.copytree(photo_root / "data" / "Flickr25k", tmp_path, dirs_exist_ok=True)
    targets = (tmp_path / "targets.txt").read_text().splitlines()
    (tmp_path / "targets.txt").write_text("\n".join(targets[:-1]))
    with pytest.raises(InputError, match=r"img.txt has 125 lines but .*targets.txt 124"):
        readers.read_flickr25k(tmp_path, tmp_path)
    (tmp_path / "targets.txt").write_text("\n".join([*targets[:6], targets[6][:-2], *targets[7:]]))
    with pytest.raises(InputError, match=r"targets.txt:7: 23 labels instead of 24"):
        readers.read_flickr25k(tmp_path, tmp_path)


# ---------------------------------------------------------------- images


def damage(path, kind):
    content = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes({"empty": b"", "text": b"404: not found", "truncated": content[: len(content) // 2]}[kind])


@pytest.fixture
def damaged(photo_root, tmp_path):
    """A NUS-WIDE of which one image is damaged in each way; the names of those."""
    shutil.copytree(photo_root, tmp_path, dirs_exist_ok=True)
    kinds = ("missing", "folder", "pipe", "empty", "text", "truncated")
    splits = data.load_nuswide(nuswide(tmp_path))
    names = [*splits.query.names[:2], *splits.database.names[10:14]]
    for kind, name in zip(kinds, names, strict=True):
        damage(splits.query.root / name, kind)
    return tmp_path, dict(zip(kinds, map(str, names), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_found_and_only_they(damaged, workers):
    root, names = damaged
    splits = data.load_nuswide(nuswide(root))
    bad = splits.query.joined(splits.database).faults(workers)
    assert bad.keys() == set(names.values())
    assert bad[names["missing"]] == "is missing"
    assert all(bad[names[kind]] == "is not a regular file" for kind in ("folder", "pipe"))
    assert all(bad[names[kind]].startswith("does not decode (") for kind in ("empty", "text", "truncated"))


def test_bad_images_stop_the_run_or_are_left_out(damaged, caplog, monkeypatch):
    root, names = damaged
    load = lambda **kwargs: data.load_splits(nuswide(root), **kwargs)  # noqa: E731
    with pytest.raises(InputError, match=r"6 of 90 images cannot be used, .*--skip_bad_images") as caught:
        load()
    assert any(name in str(caught.value) for name in names.values())
    monkeypatch.setattr(data.LOG, "propagate", True)
    splits = load(skip_bad_images=True)
    assert "6 of 90 images are left out" in caplog.text
    assert all(name in caplog.text for name in names.values())
    assert [len(part) for part in (splits.query, splits.train, splits.database)] == [18, 66, 66]
    whole = data.load_nuswide(nuswide(root)).database
    kept = [i for i, name in enumerate(whole.names) if name not in names.values()]
    np.testing.assert_array_equal(splits.database.names, whole.names[kept])
    np.testing.assert_array_equal(splits.database.labels, whole.labels[kept])
    assert not splits.canonical
    monkeypatch.setattr(data, "NAMED", 2)
    caplog.clear()
    load(skip_bad_images=True)
    assert "and 4 more (scripts/check_data.py lists them)" in caplog.text


def test_a_published_data_set_without_some_images_is_not_the_published_one(damaged, photo_root, monkeypatch):
    row = data.DATASETS["NUSWIDE"]
    as_published = replace(row, load=lambda source: replace(row.load(source), canonical=True))
    monkeypatch.setitem(data.DATASETS, "NUSWIDE", as_published)
    assert data.load_splits(nuswide(photo_root), skip_bad_images=True).canonical
    assert not data.load_splits(nuswide(damaged[0]), skip_bad_images=True).canonical


def test_an_image_that_becomes_unreadable_is_named(damaged):
    root, names = damaged
    images = data.load_nuswide(nuswide(root)).query
    for i, words in ((0, "No such file"), (1, "is not a regular file")):
        with pytest.raises(RunError, match=rf"{images.names[i]} became unreadable during the run .*{words}"):
            images.picture(i)
    assert images.names[0] == names["missing"]


def test_lists_that_are_no_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(InputError, match=r"list.txt is not a regular file"):
        readers.read_nuswide(tmp_path / "list.txt", tmp_path)
    with pytest.raises(InputError, match=rf"{tmp_path} is not a regular file"):
        readers.read_nuswide(tmp_path, tmp_path)
    os.mkfifo(tmp_path / "data_batch_1")
    with pytest.raises(InputError, match=r"data_batch_1 is not a readable CIFAR-10 batch .*not a regular file"):
        readers.read_cifar10_batch(tmp_path / "data_batch_1")


# ---------------------------------------------------------------- what tells images apart


def digest(images):
    content = hashlib.sha256()
    images.update(content)
    return content.hexdigest()


def test_images_in_memory_are_told_apart_by_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    images = readers.Images(pixels, np.arange(5))
    expected = [hashlib.blake2b(x.tobytes(), digest_size=16).hexdigest() for x in pixels]
    assert images.identities().tolist() == expected
    part = images.subset(np.array([3, 1]))
    assert part.identities().tolist() == [expected[3], expected[1]]
    assert part.joined(images).identities().tolist() == [expected[3], expected[1], *expected]
    assert digest(images) == hashlib.sha256(pixels.tobytes()).hexdigest()
    changed = replace(images, pixels=pixels ^ (np.arange(5) == 2)[:, None, None, None].astype(np.uint8))
    assert digest(changed) != digest(images) == digest(replace(images, labels=np.arange(5)[::-1]))
    assert [a == b for a, b in zip(changed.identities(), expected, strict=True)] == [True, True, False, True, True]
    assert (images.state(images.identities()), images.faults(2)) == ("", {})


def test_files_are_told_apart_by_name_size_and_time(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"12345")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    images = files(tmp_path, "b", "a", "c")
    assert images.identities().tolist() == ["b", "a", "c"]
    assert images.state(["a", "b"]) == json.dumps([(5, 10**18)] * 2)
    assert digest(images) == hashlib.sha256(json.dumps([["b", "a", "c"], [5, 5, 5]]).encode()).hexdigest()
    state, before = images.state(["a", "b"]), digest(images)
    os.utime(tmp_path / "c", ns=(10**18 + 1, 10**18 + 1))
    assert images.state(["a", "b"]) == state
    os.utime(tmp_path / "b", ns=(10**18 + 1, 10**18 + 1))  # same size
    assert images.state(["a", "b"]) != state
    assert digest(images) == before  # a copied data set is the same one
    assert digest(images.subset(np.array([1, 0, 2]))) != before
    (tmp_path / "b").write_bytes(b"123456")
    os.utime(tmp_path / "b", ns=(10**18, 10**18))  # same time
    assert images.state(["a", "b"]) != state
    assert digest(images) != before


# ---------------------------------------------------------------- decoding


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (9, 5), 100).save(tmp_path / "grey.jpg")
    Image.new("P", (9, 5)).save(tmp_path / "palette.png")
    Image.new("CMYK", (9, 5)).save(tmp_path / "print.jpg")
    names = ["grey.jpg", "palette.png", "print.jpg"]
    images = files(tmp_path, *names)
    assert not images.faults(0)
    for i in range(3):
        assert (images.picture(i).mode, images.picture(i).size) == ("RGB", (9, 5))


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_of_16_bits_the_high_byte_counts(kind, tmp_path):
    values = np.arange(0, 2**16, 77, dtype=np.uint16)[: 28 * 30].reshape(28, 30)
    if kind == "pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 30 28 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"a.{kind}")
    images = files(tmp_path, f"a.{kind}")
    assert images.faults(0) == {}
    np.testing.assert_array_equal(np.asarray(images.picture(0)), np.repeat((values >> 8)[..., None], 3, axis=2))


def jpeg(size=(90, 70), seed=0, **options):
    """A piece of a photograph, as the content of a JPEG file."""
    photo = load_sample_images().images[0]
    top, left = np.random.default_rng(seed).integers(0, 250, 2)
    file = io.BytesIO()
    Image.fromarray(photo[top : top + size[1], left : left + size[0]]).save(file, "JPEG", **options)
    return file.getvalue()


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


KINDS = {
    "low": {"quality": 20},
    "high": {"quality": 98},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 3},
    "RGB": {"keep_rgb": True, "subsampling": 0},
    "turned": oriented(6),
    "mirrored": oriented(2),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (33, 31), (127, 200)])
def test_opencv_decodes_to_the_same_bytes_as_pillow(kind, size, monkeypatch):
    content = jpeg(size, **KINDS[kind])
    monkeypatch.setattr(decoding.EncodedImage, "by_pillow", None)  # OpenCV did it
    ours = decoding.EncodedImage(content).decoded()
    np.testing.assert_array_equal(ours, np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    for scale in (2, 4, 8):
        least = (max(size[0] // scale, 1), max(size[1] // scale, 1))
        theirs = Image.open(io.BytesIO(content))
        theirs.draft("RGB", least)
        ours = decoding.EncodedImage(content).decoded(least)
        np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_reduced_sizes_are_those_of_pillows_draft_mode():
    generator = np.random.default_rng(0)
    for size in [(8, 8), (9, 17), (100, 64), (333, 127), (640, 480)]:
        content = jpeg((640, 427) if size == (640, 480) else size)
        for _ in range(60):
            least = tuple(int(side) for side in generator.integers(1, [2 * size[0], 2 * size[1]]))
            theirs = Image.open(io.BytesIO(content))
            whole = theirs.size
            theirs.draft("RGB", least)
            image = decoding.EncodedImage(content)
            scale = image.scale(least)
            assert (-(-whole[0] // scale), -(-whole[1] // scale)) == theirs.size
            assert image.decoded(least).shape == (theirs.size[1], theirs.size[0], 3)


def pixels_for_views(images):
    with images.opened(0) as image:
        return image.decoded()


def pixels_for_tests(images):
    return np.asarray(images.picture(0))


@pytest.mark.parametrize("pixels", [pixels_for_views, pixels_for_tests])
def test_images_that_are_no_plain_jpeg_are_pillows(pixels, tmp_path, monkeypatch):
    photo = Image.fromarray(load_sample_images().images[0][:40, :50])
    for name, picture in (
        ("grey.jpg", photo.convert("L")),
        ("print.jpg", photo.convert("CMYK")),
        ("palette.png", photo.convert("P")),
        ("alpha.png", photo.convert("RGBA")),
        ("plain.png", photo),
        ("plain.webp", photo),
    ):
        picture.save(tmp_path / name)
        monkeypatch.setattr(decoding, "_decoded_by_opencv", None)
        theirs = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        np.testing.assert_array_equal(pixels(files(tmp_path, name)), theirs)


@pytest.mark.parametrize("pixels", [pixels_for_views, pixels_for_tests])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", ["cut", "cut, with an end", "early end", "no end", "zeros", "marker"])
def test_damaged_jpegs_end_as_pillow_ends_them(kind, progressive, pixels, tmp_path):
    """Either both raise or both give the same pixels: OpenCV, asked alone, fills in what is missing."""
    generator = np.random.default_rng(0)
    raised = 0
    for seed in range(30):
        content = jpeg((120, 80), seed, progressive=progressive, quality=85)
        place = int(generator.integers(700, len(content) - 40))
        damaged = {
            "cut": content[:place],
            "cut, with an end": content[:place] + b"\xff\xd9",
            "early end": content[:place] + b"\xff\xd9" + content[place + 2 :],
            "no end": content[:-2],
            "zeros": content[:place] + bytes(20) + content[place + 20 :],
            "marker": content[:place] + b"\xff" + bytes([generator.integers(1, 255)]) + content[place + 2 :],
        }[kind]
        (tmp_path / "a.jpg").write_bytes(damaged)
        try:
            theirs = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
        except OSError:
            raised += 1
            with pytest.raises(RunError, match=r"a.jpg became unreadable during the run"):
                pixels(files(tmp_path, "a.jpg"))
        else:
            np.testing.assert_array_equal(pixels(files(tmp_path, "a.jpg")), theirs)
    assert raised == 30 or kind != "cut"
