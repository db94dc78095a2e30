"""CUDA's paths on a pretended GPU: right devices, no waiting, and the results of the CPU."""

import itertools
import json
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import HOSTILE, call, change_images, splits_of, thin_vgg
from pretended_gpu import MISSING, nothing_left, pretended_gpu

import checkpoint
import config
import engine
import loaders
import main
import model_file
import retrieval
import ties
from distributed import processor_name, use_device
from experiments import flags, sweep
from retrieval import Measure
from search.encoder import Encoder

READ = ("results.py", "read", "copy to the host")
ONCE = ("transforms.py", "on_device", "blocking copy to the GPU")  # constants, the first time
SMALL_RUN = [
    "--dataset", "Digits", "--limit", "40", "--image_size", "16", "--batch_size", "16", "--num_workers", "0",
    "--epoch_num", "2", "--topK", "7", "--weights", "random", "--feature_cache", "off", "--log_interval", "2",
]  # fmt: skip
CONVNET = ["--backbone", "convnet"]
THIN_VGG = ["--backbone", "vgg16", "--image_size", "32"]
SQUEEZENET = ["--backbone", "squeezenet1_0", "--image_size", "32"]
MECOQ = ["--M", "2", "--K", "16", "--feat_dim", "8", "--T", "0.3", "--mode", "debias", "--pos_prior", "0.1"]
MECOQ += ["--queue_begin_epoch", "0", "--queue_size", "20", "--lr", "0.05"]
SPQ = ["--method", "SPQ", "--M", "2", "--K", "16", "--eval_interval", "1"]
SPQ_NETWORK = [*SPQ, "--backbone", "resnet18_tiny"]
CIBHASH = ["--method", "CIBHash", "--eval_interval", "1", "--hidden_dim", "32"]
RELEASE = ["--recipe", "release"]

slow = pytest.mark.skipif(not HOSTILE, reason="slower: bash scripts/test.sh --hostile")


def case(*flags: str, marks: tuple = ()):
    return pytest.param(flags, marks=marks, id=" ".join(flags[: flags.index("--M")] if "--M" in flags else flags))


@pytest.fixture(autouse=True)
def _one_thread():
    if MISSING:
        pytest.skip(f"this PyTorch has no {', '.join(MISSING)}")
    with nothing_left():
        yield


@pytest.fixture
def gpu():
    with pretended_gpu() as pretended:
        yield pretended


@pytest.fixture(autouse=True)
def _small_vgg(monkeypatch):
    thin_vgg(monkeypatch)


def configured(*given: str, device: str = "cuda") -> config.Config:
    return config.parse([*SMALL_RUN, "--device", device, *given])


def training_of(*flags: str):
    configuration = configured(*flags)
    configuration = configuration.replace(precision=use_device(configuration.device, configuration.precision))
    splits, method = engine.build(configuration)
    loader = engine.build_loader(configuration, splits)
    return engine.start(configuration, method, loader), loader


def another_epoch(gpu, training, loader):
    """Train an epoch, after one in which constants were copied; what is counted is of the second."""
    engine.train_epoch(training, loader)
    training.epoch, training.step, training.sums = 1, 0, {}
    loader.set_epoch(1)
    gpu.forget()
    engine.train_epoch(training, loader)


# ---------------------------------------------------------------- steps


STEPS = [
    case(*CONVNET, *MECOQ),
    case(*CONVNET, "--memory", "hard", *RELEASE, *MECOQ),
    case(*CONVNET, "--memory", "feature", *MECOQ, marks=slow),
    case(*CONVNET, "--memory", "none", *MECOQ, "--queue_begin_epoch", "-1", marks=slow),
    case(*CONVNET, "--memory", "feature", *RELEASE, *MECOQ, marks=slow),
    case(*CONVNET, *RELEASE, *MECOQ, marks=slow),
    case(*CONVNET, "--batch_size", "39", *MECOQ),  # the last batch is one image: no negatives
    case(*CONVNET, "--views", "pil", *MECOQ, marks=slow),
    case(*CONVNET, "--augmentation", "SPQ", *MECOQ, marks=slow),
    case(*THIN_VGG, "--trainable_layer_num", "0", *MECOQ, marks=slow),
    case(*THIN_VGG, "--trainable_layer_num", "1", "--optimizer", "Adam", *MECOQ),
    case(*THIN_VGG, "--trainable_layer_num", "2", "--precision", "fp32", *MECOQ, marks=slow),
    case(*SQUEEZENET, "--trainable_layer_num", "1", *MECOQ, marks=slow),
    case("--backbone", "resnet18", "--image_size", "32", "--trainable_layer_num", "1", *MECOQ, marks=slow),
    case(*SPQ_NETWORK),
    case(*SPQ_NETWORK, *RELEASE, "--no-drop_last"),
    case(*SQUEEZENET, *SPQ, "--head_only"),
    case(*SQUEEZENET, *SPQ, "--head_only", *RELEASE, marks=slow),
    case(*CONVNET, *CIBHASH),
    case(*CONVNET, *CIBHASH, *RELEASE, marks=slow),
    case(*SQUEEZENET, *CIBHASH, marks=slow),
]


