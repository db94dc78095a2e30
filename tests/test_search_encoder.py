"""The model of a search: query vectors against lookup tables, and a run's folder that encodes as the run did."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LIVELY, config_of, no_backbone, small_run, splits_of

import config
import engine
import retrieval
import transforms
from methods.cibhash import CIBHash
from methods.cibhash import Objective as HashObjective
from methods.mecoq import Codebooks, MeCoQ, Objective, Search
from methods.spq import SPQ, SoftQuantizer
from methods.spq import Objective as CrossObjective
from search.encoder import Encoder
from utils import InputError, sha256

METHODS = {
    "MeCoQ": lambda: MeCoQ(no_backbone(12), Codebooks(3, 16, 12), Objective(T=0.3)),
    "MeCoQ, raw queries": lambda: MeCoQ(
        no_backbone(12), Codebooks(3, 16, 12), Objective(T=0.3), search=Search(normalize_query=False)
    ),
    "MeCoQ, symmetric": lambda: MeCoQ(
        no_backbone(12), Codebooks(3, 16, 12), Objective(T=0.3), search=Search(symmetric=True)
    ),
    "MeCoQ, large codebooks": lambda: MeCoQ(no_backbone(12), Codebooks(2, 300, 12), Objective(T=0.3)),
    "SPQ": lambda: SPQ(no_backbone(12), SoftQuantizer(3, 8, 4, 5.0), CrossObjective()),
    "CIBHash": lambda: CIBHash(no_backbone(12), 24, 16, HashObjective()),
}


@pytest.mark.parametrize("name", METHODS)
def test_vectors_and_codewords_give_the_scores_of_the_tables(name):
    method = METHODS[name]().eval()
    with torch.inference_mode():
        z = method(3 * torch.randn(50, 12))
        codes, queries = method.codes(z), method.query(z[:7])
        expected = retrieval.aqs_scores(method.tables(queries), codes).double()
        vectors, codewords = method.vectors(queries).double(), method.codewords_for_search().double()
    M, _, d = codewords.shape
    assert codewords.shape == (method.M, method.K, d)
    assert vectors.shape == (7, M * d)
    scores = torch.zeros(7, 50, dtype=torch.float64)
    for m in range(M):
        scores += vectors[:, m * d : (m + 1) * d] @ codewords[m, codes[:, m].long()].T
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_a_code_stands_for_a_query_that_is_nearest_to_that_code(name):
    method = METHODS[name]().eval()
    with torch.inference_mode():
        codes = method.codes(method(3 * torch.randn(50, 12)))
        scores = retrieval.aqs_scores(method.tables(method.queries_of_codes(codes)), codes)
    assert (scores.diagonal() >= scores.max(dim=1).values - 1e-5).all()
    same = (codes[:, None] == codes).all(dim=2)
    assert (scores[~same] < scores.diagonal()[:, None].expand_as(scores)[~same] - 1e-6).all()


# ---------------------------------------------------------------- a run's folder

RUNS = {
    "MeCoQ": LIVELY,
    "bf16": ["--backbone", "squeezenet1_0", "--image_size", "32", "--limit", "40", "--epoch_num", "1"],
    "SPQ": ["--method", "SPQ", "--backbone", "resnet18_tiny", "--epoch_num", "1", "--limit", "40"],
    "CIBHash": ["--method", "CIBHash", "--backbone", "convnet", "--epoch_num", "1", "--limit", "40"],
}
COMMON = ["--dataset", "Digits", "--image_size", "16", "--batch_size", "16", "--num_workers", "0", "--feature_cache",
          "off", "--topK", "20", "--notes", "run"]  # fmt: skip


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory, weights):
    """A trained model's folder and its configuration."""
    import main

    if request.param == "MeCoQ":
        return request.getfixturevalue("finished") / "checkpoints" / "small", config_of(*LIVELY)
    output = tmp_path_factory.mktemp("run")
    if request.param == "bf16":
        flags = [*RUNS["bf16"], "--weights", weights]
        return small_run(output, *flags), config_of(*flags)
    flags = [*COMMON, *RUNS[request.param]]
    assert main.main([*flags, "--output", str(output)]) == 0
    return output / "checkpoints" / "run", config.parse(flags)


def pixels_of(settings, limit):
    """The database's images at the size of the network's input, `[n, 3, S, S]` uint8."""
    images = splits_of("Digits", limit=limit).database
    resized = transforms.enlarge(torch.from_numpy(images.pixels), settings.image_size, normalized=False)
    return (255 * resized).round().to(torch.uint8).contiguous().numpy()


def test_a_folder_encodes_as_its_run_did(run):
    folder, settings = run
    encoder = Encoder(folder)
    pixels = pixels_of(settings, settings.limit)
    encoded = encoder.encode(pixels)
    np.testing.assert_array_equal(encoded.codes, np.load(folder / "db_codes.npy"))
    assert encoder.model_sha256 == sha256(folder / "model.cpt")
    assert encoded.features.shape == (len(pixels), encoder.F)
    assert encoded.features.dtype == encoded.vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(encoded.features, axis=1), 1, atol=1e-5)
    assert encoded.vectors.shape == (len(pixels), encoder.D)
    assert encoder.codewords.shape[:2] == (encoder.M, encoder.K)


