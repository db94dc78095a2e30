"""Nonsense from outside: flag values, image files, full disks, damaged files of tables and reports. One of each kind by
default; `scripts/test.sh --hostile` (MECOQ_HOSTILE=1) tries hundreds."""

import itertools
import json
import os
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import HOSTILE, LIVELY, SEED, SMALL, SQUEEZENET, call, damages, small_run
from PIL import Image
from sklearn.datasets import load_sample_images

import main
from config import rows


def one_line(error):
    """The single line of an error; warnings stand in lines of their own."""
    lines = [line for line in error.splitlines() if line.strip() and not line.startswith("WARNING: ")]
    assert len(lines) == 1, error
    assert lines[0].startswith("error: "), error
    return lines[0]


# ---------------------------------------------------------------- flag values

STRANGE = ["nan", "inf", "-inf", "1e39", "-1e39", "1e400", "0", "-1", "-0.0", "", " ", "0x10", "1_000", "٣", "9" * 400,
           "1e-400", "None", "true", "[]", "../..", "a\0b".replace("\0", "\u0001"), "\udcff", "💥", "x" * 5000, "--lr",
           "2147483648", "18446744073709551616"]  # fmt: skip
TAKING = [flag.name for flag in rows("MeCoQ").values() if not isinstance(flag.default, bool) and not flag.recipe]


def strange_flags():
    pairs = list(itertools.product(TAKING, STRANGE))
    generator = np.random.default_rng(SEED)
    for i in generator.permutation(len(pairs))[: 400 if HOSTILE else 40]:
        yield pairs[i]


@pytest.mark.parametrize(("flag", "value"), list(strange_flags()), ids=lambda x: ascii(x)[:30])
def test_strange_values_are_taken_or_refused_in_one_line(flag, value, capsys):
    code = main.main([f"--{flag}={value}", "--dry_run"])
    assert code in (0, 2)
    if code:
        assert one_line(capsys.readouterr().err)


EXTREME = [
    f"--{flag}={value}"
    for flag in ("lr", "hp_beta", "hp_gamma", "alpha", "T", "start_lr", "final_lr", "lr_scaling", "hp_lambda")
    for value in ("1e30", "1e-30")
]