@pytest.mark.parametrize("flags", STEPS)
def test_the_host_waits_once_in_a_log_interval(gpu, flags):
    training, loader = training_of(*flags)
    another_epoch(gpu, training, loader)
    assert gpu.waits == {READ: -(-len(loader) // 2)}  # --log_interval 2
    bf16 = gpu.kernels["convolution", torch.bfloat16] > 0
    assert bf16 == (training.method.backbone.bf16 and training.method.backbone.split > 0)
    assert set(flags) & {"convnet", "squeezenet1_0"} or not gpu.unordered
    for name, parameter in training.method.named_parameters():
        assert parameter.is_cuda, name
        assert parameter.grad is None or parameter.grad.is_cuda, name


def test_colours_come_first_on_images_of_32_pixels(gpu, monkeypatch):
    change_images(monkeypatch, "Digits", enlarged)
    training, loader = training_of(*CONVNET, *MECOQ)
    another_epoch(gpu, training, loader)
    assert gpu.waits == {READ: 2}


@pytest.mark.parametrize("free", [2**33, 0])
@pytest.mark.parametrize("augmentation", ["MeCoQ", "SPQ"])
def test_small_images_are_sent_once_if_they_fit(gpu, monkeypatch, free, augmentation):
    """And no seed is drawn for each of them."""
    gpu.free = free
    change_images(monkeypatch, "Digits", enlarged)
    _, loader = training_of(*CONVNET, "--augmentation", augmentation, "--batch_size", "32", *MECOQ)
    list(loader)
    gpu.forget()
    with mock.patch.object(loaders, "sample_seed", wraps=loaders.sample_seed) as seeds:
        list(loader)
    assert not gpu.waits
    assert (gpu.sent < 40 * 32 * 32 * 3) == (free > 0)
    assert seeds.call_count <= 2 + len(loader)


@pytest.mark.parametrize("views", [False, True])
def test_embeddings_are_learned_without_waiting(gpu, tmp_path, views):
    generator = np.random.default_rng(0)
    np.save(tmp_path / "X.npy", generator.normal(size=(1200, 24)).astype(np.float32))
    np.save(tmp_path / "V.npy", generator.normal(size=(1200, 3, 24)).astype(np.float32))
    given = ["--embeddings", str(tmp_path / "X.npy")]
    given += ["--embedding_views", str(tmp_path / "V.npy")] if views else []
    mecoq = [flag for flag in MECOQ if flag not in ("--lr", "0.05")]
    given += ["--dataset", "Embeddings", "--limit", "1100", "--batch_size", "500", "--K", "16", *mecoq]
    argv = [flag for flag in SMALL_RUN[4:] if flag not in ("--weights", "random", "--image_size", "--batch_size")]
    configuration = config.parse([*argv[2:], *given, "--device", "cuda"])
    splits, method = engine.build(configuration)
    loader = engine.build_loader(configuration, splits)
    training = engine.start(configuration, method, loader)
    another_epoch(gpu, training, loader)
    assert gpu.waits == {READ: -(-len(loader) // 2)}


def enlarged(images):
    return loaders.Images(images.pixels.repeat(4, axis=1).repeat(4, axis=2), images.labels)


# ---------------------------------------------------------------- the best model's file


def test_a_model_is_written_as_it_stood_while_it_learns_on(gpu, tmp_path, monkeypatch):
    method, path, goes_on, done = torch.nn.Linear(3, 3).to("cuda:0"), tmp_path / "model.cpt", threading.Event(), []
    expected = method.weight.detach().cpu()
    real = model_file.save_state

    def write(*arguments):
        assert goes_on.wait(60)
        real(*arguments)

    monkeypatch.setattr(model_file, "save_state", write)  # all that the thread does, bringing it to the host included
    writer = model_file.BackgroundWriter()
    writer.save(method, path, lambda: done.append(1))
    with torch.no_grad():
        method.weight.add_(1)
    assert not done
    goes_on.set()
    writer.wait()
    assert done
    assert torch.equal(torch.load(path, weights_only=True)["weight"], expected)


def test_no_state_is_written_before_the_best_model(gpu, tmp_path, monkeypatch):
    """A run that is killed then would go on without it."""
    events, real = [], model_file.write_tensors

    def slowly(*arguments):
        events.append("model")
        time.sleep(0.2)
        real(*arguments)
        events.append("written")

    monkeypatch.setattr(model_file, "write_tensors", slowly)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: events.append("state"))
    run(tmp_path, "cuda", *CONVNET, "--save_interval", "1", *MECOQ)
    assert {"model", "state"} <= set(events)
    assert all(after == "written" for event, after in itertools.pairwise(events) if event == "model")


def test_a_disk_that_fills_while_the_model_is_written_ends_the_run(gpu, tmp_path, monkeypatch, capsys):
    def fail(_, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(model_file, "write_tensors", fail)
    argv = [*SMALL_RUN, "--output", str(tmp_path), "--notes", "run", "--device", "cuda", *CONVNET, *MECOQ]
    assert main.main(argv) == 1
    assert "No space left on device" in (error := capsys.readouterr().err)
    assert "none was saved yet" in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- what is chosen for a GPU


def test_the_release_recipe_looks_for_anomalies_only_if_asked(gpu, tmp_path):
    flags = [*CONVNET, *RELEASE, *MECOQ, "--epoch_num", "0"]
    assert configured(*flags, device="cpu").detect_anomaly
    assert configured(*flags, "--detect_anomaly").detect_anomaly
    run(tmp_path, "cuda", *flags)
    log = (tmp_path / "logs" / "run.log").read_text()
    assert "detect_anomaly=False" in log
    assert "the recipe itself has detect_anomaly=True" in log


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_float32_means_no_tf32_and_bits_do_not_vary(gpu, monkeypatch, precision):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "fp32")
    torch.backends.cuda.matmul.allow_tf32 = True
    assert not torch.backends.cudnn.deterministic
    assert use_device("cuda:0", precision) == precision
    assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == (precision == "bf16")
    assert f"TF32 ({precision == 'bf16'}, False)" in processor_name("cuda:0")


def test_the_compiler_warms_up_at_the_sizes_that_come(gpu, tmp_path, monkeypatch):
    sizes = []

    def compiled(function):
        def counted(x, *more):
            sizes.append(len(x))
            return function(x, *more)

        return counted

    monkeypatch.setattr(torch, "compile", compiled)
    engine.build_method(configured(*SQUEEZENET, "--compile", *MECOQ))
    warm = set(sizes)
    run(tmp_path, "cuda", *SQUEEZENET, "--compile", "--limit", "32", *MECOQ)
    assert set(sizes) == warm


# ---------------------------------------------------------------- views


@pytest.mark.parametrize(
    "views", [[], ["--views", "pil"], ["--augmentation", "SPQ"], ["--augmentation", "SPQ-release"]]
)
@pytest.mark.parametrize("dataset", ["Digits", "Flickr25K"])
def test_views_and_test_images_are_the_cpus(photo_root, dataset, views):
    """Pinned, they come without waiting."""
    roots = [photo_root / "datasets", photo_root / "data"]
    splits = splits_of(dataset, *roots, limit=8)
    found = {}
    for device in ("cpu", "cuda"):
        flags = ["--dataset", dataset, *CONVNET, "--image_size", "32", "--batch_size", "5", *views]
        configuration = configured(*flags, device=device)
        with pretended_gpu() as gpu:
            batches = list(engine.build_loader(configuration, splits))
            tests = list(loaders.test_batches(splits.query, engine.preprocessing(configuration)))
            waits = set(gpu.waits)
            assert all(batch.is_cuda == (device == "cuda") for batch in batches + tests)
            found[device] = [batch.cpu() for batch in batches + tests]
    assert waits <= {ONCE, ("loaders.py", "test_batches", "blocking copy to the GPU")}
    for ours, expected in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- ranking


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "hamming"])
@pytest.mark.parametrize("multi_hot", [False, True])
def test_the_host_waits_once_for_a_chunk_of_queries(gpu, monkeypatch, kind, multi_hot):
    """And the metrics are the CPU's."""
    monkeypatch.setitem(retrieval.CHUNK_ELEMENTS, "cuda", 2**12)  # eight queries per chunk
    generator = torch.Generator().manual_seed(1)
    codewords = torch.randn(2, 256, 8, generator=generator)
    queries = torch.randn(50, 16, generator=generator)
    if kind != "asymmetric":
        queries = torch.randint(256, (50, 2), generator=generator).to(torch.uint8)
    codes = torch.randint(8, (400, 2), generator=generator).to(torch.uint8)  # many equal scores
    labels = [torch.randint(5, (n,), generator=generator) for n in (50, 400)]
    if multi_hot:
        labels = [torch.nn.functional.one_hot(x, 5).to(torch.uint8) for x in labels]
    found = []
    for device in ("cpu", "cuda:0"):
        words, asked, stored, *its = (x.to(device) for x in (codewords, queries, codes, *labels))
        tables = {
            "asymmetric": lambda part, words=words: retrieval.lookup_tables(part, words),
            "symmetric": lambda part, words=words: retrieval.symmetric_tables(part, words),
            "hamming": retrieval.hamming_tables,
        }[kind]
        values = []
        for K in (7, 300):
            ties.harmonic_numbers(K, stored.device)
            for name in ("database", "expected"):
                gpu.forget()
                values.append(retrieval.mean_average_precision(tables, asked, stored, its, Measure(K, name)))
                assert sum(gpu.waits.values()) <= (8 if device != "cpu" else 0), gpu.waits  # seven chunks, and the mean
            gpu.forget()
            metrics = retrieval.evaluate(tables, asked, stored, its, K)
            assert sum(gpu.waits.values()) <= (9 if device != "cpu" else 0), gpu.waits
            assert not metrics.pr.is_cuda
            assert not metrics.p_at_k.is_cuda
            values += [metrics.map, metrics.expected_map, metrics.pr, metrics.p_at_k]
        found.append(values)
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


# ---------------------------------------------------------------- runs


def run(folder, device, *flags):
    """Losses, codes, MAP and model of a run."""
    assert main.main([*SMALL_RUN, "--output", str(folder), "--notes", "run", "--device", device, *flags]) == 0
    checkpoints = folder / "checkpoints" / "run"
    metrics = json.loads((checkpoints / "metrics.json").read_text())
    losses = [epoch["loss/total_loss"] for epoch in metrics["history"]]
    found = {"losses": np.array(losses), "codes": np.load(checkpoints / "db_codes.npy"), "map": metrics["map"]}
    return found | {name: x.numpy() for name, x in torch.load(checkpoints / "model.cpt", weights_only=True).items()}


RUNS = [
    case(*CONVNET, *MECOQ, marks=slow),
    case(*CONVNET, "--optimizer", "Adam", *RELEASE, *MECOQ, "--lr", "0.001", marks=slow),
    case(*THIN_VGG, "--trainable_layer_num", "1", *MECOQ),
    case(*SPQ_NETWORK, *RELEASE),
    case(*SPQ_NETWORK, marks=slow),
    case(*SQUEEZENET, *SPQ, "--head_only", marks=slow),
    case(*CONVNET, *CIBHASH, *RELEASE, marks=slow),
]


@pytest.mark.parametrize("flags", RUNS)
def test_a_run_is_the_cpus(tmp_path, flags):
    """But for dropout, whose numbers are the device's own; with the feature cache, the last batches of test images are
    filled up differently."""
    flags = [*flags, "--precision", "fp32", "--disable_writer"]
    with mock.patch("torch.nn.Dropout.forward", lambda _, x: x):
        expected = run(tmp_path / "cpu", "cpu", *flags)
        with pretended_gpu():
            ours = run(tmp_path / "gpu", "cuda", *flags, "--feature_cache", str(tmp_path / "cache"))
    np.testing.assert_allclose(ours["losses"], expected["losses"], rtol=1e-3)
    assert (ours["codes"] == expected["codes"]).mean() > 0.9
    for name in expected.keys() - {"losses", "codes", "map"}:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-2, atol=1e-3, err_msg=name)