def test_an_images_bits_do_not_depend_on_its_batch(run):
    folder, settings = run
    encoder, pixels = Encoder(folder), pixels_of(settings, 40)[:37]
    whole = encoder.encode(pixels)
    for part in (slice(0, 1), slice(5, 7), slice(3, 37)):
        for name in ("codes", "features", "vectors"):
            np.testing.assert_array_equal(getattr(encoder.encode(pixels[part]), name), getattr(whole, name)[part])
    none = encoder.encode(pixels[:0])
    assert (len(none.codes), len(none.features), len(none.vectors)) == (0, 0, 0)
    assert none.codes.dtype == whole.codes.dtype


def test_features_are_the_backbones_and_codes_of_the_projection(run):
    folder, settings = run
    encoder, pixels = Encoder(folder), pixels_of(settings, 40)[:8]
    method = engine.build_method(settings.replace(test_only=True, checkpoint=str(folder / "model.cpt"))).eval()
    images = transforms.from_bytes(torch.from_numpy(pixels).float(), encoder._normalized)
    with torch.inference_mode():
        features = F.normalize(method.backbone(images), dim=1)
    assert np.abs(encoder.encode(pixels).features - features.numpy()).max() < 0.02


def test_queries_are_encoded_in_float32_by_themselves(run):
    folder, settings = run
    encoder, pixels = Encoder(folder, queries=True), pixels_of(settings, 40)[:3]
    changes = {"test_only": True, "checkpoint": str(folder / "model.cpt"), "precision": "fp32"}
    method = engine.build_method(settings.replace(**changes)).eval()
    images = transforms.from_bytes(torch.from_numpy(pixels).float(), encoder._normalized)
    sizes = []
    encoder._method.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    encoded = encoder.encode(pixels)
    with torch.inference_mode():
        features = method.backbone(images)
        vectors = method.vectors(method.query(method.project(method.normalized(features)))).numpy()
    assert sizes == [3]
    assert np.abs(encoded.features - F.normalize(features, dim=1).numpy()).max() < 1e-5
    assert np.abs(encoded.vectors - vectors).max() < 1e-4 * np.abs(vectors).max()


def test_a_gpu_without_enough_memory_gets_fewer_images(finished, monkeypatch):
    encoder = Encoder(finished / "checkpoints" / "small")
    pixels = np.random.default_rng(0).integers(256, size=(40, 3, 16, 16), dtype=np.uint8)
    whole, original, seen = encoder.encode(pixels), Encoder._encode, []

    def encode(self, part):
        seen.append(len(part))
        if len(part) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return original(self, part)

    monkeypatch.setattr(Encoder, "_encode", encode)
    np.testing.assert_array_equal(encoder.encode(pixels).codes, whole.codes)
    assert seen == [32, 16, 8, *[4] * 10]


# ---------------------------------------------------------------- folders that are none


def without_model(folder):
    (folder / "model.cpt").unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def damaged_model(folder):
    content = bytearray((folder / "model.cpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.cpt").write_bytes(content)


def changed(**values):
    def change(folder):
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | values))

    return change


def text(content):
    return lambda folder: (folder / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_model, "model.cpt does not exist"),
        (without_config, "config.json does not exist"),
        (damaged_model, "model.cpt is not a readable PyTorch state dict"),
        (changed(sharpness=3), "--sharpness: this version does not have it"),
        (changed(method="DeepHash"), "--method DeepHash: this version has MeCoQ"),
        (changed(backbone="resnet9"), "--backbone resnet9: this version has vgg16"),
        (changed(M=4), "give --M 2 --K 64 --feat_dim 8"),
        (changed(M="two"), "is damaged"),
        (changed(method=["MeCoQ"]), "is damaged"),
        (changed(image_size=0), "--image_size 0: must be at least 1"),
        (text("[]"), "is damaged"),
        (text("{"), "is damaged"),
        (text("{}"), "is damaged"),
        (text("[" * 100000), "is damaged"),
    ],
)
def test_a_folder_that_holds_no_usable_model_is_refused(change, words, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished / "checkpoints" / "small", folder)
    change(folder)
    with pytest.raises(InputError) as refused:
        Encoder(folder)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


def test_a_run_without_images_is_refused(finished, tmp_path, monkeypatch):
    from data import DATASETS

    monkeypatch.setitem(DATASETS, "Embeddings", DATASETS["Digits"])
    shutil.copytree(finished / "checkpoints" / "small", tmp_path / "run")
    changed(dataset="Embeddings")(tmp_path / "run")
    with pytest.raises(InputError, match="it has no images"):
        Encoder(tmp_path / "run")


def test_tables_of_too_many_codewords_are_refused(finished, monkeypatch):
    monkeypatch.setattr("search.encoder.MOST_CODEWORDS", 63)
    Encoder(finished / "checkpoints" / "small")  # its tables are inner products
    monkeypatch.delattr(MeCoQ, "codewords_for_search")
    with pytest.raises(InputError, match="up to 63 codewords"):
        Encoder(finished / "checkpoints" / "small")
