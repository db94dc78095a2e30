"""`python -m search index`: what it reads and what it leaves alone, kills, several processes, wrong input."""

import os
import shutil
import signal
import subprocess
import sys

import index_forks
import numpy as np
import pytest
from helpers import HOSTILE, ROOT, SEED, Killed, asked, wait_for, write_photos
from index_forks import FakeEncoder, fakes, found, index, left_out, write_files, write_place, write_run

from search import __main__ as command
from search import indexing
from search.decode import decode_photo
from search.encoder import Encoder
from search.store import Store, read_info
from search.writing import Writer
from utils import InputError, RunError, run_script, sha256

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def place(tmp_path):
    return write_place(tmp_path)


def codes_of(rows):
    return {name: code for name, (_, code) in rows.items()}


# ---------------------------------------------------------------- updates


def test_an_update_reads_only_what_is_new_or_changed(place):
    photos = place / "photos"
    write_files(photos, {"a/bad.jpg": b"broken 1", "a/bad2.jpg": b"broken 2"})
    assert len(index(place)) == 32
    before = found(place)
    assert left_out(place) == {"a/bad.jpg": "is broken", "a/bad2.jpg": "is broken"}
    assert index(place, "--update") == []
    write_files(photos, {"a/00.jpg": b"other", "c/new.jpg": b"new", "b/01.jpg": b"broken now", "a/bad.jpg": b"mended"})
    (photos / "a" / "02.jpg").unlink()
    (photos / "a" / "bad2.jpg").unlink()
    assert index(place, "--update") == ["a/00.jpg", "a/bad.jpg", "b/01.jpg", "c/new.jpg"]
    after = found(place)
    assert after.keys() == before.keys() - {"a/02.jpg", "b/01.jpg"} | {"c/new.jpg", "a/bad.jpg"}
    assert left_out(place) == {"b/01.jpg": "is broken"}
    ids = {name: image for name, (image, _) in after.items()}
    assert [ids.pop(name) for name in ("a/00.jpg", "a/bad.jpg", "c/new.jpg")] == [30, 31, 32]
    assert all(after[name] == before[name] for name in ids)
    assert after["a/00.jpg"][1] != before["a/00.jpg"][1]
    write_files(photos, {"a/02.jpg": b"image 2"})
    assert index(place, "--update") == ["a/02.jpg"]
    assert found(place)["a/02.jpg"] == (33, before["a/02.jpg"][1])