class Pulled(BaseException):
    pass


RESUMED = [
    case(*THIN_VGG, "--trainable_layer_num", "1", *MECOQ),  # dropout draws from the GPU's generator
    case(*CONVNET, *CIBHASH),  # so do the codes
    case(*SPQ_NETWORK, *RELEASE, "--epoch_num", "3", marks=slow),
]


@pytest.mark.parametrize("flags", RESUMED)
def test_a_stopped_run_ends_with_the_same_bits(gpu, tmp_path, monkeypatch, flags):
    flags = [*flags, "--save_interval", "2", "--disable_writer", "--feature_cache", str(tmp_path / "cache")]
    expected = run(tmp_path / "whole", "cuda", *flags)
    real, steps = engine.backward, []

    def backward(total):
        steps.append(total)
        if len(steps) == 6:
            raise Pulled
        real(total)

    with monkeypatch.context() as patch, pytest.raises(Pulled):
        patch.setattr(engine, "backward", backward)
        main.main([*SMALL_RUN, *flags, "--output", str(tmp_path / "parts"), "--notes", "run", "--device", "cuda"])
    gpu.seed(99)
    ours = run(tmp_path / "parts", "cuda", *flags, "--resume")
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_features_that_are_kept_are_those_that_are_computed(gpu, tmp_path):
    flags = [*SQUEEZENET, *MECOQ]
    splits, method = engine.build(configured(*flags))
    method.eval()
    made, kept = (
        engine.build_features(configured(*flags, "--feature_cache", folder), method.backbone, splits.tested)["query"]
        for folder in ("off", str(tmp_path))
    )
    for ours, expected in zip(kept, made, strict=True):
        assert ours.is_cuda
        assert expected.is_cuda
        assert torch.equal(ours.cpu(), expected.cpu())
    for free, sent in ((2**33, False), (0, True)):
        gpu.free, kept.kept = free, []
        list(kept)
        gpu.forget()
        list(kept)
        assert not gpu.waits
        assert bool(gpu.sent) == sent


