import shutil

import numpy as np
import pytest
from PIL import Image

import data
import readers
from utils import InputError, RunError


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
    assert readers.image_fault(tmp_path / "a.jpg") == ""
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert "does not decode" in readers.image_fault(tmp_path / "a.jpg")


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
    else:
        path.write_bytes({"empty": b"", "text": b"404: not found", "truncated": content[: len(content) // 2]}[kind])


@pytest.fixture
def damaged(photo_root, tmp_path):
    """A NUS-WIDE of which one image is damaged in each way; the names of those."""
    shutil.copytree(photo_root, tmp_path, dirs_exist_ok=True)
    kinds = ("missing", "folder", "empty", "text", "truncated")
    splits = data.load_nuswide(tmp_path / "datasets", tmp_path / "data")
    names = [*splits.query.names[:2], *splits.database.names[10:13]]
    for kind, name in zip(kinds, names, strict=True):
        damage(splits.query.root / name, kind)
    return tmp_path, dict(zip(kinds, map(str, names), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_found_and_only_they(damaged, workers):
    root, names = damaged
    splits = data.load_nuswide(root / "datasets", root / "data")
    everything = np.concatenate([splits.query.names, splits.database.names])
    bad = readers.find_bad_images(splits.query.root, everything, workers)
    assert bad.keys() == set(names.values())
    assert bad[names["missing"]] == "is missing"
    assert all(bad[names[kind]].startswith("does not decode (") for kind in ("folder", "empty", "text", "truncated"))


def test_bad_images_stop_the_run_or_are_left_out(damaged, caplog, monkeypatch):
    root, names = damaged
    load = lambda **kwargs: data.load_splits("NUSWIDE", "I", 1, root / "datasets", root / "data", **kwargs)  # noqa: E731
    with pytest.raises(InputError, match=r"5 of 90 images can not be used, .*--skip_bad_images") as caught:
        load()
    assert any(name in str(caught.value) for name in names.values())
    monkeypatch.setattr(data.LOG, "propagate", True)
    splits = load(skip_bad_images=True)
    assert "5 of 90 images are left out" in caplog.text
    assert all(name in caplog.text for name in names.values())
    assert [len(part) for part in (splits.query, splits.train, splits.database)] == [18, 67, 67]
    whole = data.load_nuswide(root / "datasets", root / "data").database
    kept = [i for i, name in enumerate(whole.names) if name not in names.values()]
    np.testing.assert_array_equal(splits.database.names, whole.names[kept])
    np.testing.assert_array_equal(splits.database.labels, whole.labels[kept])
    assert not splits.canonical


def test_an_image_that_becomes_unreadable_is_named(damaged):
    root, names = damaged
    images = data.load_nuswide(root / "datasets", root / "data").query
    with pytest.raises(RunError, match=names["missing"]):
        images.picture(0)


def test_grey_and_palette_images_become_rgb(tmp_path):
    Image.new("L", (9, 5), 100).save(tmp_path / "grey.jpg")
    Image.new("P", (9, 5)).save(tmp_path / "palette.png")
    Image.new("CMYK", (9, 5)).save(tmp_path / "print.jpg")
    names = np.array(["grey.jpg", "palette.png", "print.jpg"])
    images = readers.ImageFiles(tmp_path, names, np.zeros((3, 21), np.uint8))
    assert not readers.find_bad_images(tmp_path, names, 0)
    for i in range(3):
        assert (images.picture(i).mode, images.picture(i).size) == ("RGB", (9, 5))