def test_what_is_added_and_removed_gives_what_a_new_index_gives(tmp_path):
    n = 3000 if HOSTILE else 300
    write_run(tmp_path / "run")
    write_files(tmp_path / "photos", {f"{i:05d}.png": f"old {i}".encode() for i in range(n)})
    index(tmp_path, "--shard", n // 4)
    before = found(tmp_path)
    write_files(tmp_path / "photos", {f"{i:05d}x.png": f"new {i}".encode() for i in range(0, n, 3)})
    for i in range(0, n // 3, 2):
        (tmp_path / "photos" / f"{i:05d}.png").unlink()
    assert len(index(tmp_path, "--update")) == n // 3
    after = found(tmp_path)
    assert len(after) == n + n // 3 - n // 6
    assert all(after[name] == before[name] for name in before.keys() & after.keys())
    (tmp_path / "index").rename(tmp_path / "old")
    index(tmp_path)
    assert codes_of(found(tmp_path)) == codes_of(after)


def test_what_a_user_removed_stays_out_until_it_changes(place):
    index(place)
    assert index(place, "--remove", "a/00.jpg", "b/") == []
    names = {f"a/{i:02d}.jpg" for i in range(2, 30, 2)}
    assert found(place).keys() == names
    assert left_out(place)["a/00.jpg"] == "was removed by --remove"
    assert index(place, "--remove", "b/", "--strict") == []
    (place / "photos" / "b" / "03.jpg").unlink()
    write_files(place / "photos", {"a/00.jpg": b"other"})
    assert index(place, "--update") == ["a/00.jpg"]
    assert found(place).keys() == names | {"a/00.jpg"}
    write_files(place / "photos", {"b/03.jpg": b"image 3"})
    assert index(place, "--update") == []
    for name in ("nix.jpg", "a/00.jp", "c/", "a"):
        with pytest.raises(InputError, match="no such image"):
            index(place, "--remove", "a/02.jpg", name)
    assert "a/02.jpg" in found(place)


def test_what_is_in_a_folder_that_cannot_be_listed_is_not_gone(place, monkeypatch):
    index(place)
    before, scandir = found(place), os.scandir
    (place / "photos" / "a" / "00.jpg").unlink()

    def failing(path):
        if os.fsencode(path).endswith(b"/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert index(place, "--update") == []
    assert found(place).keys() == before.keys() - {"a/00.jpg"}


def test_a_list_names_files_as_it_writes_them(tmp_path):
    write_run(tmp_path / "run")
    write_files(tmp_path / "lists" / "near", {"1.jpg": b"1", "2.jpg": b"2"})
    write_files(tmp_path / "far", {"3.jpg": b"3", os.fsdecode(b"\xff.jpg"): b"4"})
    source = tmp_path / "lists" / "all.txt"
    far = tmp_path / "far"
    lines = [
        "near/2.jpg",
        "",
        "near/1.jpg\r",
        f"{far}/3.jpg",
        "near/2.jpg",
        "gone.jpg",
        f"{far}/" + os.fsdecode(b"\xff.jpg"),
    ]
    source.write_bytes(os.fsencode("\n".join(lines)))
    with fakes():
        indexing.main([str(source), "--model", str(tmp_path / "run"), "-o", str(tmp_path / "index")])
    names = {"near/1.jpg", "near/2.jpg", f"{far}/3.jpg", f"{far}/\udcff.jpg"}
    assert found(tmp_path).keys() == names
    assert left_out(tmp_path) == {"gone.jpg": "is missing"}
    store = Store.open(tmp_path / "index")
    assert sorted(store.path(image).read_bytes() for image in store.ids) == [b"1", b"2", b"3", b"4"]
    source.write_text("near/1.jpg\ngone.jpg\n")
    with fakes() as pool:
        indexing.main(["-o", str(tmp_path / "index"), "--update"])
        assert not pool.opened
    assert found(tmp_path).keys() == {"near/1.jpg"}


def test_odd_names_stand_in_skipped_csv(tmp_path):
    write_run(tmp_path / "run")
    odd = ['a,"b".jpg', "new\nline.jpg", "é.jpg", os.fsdecode(b"\xe9.jpg"), "=1+1.jpg"]
    write_files(tmp_path / "photos", {"sound.jpg": b"1"} | dict.fromkeys(odd, b"broken"))
    index(tmp_path)
    expected = sorted(odd, key=os.fsencode)
    assert [*left_out(tmp_path)] == [name.replace("\udce9", "\\udce9") for name in expected]


def test_an_approximate_search_is_measured_by_a_hundred_images(place, monkeypatch):
    write_files(place / "photos", {f"d/{i:04d}.jpg": f"d {i}".encode() for i in range(500)})
    calls = []

    def build(path, codewords, codes, kind, queries):
        path.write_bytes(kind.encode())
        calls.append((kind, codes, *queries))
        return {"kind": kind, "nlist": 7, "recall": {}}

    monkeypatch.setattr(index_forks.FAKE_ANN, "build", build)
    assert len(index(place, "--kind", "ivf")) == 530 + 100
    ((kind, codes, vectors, own),) = calls
    assert kind == "ivf"
    assert len(codes) == 530
    expected = np.concatenate([FakeEncoder.codewords[m, codes[::5, m]] for m in range(4)], axis=1)[:100]
    assert vectors.tolist() == expected.tolist()
    assert own.tolist() == list(range(0, 500, 5))
    assert read_info(place / "index")["index"] == {"kind": "ivf", "nlist": 7, "recall": {}}
    write_files(place / "photos", {"new.jpg": b"new"})
    assert len(index(place, "--update")) == 101
    assert index(place, "--update") == []
    assert index(place, "--update", "--kind", "flat") == []
    assert index(place, "--update") == []
    assert [kind for kind, *_ in calls] == ["ivf", "ivf", "flat"]
    assert calls[-1][2].shape == (0, 8)
    (place / "photos" / "a" / "00.jpg").rename(place / "elsewhere.jpg")
    index(place, "--remove", "a/02.jpg", "--kind", "ivf")
    assert calls[-1][3].tolist() == list(range(5, 500, 5))


def test_folders_may_have_names_of_any_kind(place):
    odd = place / "\udcff \udcfe"
    odd.mkdir()
    (place / "photos").rename(odd / "photos")
    (place / "run").rename(odd / "run")
    index(odd)
    assert len(found(odd)) == 30
    assert index(odd, "--update") == []


# ---------------------------------------------------------------- one line for what is wrong


def line_of(capsys, *argv):
    with fakes():
        assert run_script(lambda: command.main(["index", *map(str, argv)])) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    return output.err


def test_wrong_input_ends_in_one_line(place, capsys):
    photos, run, target = place / "photos", ["--model", place / "run"], ["-o", place / "index"]
    assert "is no index yet" in line_of(capsys, *target, "--update")
    assert "does not exist" in line_of(capsys, place / "none", *run, *target)
    assert "is no list" in line_of(capsys, place / "run" / "model.cpt", *run, *target)
    assert "no images in it" in line_of(capsys, place / "run", *run, *target)
    assert "is inside of" in line_of(capsys, photos, *run, "-o", photos / "index")
    assert "not empty" in line_of(capsys, photos, *run, "-o", place / "run")
    assert "--rank and --world" in line_of(capsys, photos, *run, *target, "--rank", 1)
    assert "from 0 to 1" in line_of(capsys, photos, *run, *target, "--rank", 2, "--world", 2)
    assert "--shard 0" in line_of(capsys, photos, *run, *target, "--shard", 0)
    index(place)
    assert "--update brings it up to date" in line_of(capsys, photos, *run, *target)
    assert "was made with int8" in line_of(capsys, *target, "--update", "--features", "half")
    assert "was made with 4096" in line_of(capsys, *target, "--update", "--shard", "5")
    assert f"is of {photos}" in line_of(capsys, place, *target, "--update")
    (place / "run" / "model.cpt").write_bytes(b"another")
    assert "another model" in line_of(capsys, *run, *target, "--update")
    write_files(photos, {"bad.jpg": b"broken"})
    assert "1 files cannot be used" in line_of(capsys, *target, "--update", "--strict")
    assert "bad.jpg" in left_out(place)


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"


def test_it_is_one_process_at_a_time(place, capsys):
    index(place)
    lock = place / "index" / ".lock"
    command = [sys.executable, "-c", HOLD, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        assert "another process" in line_of(capsys, "-o", place / "index", "--update")
        other.stdin.write("\n")


def test_photos_that_go_away_end_it_and_what_is_committed_stays(place, monkeypatch):
    moved, photos = place / "elsewhere", place / "photos"

    def leave(path):
        if path.endswith("a/16.jpg"):
            photos.rename(moved)

    opened = type("Leaving", (list,), {"append": lambda self, path: leave(path)})()
    with fakes() as pool:
        pool.opened = opened
        with pytest.raises(RunError, match="is gone"):
            indexing.main([str(photos), "--model", str(place / "run"), "-o", str(place / "index"), "--shard", "4"])
    moved.rename(photos)
    assert len(index(place)) == 30 - 8
    assert len(found(place)) == 30
    assert left_out(place) == {}


def test_an_index_folder_that_goes_away_ends_it(place):
    opened = type("Removing", (list,), {"append": lambda self, _: shutil.rmtree(place / "index", ignore_errors=True)})()
    with fakes() as pool:
        pool.opened = opened
        with pytest.raises(RunError, match="lock was removed"):
            indexing.main([str(place / "photos"), "--model", str(place / "run"), "-o", str(place / "index")])
    assert not (place / "index").exists()


def test_a_file_that_goes_away_meanwhile_is_left_out(place, monkeypatch):
    path = place / "photos" / "a" / "04.jpg"
    opened = type("Leaving", (list,), {"append": lambda self, other: path.unlink(missing_ok=True)})()
    with fakes() as pool:
        pool.opened = opened
        indexing.main([str(place / "photos"), "--model", str(place / "run"), "-o", str(place / "index")])
    assert len(found(place)) == 29
    assert left_out(place) == {}
    assert index(place, "--update") == []


# ---------------------------------------------------------------- kills


@pytest.fixture(scope="module")
def forked():
    """Call the verb in a process of its own: see index_forks.py."""
    with asked("index_forks.py") as ask:
        yield lambda *argv, kill=None, number=signal.SIGKILL: ask(argv, kill=kill, number=number)


def digests(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}


def steps_of(photos, target):
    """Flags, and how the photos change before: an index, an update, a removal."""
    yield [photos, "--model", photos.parent / "run", "-o", target, "--shard", 4], lambda: None
    changed = {"a/00.jpg": b"other", "b/03.jpg": b"broken now", "zz.jpg": b"new"} | {
        f"c/{i}.jpg": f"c {i}".encode() for i in range(9)
    }
    yield ["-o", target, "--update"], lambda: (write_files(photos, changed), (photos / "a" / "02.jpg").unlink())
    yield ["-o", target, "--remove", "c/", "a/04.jpg"], lambda: None


def write_source(folder):
    contents = {f"{'ab'[i % 2]}/{i:02d}.jpg": f"{'broken' if i % 7 == 5 else 'image'} {i}".encode() for i in range(26)}
    write_files(folder / "photos", contents)
    write_run(folder / "run")


def test_killed_again_and_again_it_ends_with_the_same_files(forked, tmp_path):
    """Each step is killed at random moments, then finished."""
    generator, kills, wanted = np.random.default_rng(SEED), 0, 200 if HOSTILE else 6
    source = tmp_path / "source"
    write_source(source)
    answers, expected = [], []
    for flags, change in steps_of(source / "photos", tmp_path / "expected"):
        change()
        answers.append(forked(*flags))
        assert answers[-1]["rc"] == 0, answers[-1]
        expected.append(digests(tmp_path / "expected"))
    for trial in range(10**6):
        (tmp_path / "source").rename(tmp_path / f"used{trial}")
        write_source(source)
        target = tmp_path / f"index{trial}"
        for (flags, change), answer, files in zip(steps_of(source / "photos", target), answers, expected, strict=True):
            change()
            for _ in range(generator.integers(1, 5)):
                moment = float(generator.random() * answer["seconds"] * 1.1)
                killed = forked(*flags, kill=moment)
                kills += killed["rc"] == -signal.SIGKILL
                assert killed["rc"] in (0, -signal.SIGKILL) or "is there already" in killed["err"], killed
            last = forked(*flags)
            assert last["rc"] == 0 or "is there already" in last["err"], last
            assert digests(target) == files
        if kills >= wanted:
            break
    print(f"\n{kills} kills in {trial + 1} trials (seed {SEED})")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_one_line(number, forked, tmp_path):
    write_source(tmp_path)
    flags = [tmp_path / "photos", "--model", tmp_path / "run", "--shard", 2]
    seconds = forked(*flags, "-o", tmp_path / "expected")["seconds"]
    generator, stopped = np.random.default_rng(SEED), 0
    while stopped < (30 if HOSTILE else 1):
        target = tmp_path / f"{generator.integers(10**9)}"
        answer = forked(*flags, "-o", target, kill=seconds * (0.3 + 0.7 * float(generator.random())), number=number)
        if answer["rc"] == 128 + number:
            stopped += 1
            assert answer["err"] == f"stopped by {number.name}: run the same command again to go on\n"
            assert forked(*flags, "-o", target)["rc"] == 0
        assert digests(target) == digests(tmp_path / "expected")


def test_a_full_disk_ends_it_in_one_line(forked, tmp_path):
    write_source(tmp_path)
    flags = [tmp_path / "photos", "--model", tmp_path / "run", "--shard", 2]
    assert forked(*flags, "-o", tmp_path / "expected")["rc"] == 0
    disk, full = tmp_path / "disk", 0
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        for free in range(8, 300, 12 if HOSTILE else 60):
            (disk / "filler").write_bytes(bytes((600 - free) * 1024))
            answer = forked(*flags, "-o", disk / "index")
            full += answer["rc"] == 1
            assert answer["rc"] == 0 or (answer["rc"] == 1 and answer["err"].count("\n") == 1), answer
            (disk / "filler").unlink()
            if answer["rc"]:
                assert "full" in answer["err"] or "No space left" in answer["err"], answer
                assert forked(*flags, "-o", disk / "index")["rc"] == 0
            assert digests(disk / "index") == digests(tmp_path / "expected")
            shutil.rmtree(disk / "index")
        assert full >= 2
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_parts_that_are_killed_make_the_same_index(forked, tmp_path):
    generator = np.random.default_rng(SEED)
    write_source(tmp_path)
    flags = [tmp_path / "photos", "--model", tmp_path / "run", "--shard", 4]
    assert forked(*flags, "-o", tmp_path / "alone")["rc"] == 0
    alone = Store.open(tmp_path / "alone")
    for trial in range(40 if HOSTILE else 1):
        target = tmp_path / f"parts{trial}"
        while not (target / "index.json").exists() or not read_info(target)["complete"]:
            rank = int(generator.integers(3))
            kill = float(generator.random() * 0.1) if generator.random() < 0.6 else None
            answer = forked(*flags, "-o", target, "--rank", rank, "--world", 3, kill=kill)
            assert answer["rc"] in (0, -signal.SIGKILL), answer
        store = Store.open(target)
        assert store.names(store.ids) == alone.names(alone.ids)
        assert store.codes().tolist() == alone.codes().tolist()
        assert (target / "skipped.csv").read_bytes() == (tmp_path / "alone" / "skipped.csv").read_bytes()
        assert not (target / "parts").exists()


@pytest.mark.parametrize("at", range(5))
def test_parts_are_joined_once_even_if_that_is_interrupted(at, place, monkeypatch):
    write_files(place / "photos", {"a/bad.jpg": b"broken", "b/bad.jpg": b"broken"})
    flags = ["--shard", 4, "--world", 2, "--rank"]
    index(place, *flags, 0)
    commit, commits = Writer.commit, []

    def interrupted(writer, stretch):
        if writer.folder == place / "index":
            commits.append(stretch)
            if len(commits) == 2 * at + 1:
                raise Killed
        commit(writer, stretch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Writer, "commit", interrupted)
        index(place, *flags, 1)
    assert index(place, *flags, 0) == []
    rows = found(place)
    assert [image for image, _ in rows.values()] == list(range(30))
    assert [*rows] == sorted(rows)
    assert left_out(place).keys() == {"a/bad.jpg", "b/bad.jpg"}


def test_an_update_in_parts(forked, place):
    index(place, "--shard", 4)
    before = found(place)
    write_files(place / "photos", {f"c/{i}.jpg": f"c {i}".encode() for i in range(9)} | {"a/00.jpg": b"other"})
    (place / "photos" / "a" / "02.jpg").unlink()
    for rank in (1, 0):
        answer = forked("-o", place / "index", "--update", "--rank", rank, "--world", 2)
        assert answer["rc"] == 0, answer
    after = found(place)
    assert after["a/00.jpg"][0] == 30
    assert len(after) == 38
    assert all(after[name] == before[name] for name in before.keys() & after.keys() - {"a/00.jpg"})


# ---------------------------------------------------------------- the real thing


def start(*flags):
    return subprocess.Popen(
        [sys.executable, "-m", "search", "index", *map(str, flags)], cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_trained_model_and_real_photos(finished, tmp_path):
    write_photos(tmp_path / "photos", [f"{i:02d}.jpg" for i in range(60)])
    (tmp_path / "photos" / "60.jpg").write_bytes(b"no image")
    model = next((finished / "checkpoints").iterdir())
    flags = [tmp_path / "photos", "--model", model, "--shard", 8, "--num_workers", 1]
    indexing.main([str(flag) for flag in [*flags, "-o", tmp_path / "index"]])
    store = Store.open(tmp_path / "index")
    assert len(store.ids) == 60
    assert [*left_out(tmp_path)] == ["60.jpg"]
    encoder = Encoder(tmp_path / "index" / "model")
    images = [decode_photo(store.path(image).read_bytes(), encoder.image_size) for image in store.ids]
    assert [image.size for image in images] == [tuple(size) for _, *size in store.rows(store.ids)]
    encoded = encoder.encode(np.stack([image.pixels for image in images]))
    assert store.codes().tolist() == encoded.codes.tolist()
    np.testing.assert_allclose(store.features(np.arange(60)), encoded.features, atol=0.01)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) * 5 if HOSTILE else ():
        check_signal(number, flags, tmp_path / "again", digests(tmp_path / "index"))


def check_signal(number, flags, target, expected):
    """End a real process at a random shard; it goes on to the same files."""
    shard = target / "codes" / f"{np.random.default_rng().integers(7):05d}.npy"
    process = start(*flags, "-o", target)
    wait_for(lambda: shard.exists() or process.poll() is not None)
    os.killpg(process.pid, number) if number != signal.SIGKILL else process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, -number if number == signal.SIGKILL else 128 + number), err
    if process.returncode:
        assert err == ("" if process.returncode < 0 else
                       f"stopped by {signal.Signals(number).name}: run the same command again to go on\n")  # fmt: skip
        again = start(*flags, "-o", target)
        _, err = again.communicate(timeout=60)
        assert again.returncode == 0, err
    assert digests(target) == expected
    shutil.rmtree(target)


def test_dry_run_and_help_import_no_torch(tmp_path):
    code = "import sys; from search.__main__ import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    flags = ["index", "nowhere", "--model", "none", "-o", tmp_path / "index", "--dry_run"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert not done.stderr
    assert not (tmp_path / "index").exists()