TESTED = [
    case(*CONVNET, *MECOQ, "--symmetric_distance", "--epoch_num", "1"),
    case(*SPQ_NETWORK, marks=slow),
    case(*CONVNET, *CIBHASH, marks=slow),
]


@pytest.mark.parametrize("flags", TESTED)
def test_a_checkpoint_is_tested_and_reported(gpu, tmp_path, flags):
    expected = run(tmp_path, "cuda", *flags)
    model = tmp_path / "checkpoints" / "run" / "model.cpt"
    argv = [flag for flag in (*SMALL_RUN, *flags) if flag not in ("--weights", "random")]
    argv += ["--output", str(tmp_path), "--notes", "test", "--device", "cuda"]
    assert main.main([*argv, "--test_only", "--checkpoint", str(model)]) == 0
    metrics = json.loads((tmp_path / "checkpoints" / "test" / "metrics.json").read_text())
    assert metrics["map"] == expected["map"]
    for device in ("cuda", "cpu") if HOSTILE else ("cuda",):
        assert call("report", "run", "--output", tmp_path, "--device", device, "--queries", "1") == 0


def trial_flags(weights):
    flags = [*SMALL_RUN[2:], *SQUEEZENET, "--batch_size", "16", "--epoch_num", "2", "--device", "cuda"]
    return [*flags, "--weights", weights, "--queue_begin_epoch", "0", "--queue_size", "20"]


