"""The page about a run: whole in itself, and what it shows is what the run finds."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import HOSTILE, LIVELY, SMALL, call, refused, small_run

import engine
import loaders
import main
import retrieval
from config import Config

N = 3


class Page(HTMLParser):
    """Attributes that could load something, texts of headings, and classes of figures."""

    def __init__(self, text):
        super().__init__()
        self.links, self.figures, self.headings, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href", "data", "xlink:href", "srcset") if name in attrs]
        self.links += [tag] if tag in ("script", "link", "iframe") else []
        if tag == "figure":
            self.figures.append(attrs["class"].split()[0])
        self.inside = tag

    def handle_data(self, text):
        if self.inside in ("h2", "h3") and text.strip():
            self.headings.append(text)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    output = tmp_path_factory.mktemp("report")
    folder = small_run(output, *LIVELY, "--ties", "database")
    assert call("report", "small", "--output", output, "--queries", N) == 0
    return folder, (folder / "report.html").read_text(encoding="utf-8")


OTHERS = {  # a run's flags, and what of the published numbers and their sources stands on its page
    "SPQ": (["--backbone", "resnet18_tiny", "--batch_size", "32", "--M", "8"], ["79.30", "issue 6"]),
    "CIBHash": (["--backbone", "convnet", "--code_length", "32"], ["62.20", "second third-party quotation"]),
}


@pytest.mark.parametrize("method", OTHERS)
def test_a_page_of_another_method(method, cifar10_root, tmp_path):
    flags, published = OTHERS[method]
    run = ["--method", method, *flags, "--image_size", "16", "--limit", "40", "--epoch_num", "1", "--topK", "20",
           "--data_root", str(cifar10_root), "--num_workers", "0", "--feature_cache", "off", "--notes", "run",
           "--output", str(tmp_path)]  # fmt: skip
    assert main.main(run) == 0
    assert call("report", "run", "--output", tmp_path, "--queries", 2) == 0
    text = (tmp_path / "checkpoints/run/report.html").read_text(encoding="utf-8")
    assert all(words in text for words in published)
    assert f"{method}, CIFAR10" in text
    assert "the numbers do not compare" in text
    assert Page(text).figures


def test_nothing_is_loaded_from_elsewhere(reported):
    _, text = reported
    page = Page(text)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", text)
    assert '<meta name="viewport"' in text


def test_the_page_says_what_the_run_was(reported):
    folder, text = reported
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f'<div class="big">{100 * metrics["map"]:.2f}</div>MAP@20' in text
    assert "recipe paper: codebooks=trained" in text
    assert "Only 100 images a split were used" in text
    for flag, value in metrics["config"].items():
        assert f'<td class="flag">--{flag}</td><td>{value}</td>' in text
    assert text.count("<svg") == 6 + 3
    for title in ("Omega", "quantization error", "precision and recall", "most used first"):
        assert title in text


def test_the_gallery_shows_the_best_and_the_worst_queries(reported):
    """Average precisions by a brute-force ranking of the codes that the run saved."""
    folder, text = reported
    page = Page(text)
    metrics = json.loads((folder / "metrics.json").read_text())
    config = Config(metrics["config"] | {"test_only": True, "checkpoint": str(folder / "model.cpt")})
    splits, model = engine.build(config)
    model.eval()
    images = torch.cat(list(loaders.test_batches(splits.query, engine.preprocessing(config))))
    with torch.no_grad():
        z = model(images)
    codes = torch.from_numpy(np.load(folder / "db_codes.npy").astype(int))
    codewords = model.quantizer.codewords().detach()
    segments = torch.nn.functional.normalize(z.view(len(z), 2, -1), dim=-1)
    chosen = torch.stack([codewords[m][codes[:, m]] for m in range(2)], dim=1)
    scores = torch.einsum("qmd,nmd->qn", segments, chosen)
    order = scores.sort(dim=1, descending=True, stable=True)[1]
    hits = torch.from_numpy(splits.database.labels)[order] == torch.from_numpy(splits.query.labels)[:, None]
    ap = retrieval.average_precision(hits[:, :20]).numpy()
    shown = [float(re.search(r"AP ([0-9.]+)", h)[1]) for h in page.headings if h.startswith("AP")]
    assert len(shown) == 3 * N
    np.testing.assert_allclose(shown[:N], np.sort(ap)[::-1][:N], atol=2e-3)
    np.testing.assert_allclose(shown[N : 2 * N], np.sort(ap)[:N], atol=2e-3)
    assert len(page.figures) == 3 * N * 11
    for start in range(0, len(page.figures), 11):
        assert page.figures[start] == "asked"
        assert set(page.figures[start + 1 : start + 11]) <= {"hit", "miss"}
    counts = [int(re.search(r"(\d+) of the first ten", h)[1]) for h in page.headings if h.startswith("AP")]
    assert counts == [page.figures[s + 1 : s + 11].count("hit") for s in range(0, len(page.figures), 11)]


def test_hostile_values_stay_text(reported, tmp_path):
    folder, _ = reported
    run = tmp_path / "checkpoints" / "evil"
    shutil.copytree(folder, run)
    metrics = json.loads((run / "metrics.json").read_text())
    evil = '<img src="http://x/"><script>alert(1)</script>'
    metrics |= {"notes": evil, "seed": evil, "best_epoch": evil, "recipe": evil, "device": evil}
    metrics["config"]["protocol"] = evil
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert call("report", "evil", "--output", tmp_path, "--queries", 0) == 0
    page = Page((run / "report.html").read_text())
    assert not [link for link in page.links if not link.startswith("#")]
    del metrics["history"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert call("report", "evil", "--output", tmp_path, "--queries", 0) == 2


def test_a_model_that_was_only_tested(reported, tmp_path):
    folder, _ = reported
    argv = [*SMALL, *LIVELY, "--test_only", "--checkpoint", str(folder / "model.cpt"), "--output", str(tmp_path)]
    assert main.main([*argv, "--notes", "t"]) == 0
    assert call("report", "t", "--output", tmp_path, "--queries", 1) == 0
    assert len(Page((tmp_path / "checkpoints/t/report.html").read_text()).figures) == 33


def test_photos_with_several_labels(photo_root, tmp_path):
    roots = [f"--data_root={photo_root / 'datasets'}", f"--list_root={photo_root / 'data'}"]
    flags = ["--dataset", "Flickr25K", "--limit", "40", "--image_size", "32", "--epoch_num", "0", *roots]
    small_run(tmp_path, *flags, "--topK", "10")
    assert call("report", "small", "--output", tmp_path, "--queries", 1, "--html", tmp_path / "x.html") == 0
    text = (tmp_path / "x.html").read_text()
    assert len(Page(text).figures) == 33
    assert "image/jpeg" in text
    assert re.search(r"labels \d+", text)
    assert "the paper" not in text  # nothing was published for 6 bits


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("map",), 10**400), (("map",), 1.5), (("bits",), "x"), (("bits",), -1), (("epochs_run",), None),
        (("history",), {"x": 1}), (("history",), ["x"]), (("history",), [{"epoch": 0, "val_mAP": "x"}]),
        (("history",), [{"val_mAP": 0.5}]), (("history",), [{"epoch": 0, "val_mAP": float("nan")}]),
        (("history",), [{"epoch": 0, "val_mAP": [1]}]), (("history",), [{"epoch": 0, "quant_err": 10**400}]),
        (("history",), None), (("seconds",), {"x": "y"}), (("seconds",), 3), (("seconds",), {"x": 10**400}),
        (("versions",), [1]), (("config", "K"), 10**12), (("config", "K"), "8"), (("config", "K"), 1),
        (("config", "M"), 10**12), (("config", "M"), 3), (("config", "feat_dim"), 10**12),
        (("config", "feat_dim"), 9), (("config", "image_size"), 10**9), (("config", "image_size"), "x"),
        (("config", "dataset"), ["Digits"]), (("config", "dataset"), "MNIST"), (("config", "backbone"), "none"),
        (("config", "method"), 3), (("config", "recipe"), "evil"), (("config", "test_only"), "yes"),
        (("config", "protocol"), {}), (("config", "symmetric_distance"), []), (("config", "seed"), "x"),
        (("config", "seed"), -1), (("config", "topK"), "x"), (("config", "batch_size"), 10**12),
        (("config", "limit"), []), (("config", "num_workers"), "x"), (("config", "device"), "gpu"),
        (("config", "data_root"), 3.5), (("config", "data_root"), "\0"), (("config", "feature_cache"), 3.5),
        (("config", "alpha"), "x"), (("config", "trainable_layer_num"), 10**6), (("config", "T"), "x"),
        (("config",), {}), (("model_sha256",), 3),
    ][:: 1 if HOSTILE else 4],
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_altered_metrics_end_in_one_line(place, value, reported, tmp_path, capsys):
    """Nothing that metrics.json says fills the memory or ends in a traceback."""
    folder, _ = reported
    run = tmp_path / "checkpoints" / "altered"
    shutil.copytree(folder, run)
    (run / "report.html").unlink(missing_ok=True)
    metrics = json.loads((run / "metrics.json").read_text())
    *above, last = place
    content = metrics
    for name in above:
        content = content[name]
    content[last] = value
    (run / "metrics.json").write_text(json.dumps(metrics))
    refused(capsys, "report", "altered", "--output", tmp_path, "--queries", 1)
    assert not (run / "report.html").exists()


def test_a_run_whose_codes_are_of_other_codebooks(reported, tmp_path, capsys):
    """K is what codes and codewords say, whatever metrics.json says of it."""
    folder, _ = reported
    run = tmp_path / "checkpoints" / "altered"
    shutil.copytree(folder, run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["config"]["K"] = 65536
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "made with other codebooks" in refused(capsys, "report", "altered", "--output", tmp_path, "--queries", 1)


@pytest.mark.parametrize("target", ["/dev/null", "folder"])
def test_a_report_is_written_to_a_regular_file_only(target, reported, tmp_path, capsys):
    folder, _ = reported
    (tmp_path / "folder").mkdir()
    words = refused(capsys, "report", "small", "--output", folder.parent.parent, "--html", tmp_path / target)
    assert "is not a regular file" in words


def test_a_checkpoint_that_is_a_device_is_not_read(reported, tmp_path, capsys):
    folder, _ = reported
    run = tmp_path / "checkpoints" / "altered"
    shutil.copytree(folder, run)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["config"] |= {"test_only": True, "checkpoint": "/dev/zero"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "/dev/zero" in refused(capsys, "report", "altered", "--output", tmp_path, "--queries", 1)


def test_what_is_missing_is_said_in_one_line(reported, tmp_path, capsys):
    folder, _ = reported
    output = folder.parent.parent
    assert "there is no finished run" in refused(capsys, "report", "nothing", "--output", output)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused(
        capsys, "report", "small", "--output", output, "--html", tmp_path / "file" / "x.html"
    )
    curve = folder / "PR_curve.txt"
    content = curve.read_bytes()
    curve.write_text("1 2\n")
    assert "PR_curve.txt has not two rows" in refused(capsys, "report", "small", "--output", output)
    curve.write_bytes(content)
    codes = np.load(folder / "db_codes.npy")
    for wrong in (codes[:50], codes + 100, codes.astype(float)):
        np.save(folder / "db_codes.npy", wrong)
        assert "does not hold the run's codes" in refused(capsys, "report", "small", "--output", output)
    np.save(folder / "db_codes.npy", codes)
    model = folder / "model.cpt"
    content = model.read_bytes()
    torch.save(torch.load(model, weights_only=True) | {"projection.bias": torch.ones(8)}, model)
    assert "is not the model" in refused(capsys, "report", "small", "--output", output)
    model.write_bytes(content)
    for device in ("cuda:x", "cuda:99"):
        assert "--device" in refused(capsys, "report", "small", "--output", output, "--device", device)
    assert call("report", "small", "--output", output, "--queries", 0, "--html", tmp_path / "plain.html") == 0
    assert "Gallery" not in (tmp_path / "plain.html").read_text()
