"""The numbers of the authors' programs (tests/golden), computed anew on a device."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
import loss
import retrieval
import spq_views
import transforms
from config import Config, parse, recipe_defaults
from methods import cibhash, mecoq, spq
from methods.backbones import PassThrough

Arrays = Callable[[str], Tensor]  # name -> that array of a file, on the device
# choices of `loss.contrastive_loss`; layers of CIBHash's encoder
LOSS_FLAGS = ("pairing", "debias_memory", "negative_bound", "normalize_memory")
LAYERS = {"W1": "encoder.0.weight", "b1": "encoder.0.bias", "W2": "encoder.2.weight", "b2": "encoder.2.bias"}


class Told:
    """Stands for TensorBoard's files: `losses` of a training, step by step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if tag == "loss/total_loss":
            self.losses.append(value)


def error(ours: Tensor | list[float], theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs||."""
    ours = torch.as_tensor(ours).detach().double().cpu()
    theirs = theirs.double().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def largest(pairs: list[tuple[Tensor | list[float], Tensor]]) -> float:
    """The largest relative error of pairs of ours and theirs."""
    return max(error(*pair) for pair in pairs)


def errors(folder: Path, device: str) -> Iterator[tuple[str, float, float]]:
    """(what is computed, largest relative error, what it may be) of each group of numbers, float32 unless it is said.

    Raises ModuleNotFoundError at the views if kornia is not installed.
    """
    for name, file, function, allowed in (
        ("MeCoQ: soft codes, losses, gradients", "release_loss", mecoq_losses, 1e-4),
        ("MeCoQ: 60 steps of SGD with memory", "release_trace", mecoq_trace, 1e-3),
        ("SPQ: losses, gradients", "spq", spq_losses, 1e-4),
        ("SPQ: 40 steps of Adam, float64", "spq", spq_trace, 1e-6),
        ("CIBHash: losses, gradients, float64", "cibhash", cibhash_losses, 1e-6),
        ("CIBHash: 40 steps of Adam, float64", "cibhash", cibhash_trace, 1e-6),
        ("MAP, asymmetric and symmetric", "retrieval", retrieval_maps, 1e-4),
        ("SPQ's views", "spq", spq_view_colours, 1e-4),
    ):
        arrays = np.load(folder / f"{file}.npz", allow_pickle=False)
        there = partial(on_device, arrays, device)
        configuration = json.loads(str(arrays["config"])) if "config" in arrays else {}
        yield name, function(there, configuration), allowed


def on_device(arrays: np.lib.npyio.NpzFile, device: str, name: str) -> Tensor:
    return torch.from_numpy(arrays[name]).to(device)


def trained(config: Config, method: nn.Module, steps: list[Tensor], epochs: int = 1) -> list[float]:
    """The losses of a training on features that are given, `[2N, F]` per step."""
    training, per_epoch = engine.start(config, method, steps[: len(steps) // epochs]), len(steps) // epochs
    training.events = told = Told()
    for epoch in range(epochs):
        training.epoch, training.step, training.sums = epoch, 0, {}
        engine.train_epoch(training, steps[epoch * per_epoch :][:per_epoch])
    return told.losses


# ---------------------------------------------------------------- MeCoQ, by `--recipe release`


def mecoq_losses(there: Arrays, cases: list[dict]) -> float:
    """Soft codes, reconstructions, the loss and its gradients in five settings."""
    release = {flag: recipe_defaults("release")[flag] for flag in LOSS_FLAGS}
    pairs = []
    for i, c in enumerate(cases):
        x1, x2 = (there(f"{i}/{name}").requires_grad_() for name in ("x1", "x2"))
        codebooks = mecoq.Codebooks(c["M"], c["K"], c["M"] * c["D"], alpha=10.0, trained=False)
        quantizer = mecoq.CodebookAttention(codebooks).to(x1.device)
        quantizer.codebooks.data = there(f"{i}/C")
        p, h = quantizer(torch.cat([x1, x2]))
        memory = None
        if c["q"]:
            memory = quantizer.reconstruct(there(f"{i}/queue_codes"), quantizer.codewords()).flatten(1)
        rho = c["rho"] if c["mode"] == "debias" else 0.0
        contrastive = loss.contrastive_loss(*h.flatten(1).chunk(2), memory, T=c["T"], pos_prior=rho, **release)
        diversity = loss.codeword_diversity(quantizer.codewords())
        total = contrastive + c["lam"] * loss.code_entropy(p) + c["gam"] * diversity
        total.backward()
        ours = {"p1": p.chunk(2)[0], "h1": h.flatten(1).chunk(2)[0], "loss": total, "gx1": x1.grad, "gx2": x2.grad}
        pairs += [(value, there(f"{i}/{name}")) for name, value in ours.items()]
    return largest(pairs)


def mecoq_trace(there: Arrays, c: dict) -> float:
    """Losses, and the weights, codewords and memory at the end."""
    shared = ("K", "alpha", "T", "pos_prior", "queue_begin_epoch", "queue_size", "hp_lambda", "hp_gamma", "hp_beta",
              "lr", "momentum", "start_lr", "final_lr")  # fmt: skip
    config = parse(["--recipe", "release", "--mode", "debias", "--M", str(c["M"]), "--batch_size", str(c["N"])])
    config = config.replace(
        epoch_num=c["epochs"], warmup_epoch_num=c["warmup_epochs"], feat_dim=c["M"] * c["D"], memory="soft",
        **{name: c[name] for name in shared},
    )  # fmt: skip
    steps = list(there("feats").flatten(1, 2))
    method = mecoq.build(PassThrough(c["feat_in"]), config).to(steps[0].device)
    method.projection.weight.data, method.projection.bias.data = there("W0"), there("b0")
    method.quantizer.codebooks.data = there("C0")
    losses = trained(config, method, steps, c["epochs"])
    ours = {"loss": losses, "W": method.projection.weight, "b": method.projection.bias}
    ours |= {"C": method.quantizer.codewords(), "queue": method.memory.codes}
    return largest([(value, there(name)) for name, value in ours.items()])


def retrieval_maps(there: Arrays, _: dict) -> float:
    """MAP of labels of both kinds, with and without quantized queries."""
    C, codes, pairs = there("C"), there("db_codes"), []
    tables = {"asym": retrieval.lookup_tables(there("query"), C, normalize_query=False)}
    tables["sym"] = retrieval.symmetric_tables(there("query_codes"), C)
    for kind in ("single", "multi"):
        labels = [there(f"{kind}/{side}_labels") for side in ("query", "db")]
        for distance, table in tables.items():
            ours = retrieval.evaluate(lambda part: part, table, codes, labels, None).map
            pairs.append((ours, there(f"{kind}/{distance}/MAP@None")))
    return largest(pairs)


# ---------------------------------------------------------------- SPQ


def side_by_side(codebooks: Tensor) -> Tensor:
    """`[M, K, L]` -> the K x (M L) matrix that SPQ's program has."""
    return torch.cat(list(codebooks), dim=1)


def spq_losses(there: Arrays, configuration: dict) -> float:
    """The loss of both directions and its gradients in four settings."""
    pairs = []
    for i, c in enumerate(configuration["cases"]):
        C = there(f"{i}/C").float()
        quantizer = spq.SoftQuantizer(c["M"], len(C), C.shape[1] // c["M"], c["tau_q"]).to(C.device)
        quantizer.codebooks.data = torch.stack(C.chunk(c["M"], dim=1))
        method = spq.SPQ(PassThrough(1), quantizer, spq.Objective(c["tau"], "all", "both"))
        method.head = nn.Identity()
        views = torch.cat([there(f"{i}/x_{v}").float() for v in "ab"]).requires_grad_()
        total = method.loss(views, 0)["loss/total_loss"]
        total.backward()
        ours = {"loss": total, "g_C": side_by_side(quantizer.codebooks.grad)}
        ours["g_x_a"], ours["g_x_b"] = views.grad.chunk(2)
        pairs += [(value, there(f"{i}/{name}")) for name, value in ours.items()]
    return largest(pairs)


def spq_trace(there: Arrays, configuration: dict) -> float:
    """Losses, and the head and codebooks at the end."""
    c = configuration["trace"]
    flags = {"M": "M", "K": "K", "L": "L", "soft_quantization_scale": "tau_q", "T": "tau", "lr": "lr",
             "hp_beta": "weight_decay"}  # fmt: skip
    given = [word for flag, name in flags.items() for word in (f"--{flag}", str(c[name]))]
    config = parse(["--method", "SPQ", "--recipe", "release", "--disable_scheduler", *given])
    views = list(there("trace/features").double().flatten(1, 2))
    method = spq.build(PassThrough(c["feat"]), config).double().to(views[0].device)
    method.head.weight.data, method.head.bias.data = (there(f"trace/{name}0").double() for name in "Wb")
    method.quantizer.codebooks.data = torch.stack(there("trace/C0").double().chunk(c["M"], dim=1))
    losses = trained(config, method, [views[step % c["batches"]] for step in range(c["steps"])])
    learned = {"W": method.head.weight, "b": method.head.bias, "C": side_by_side(method.quantizer.codebooks)}
    return largest([(value, there(f"trace/{name}")) for name, value in {"loss": losses, **learned}.items()])


def spq_view_colours(there: Arrays, _: dict) -> float:
    """Colours in two orders; the largest difference of pixels in [0, 1], for which there is a unit already."""
    images = there("views/image").permute(0, 2, 3, 1)
    S, differences = images.shape[1], []
    for order in ("0123", "3102"):
        numbers = torch.zeros(len(images), 15)
        numbers[:, transforms.CROP] = torch.tensor([0.0, 0, S, S])
        numbers[:, transforms.ORDER] = torch.tensor([float(digit) for digit in order])
        factors = [there(f"views/{name}_factor").cpu() for name in ("brightness", "contrast", "saturation", "hue")]
        numbers[:, transforms.FACTORS] = torch.stack(factors, dim=1)
        ours = spq_views.augment(images, numbers, S, "SPQ-release")
        differences.append(float((ours - there(f"views/jitter_{order}")).abs().max()))
    return max(differences)


# ---------------------------------------------------------------- CIBHash


def encoder_of(there: Arrays, prefix: str, *flags: str) -> cibhash.CIBHash:
    """CIBHash without a backbone, with weights from the file; `prefix` ends its names, `{}` stands for a layer's."""
    weights = {name: there(prefix.format(name)).double() for name in LAYERS}
    (hidden, dim), bits = weights["W1"].shape, len(weights["b2"])
    sizes = ["--code_length", str(bits), "--hidden_dim", str(hidden)]
    config = parse(["--method", "CIBHash", "--recipe", "release", *sizes, *flags])
    method = cibhash.build(PassThrough(dim), config).double().to(weights["W1"].device)
    for name, key in LAYERS.items():
        method.get_parameter(key).data = weights[name]
    return method


def cibhash_losses(there: Arrays, configuration: dict) -> float:
    """The loss, its terms and the gradients of weights and features in four settings."""
    pairs = []
    for i, c in enumerate(configuration["cases"]):
        method = encoder_of(there, f"{i}/{{}}", "--T", str(c["T"]), "--kl_weight", str(c["weight"]))
        views = torch.cat([there(f"{i}/f_{v}") for v in "ij"]).double().requires_grad_()
        terms = method.loss(views, 0)
        terms["loss/total_loss"].backward()
        ours = {f"g_{name}": method.get_parameter(key).grad for name, key in LAYERS.items()}
        ours |= {"contra": terms["loss/contrastive"], "kl": terms["loss/kl"], "loss": terms["loss/total_loss"]}
        ours["g_f_i"], ours["g_f_j"] = views.grad.chunk(2)
        pairs += [(value, there(f"{i}/{name}")) for name, value in ours.items()]
    return largest(pairs)


def cibhash_trace(there: Arrays, configuration: dict) -> float:
    """Losses, and the encoder at the end."""
    c = configuration["trace"]
    flags = ["--T", str(c["T"]), "--kl_weight", str(c["weight"]), "--lr", str(c["lr"])]
    method = encoder_of(there, "trace/{}_0", *flags)
    views = list(there("trace/features").double().flatten(1, 2))
    config = parse(["--method", "CIBHash", "--recipe", "release", *flags])
    losses = trained(config, method, [views[step % c["batches"]] for step in range(c["steps"])])
    learned = {name: method.get_parameter(key) for name, key in LAYERS.items()}
    return largest([(value, there(f"trace/{name}")) for name, value in {"loss": losses, **learned}.items()])