@pytest.mark.parametrize("flags", [case(*SQUEEZENET, *MECOQ), case(*CONVNET, *CIBHASH, marks=slow)])
def test_search_encodes_as_the_cpu_does(tmp_path, flags):
    run(tmp_path, "cpu", *flags, "--precision", "fp32", "--epoch_num", "0")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, *[32 if "squeezenet1_0" in flags else 16] * 2), np.uint8)
    found = []
    with pretended_gpu():
        for device in ("cpu", "cuda"):
            encoder = Encoder(tmp_path / "checkpoints" / "run", device)
            found.append([*vars(encoder.encode(pixels)).values(), encoder.vectors_of(np.zeros((1, 2), np.uint8))])
    for ours, expected in zip(*found, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "callback", [pytest.param(None, marks=slow), "CodebookUse", pytest.param("FeatureDrift", marks=slow)]
)
def test_a_trial_trains_on_cached_views(gpu, tmp_path, weights, callback):
    configuration = flags.configured("Digits", 16, 2021, trial_flags(weights))
    shared = sweep.SharedBySeed(tmp_path / "views")
    (tmp_path / "trials").mkdir()
    result = sweep.run_trial(configuration, shared, tmp_path / "trials", callback)
    assert result["map"] > 0
    assert bool(result.get("rows")) == (callback is not None)
    loader = shared.last.cached_views(configuration)
    gpu.forget()
    assert all(batch.is_cuda for batch in loader)
    assert not gpu.waits


@slow
def test_table1_stands_on_a_gpu(gpu, tmp_path, weights):
    where = [f"--{name}={tmp_path / name}" for name in ("results", "trials", "view_cache", "feature_cache")]
    which = ["--datasets", "Digits", "--bits", "16", "--seeds", "2021"]
    assert call("table1", *which, *trial_flags(weights), "--limit", "300", "--batch_size", "100", *where) == 0
    assert "MeCoQ" in (tmp_path / "results" / "table1.md").read_text()