@pytest.mark.parametrize("flag", EXTREME if HOSTILE else EXTREME[:2])
def test_extreme_values_end_in_a_result_or_in_one_line(flag, tmp_path, capsys):
    code = main.main([*SMALL, "--hp_lambda", "0.1", flag, "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert code in (0, 1, 2)
    if code:
        one_line(error)
    else:
        metrics = json.loads(next(tmp_path.glob("checkpoints/*/metrics.json")).read_text())
        assert 0 <= metrics["map"] <= 1


# ---------------------------------------------------------------- image files


def photo():
    return Image.fromarray(load_sample_images().images[1][100:180, 100:200])


def saved(form, change=lambda picture: picture, **options):
    """A function that writes the photo."""
    return lambda path: change(photo()).save(path, format=form, **options)


def cut(share, form="JPEG"):
    def write(path):
        photo().save(path, format=form)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def changed(at, form="JPEG"):
    def write(path):
        photo().save(path, format=form)
        content = bytearray(path.read_bytes())
        content[int(at * len(content))] ^= 0xFF
        path.write_bytes(content)

    return write


def png_of_size(width, height):
    """A PNG that claims a size, with little in it."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(content)


def frames(form):
    return lambda path: photo().save(path, format=form, save_all=True, append_images=[photo().rotate(90)])


def exif(orientation):
    def write(path):
        tags = Image.Exif()
        tags[0x0112] = orientation
        photo().save(path, format="JPEG", exif=tags)

    return write


def content(data):
    return lambda path: path.write_bytes(data)


def loop(path):
    path.symlink_to(path)


GOOD = {
    **{f"PNG {mode}": saved("PNG", lambda p, mode=mode: p.convert(mode)) for mode in ("L", "1", "P", "RGBA", "LA")},
    "PNG 16 bits": lambda path: Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(path, "PNG"),
    **{f"JPEG {mode}": saved("JPEG", lambda p, mode=mode: p.convert(mode)) for mode in ("L", "CMYK", "YCbCr")},
    "progressive": saved("JPEG", progressive=True), "quality 1": saved("JPEG", quality=1),
    "4:4:4": saved("JPEG", subsampling=0), "restart": saved("JPEG", restart_marker_blocks=1),
    **{f"orientation {i}": exif(i) for i in range(10)},
    "one pixel": saved("PNG", lambda p: p.resize((1, 1))), "one row": saved("JPEG", lambda p: p.resize((300, 1))),
    "one column": saved("JPEG", lambda p: p.resize((1, 300))),
    **{form: saved(form) for form in ("BMP", "PPM", "TIFF", "GIF", "WEBP", "ICO", "TGA")},
    **{f"{form} frames": frames(form) for form in ("GIF", "TIFF", "WEBP", "PNG")},
    "trailing": lambda path: (saved("JPEG")(path), path.write_bytes(path.read_bytes() + b"more")),
}  # fmt: skip
BAD = {
    "empty": content(b""), "text": content(b"404: not found"), "html": content(b"<html></html>"),
    "zip": content(b"PK\x03\x04"), "pickle": content(b"\x80\x04N."), "zeros": content(bytes(5000)),
    "jpeg head": content(b"\xff\xd8\xff\xe0"), "huge": png_of_size(100000, 100000), "wide": png_of_size(2**31 - 1, 1),
    "no pixels": png_of_size(10, 10), "none wide": png_of_size(0, 10), "folder": lambda path: path.mkdir(),
    "fifo": os.mkfifo, "broken link": lambda path: path.symlink_to("nowhere"), "loop": loop,
    "device": lambda path: path.symlink_to("/dev/zero"), "cut": cut(0.5), "cut late": cut(0.98), "cut early": cut(0.05),
    "png cut": cut(0.5, "PNG"), "webp cut": cut(0.5, "WEBP"),
}  # fmt: skip
DOUBTFUL = {f"{form} {at}": changed(at, form) for form in ("JPEG", "PNG") for at in (0.01, 0.1, 0.5, 0.9)}
IMAGES = GOOD | BAD | DOUBTFUL
assert len(IMAGES) >= 60


@pytest.fixture(scope="module")
def few_photos(tmp_path_factory, photo_root):
    """A small Flickr25K of which one image may be replaced."""
    root = tmp_path_factory.mktemp("few")
    shutil.copytree(photo_root, root, dirs_exist_ok=True)
    return root


@pytest.mark.parametrize("name", IMAGES if HOSTILE else ["PNG 16 bits", "fifo", "cut", "huge"])
def test_images_are_used_or_named(name, few_photos, tmp_path, capsys):
    path = few_photos / "datasets/Flickr25K/mirflickr/im9.jpg"
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    IMAGES[name](path)
    flags = [*SMALL, "--dataset", "Flickr25K", "--data_root", str(few_photos / "datasets"), "--limit", "1000",
             "--list_root", str(few_photos / "data"), "--epoch_num", "1", "--output", str(tmp_path)]  # fmt: skip
    code = main.main(flags)
    error = capsys.readouterr().err
    if name in GOOD:
        assert code == 0, error
    elif name in BAD:
        assert code == 2
    assert code in (0, 2)
    if code:
        assert "im9.jpg" in one_line(error)
    assert main.main([*flags, "--skip_bad_images", "--overwrite"]) == 0


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize("kib", np.geomspace(40, 2500, 20).astype(int) if HOSTILE else [300])
def test_a_disk_of_any_size_ends_a_run_in_one_line_and_loses_nothing(kib, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        flags = [*SMALL, *LIVELY, "--output", str(disk), "--notes", "small"]
        code = main.main(flags)
        error = capsys.readouterr().err
        assert code in (0, 1, 2)
        if code:
            assert "No space left" in one_line(error)
        assert not [path for path in disk.rglob("*.tmp") if path.suffix != ".log.tmp" and path.stat().st_size]
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        again = "--resume" if (disk / "checkpoints/small/last.cpt").exists() else "--overwrite"
        assert main.main([*flags, again]) == 0
        expected = small_run(tmp_path / "whole", *LIVELY)
        for name in ("model.cpt", "db_codes.npy", "PR_curve.txt"):
            assert (disk / "checkpoints/small" / name).read_bytes() == (expected / name).read_bytes()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# ---------------------------------------------------------------- damaged files of tables and reports

TABLE = ["--datasets", "Digits", "--bits", "16", "--seeds", "1", "--layers", "0", *SQUEEZENET, "--limit", "100",
         "--epoch_num", "2", "--topK", "20", "--num_workers", "0", "--batch_size", "40"]  # fmt: skip


@pytest.fixture(scope="module")
def table(weights, tmp_path_factory):
    """A finished table: its folder, a function that makes it again below another folder, and its first MAP."""
    folder = tmp_path_factory.mktemp("table")

    def make(where):
        places = [f"--{name}={where / name}" for name in ("results", "trials", "view_cache", "feature_cache")]
        return call("layers", *TABLE, *places, "--weights", weights)

    assert make(folder) == 0
    return folder, make


def maps(folder):
    return (folder / "results" / "layers.csv").read_text().splitlines()[1].split(",")[5]


@pytest.mark.parametrize("kind", ["trials/*.json", "view_cache/*/epoch001.npy", "view_cache/*/epoch000.json",
                                  "feature_cache/*/features.npy"])  # fmt: skip
def test_damaged_files_never_reach_a_table(kind, table, tmp_path, capsys):
    folder, make = table
    for case, damage in damages(kind, 25 if HOSTILE else 2):
        where = tmp_path / str(case)
        shutil.copytree(folder, where)
        if not kind.startswith("trials"):
            shutil.rmtree(where / "trials")
        (path,) = where.glob(kind)
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        code = make(where)
        assert code in (0, 2), case
        if code:
            assert path.name in one_line(capsys.readouterr().err)
        else:
            assert maps(where) == maps(folder), case
        shutil.rmtree(where)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    output = tmp_path_factory.mktemp("reported")
    small_run(output, *LIVELY, "--limit", "40", "--epoch_num", "1")
    return output


@pytest.mark.parametrize("name", ["metrics.json", "db_codes.npy", "db_targets.npy", "PR_curve.txt", "model.cpt"])
def test_a_report_on_damaged_files_is_made_or_refused_in_one_line(name, reported, tmp_path, capsys):
    for case, damage in damages(name, 15 if HOSTILE else 1):
        output = tmp_path / str(case)
        shutil.copytree(reported, output)
        path = output / "checkpoints/small" / name
        path.write_bytes(damage(path.read_bytes()))
        capsys.readouterr()
        code = call("report", "small", "--output", output, "--queries", 1)
        assert code in (0, 2), case
        if code:
            one_line(capsys.readouterr().err)
            assert not Path(output / "checkpoints/small/report.html").exists()
        shutil.rmtree(output)
