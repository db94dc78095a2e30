"""A run's model as an ONNX graph, for programs without PyTorch: bytes of images in, query vectors and features out."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from methods import BACKBONES
from methods.base import Method
from search.encoder import read_config
from transforms import IMAGENET_MEAN, IMAGENET_STD
from utils import RunError, one_line

TOLERANCE = 1e-3  # largest difference between ONNX Runtime and PyTorch, as a share of the largest number
TESTED = (1, 3)  # images in the batches that are compared


class QueryGraph(nn.Module):
    """Images `[n, 3, S, S]` uint8 -> vectors `[n, M d]`, what queries are searched with, and features `[n, F]` of the
    backbone, of unit length, for reranking; both float32, computed in float32.

    Args:
        method: in evaluation mode; its backbone is taken out of it.
        normalized: whether the backbone's input is normalised by ImageNet's mean and deviation.
    """

    def __init__(self, method: Method, normalized: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*method.backbone.blocks)  # in float32, whatever the backbone ran them in
        self.method = method
        self.method.backbone = nn.Identity()
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if normalized else ((0.0,) * 3, (1.0,) * 3)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.blocks((pixels.float() / 255 - self.mean) / self.std)
        vectors = self.method.vectors(self.method.query(self.method(features)))
        return vectors, F.normalize(features, dim=1)


def query_graph(folder: Path) -> tuple[QueryGraph, int]:
    """The graph of the model in a run's folder, and the side S of its images in pixels. Raises InputError if there is
    no sound model in it."""
    configuration = read_config(folder)
    model = str(folder / "model.cpt")
    changes = {"device": "cpu", "precision": "fp32", "compile": False, "test_only": True, "checkpoint": model}
    method = engine.build_method(configuration.replace(**changes)).eval()
    return QueryGraph(method, BACKBONES[configuration.backbone].normalized).eval(), configuration.image_size


def to_onnx(graph: QueryGraph, image_size: int, properties: dict[str, str]) -> bytes:
    """The content of an ONNX file: input `pixels` `[n, 3, S, S]` uint8, outputs `vectors` and `features`.

    Args:
        properties: kept in the file as metadata.

    Raises RunError if PyTorch cannot translate the model.
    """
    pixels = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own inner workings
            program = torch.onnx.export(
                graph,
                (pixels,),
                dynamo=True,
                verbose=False,
                input_names=["pixels"],
                output_names=["vectors", "features"],
                dynamic_shapes={"pixels": {0: torch.export.Dim("n", min=1)}},
                custom_translation_table=_translations(),
            )
    except Exception as error:  # whatever the exporter met
        reason = one_line(error)[:200]
        raise RunError(f"PyTorch {torch.__version__} cannot export this model to ONNX: {reason}") from error
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise RunError(f"PyTorch {torch.__version__} exports this model to ONNX for batches of {len(pixels)} only")
    _forget_places(model)
    onnx.helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _translations() -> dict[object, Callable]:
    """What the exporter lacks of the operations that methods use: `torch.cdist`, and shifts of whole numbers >= 0."""
    from onnxscript import opset18 as op

    def distances(x1: object, x2: object, p: float = 2.0, compute_mode: int = 0) -> object:
        return op.ReduceL2(op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3])), [-1], keepdims=0)

    def left(x: object, places: object) -> object:
        return op.CastLike(op.BitShift(unsigned(x), unsigned(places), direction="LEFT"), x)

    def right(x: object, places: object) -> object:
        return op.CastLike(op.BitShift(unsigned(x), unsigned(places), direction="RIGHT"), x)

    def unsigned(x: object) -> object:
        return op.Cast(x, to=onnx.TensorProto.UINT64)

    aten = torch.ops.aten
    return {
        aten._cdist_forward.default: distances,
        aten.__lshift__.Tensor: left,
        aten.__rshift__.Tensor: right,
    }


def _forget_places(model: onnx.ModelProto) -> None:
    """Remove the names of the files and lines from which PyTorch made each node."""
    for part in (model.graph, *model.functions):
        for item in (part, *part.node, *part.value_info, *getattr(part, "initializer", [])):
            item.ClearField("metadata_props")
    for item in (*model.graph.input, *model.graph.output):
        item.ClearField("metadata_props")


def largest_difference(content: bytes, graph: QueryGraph, image_size: int) -> float:
    """Largest difference between what ONNX Runtime and PyTorch make of random images, as a share of the largest number
    of each output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    generator, differences = np.random.default_rng(0), []
    for n in TESTED:
        pixels = generator.integers(0, 256, (n, 3, image_size, image_size), dtype=np.uint8)
        with torch.inference_mode():
            expected = graph(torch.from_numpy(pixels))
        for ours, theirs in zip(session.run(["vectors", "features"], {"pixels": pixels}), expected, strict=True):
            differences.append(np.abs(ours - theirs.numpy()).max() / max(float(theirs.abs().max()), 1e-12))
    return float(max(differences))
