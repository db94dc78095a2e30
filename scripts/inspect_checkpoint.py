#!/usr/bin/env python3
"""The content of a checkpoint: what model.cpt or last.cpt (or the folder they are in) holds, which run it is from, how
far that came, and whether it is whole.

python scripts/inspect_checkpoint.py checkpoints/CifarII32bits
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import InputError, Parser, check_regular, run_script, sha256

if TYPE_CHECKING:
    from torch import Tensor


def tensors_of(state: dict | list, prefix: str = "") -> "dict[str, Tensor]":
    """All tensors in nested dictionaries and lists, by their path."""
    from torch import Tensor

    found = {}
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, dict | list):
            found |= tensors_of(value, f"{prefix}{name}.")
    return found


def describe(path: Path) -> list[str]:
    """Lines about a checkpoint. Raises InputError if it is none, or damaged."""
    from checkpoint import load_state
    from methods.backbones import read_state_dict

    check_regular(path)
    state = load_state(path) if path.name == "last.cpt" else read_state_dict(path, "checkpoint")
    model = state["model"] if path.name == "last.cpt" else state
    tensors = tensors_of(state)
    size = sum(tensor.nbytes for tensor in tensors.values())
    lines = [f"{path}: whole, {path.stat().st_size / 2**20:.1f} MiB, {len(tensors)} tensors of {size / 2**20:.1f} MiB"]
    broken = [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        lines.append(f"  NOT FINITE: {', '.join(broken)}")
    codebooks = model.get("quantizer.codebooks", model.get("pq_layer._C"))
    if codebooks is not None and codebooks.dim() == 3:
        M, K, d = codebooks.shape
        lines.append(f"  {M} codebooks of {K} codewords of {d} dimensions: {round(M * math.log2(K))} bits per image")
    if "encoder.2.weight" in model:
        lines.append(f"  an encoder of CIBHash: {len(model['encoder.2.weight'])} bits per image")
    if path.name == "last.cpt":
        lines += describe_state(state)
    lines += describe_run(path)
    return lines + [f"  {name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in tensors.items()]


def describe_state(state: dict) -> list[str]:
    """Lines about the run that a `last.cpt` is of, and how far it came."""
    config = state["config"]
    best = f"best val mAP {state['best']:.6f}" if state["best"] >= 0 else "not validated yet"
    return [
        f"  of the run {config.get('notes')}: recipe {config.get('recipe')}, {config.get('dataset')}, "
        f"{config.get('backbone')}, seed {config.get('seed')}",
        f"  stands in epoch {state['epoch']} of {config.get('epoch_num')}, {state['step']} steps of it done; {best}, "
        f"{state['worse_in_a_row']} validations since",
    ]


def describe_run(path: Path) -> list[str]:
    """Lines about the `metrics.json` beside the checkpoint."""
    from results import read_metrics

    if not (path.parent / "metrics.json").exists():
        return ["  there is no metrics.json beside it: its run has not finished"]
    metrics = read_metrics(path.parent / "metrics.json")
    value = metrics["map"]
    found = "no labels" if value is None else f"MAP@{metrics.get('topK') or 'all'} {value:.6f}"
    kept = "last epoch" if "unlabelled" in metrics else f"best epoch {metrics.get('best_epoch')}"
    lines = [
        f"  metrics.json beside it: {metrics['config'].get('notes')}, {found}, {kept} of {metrics.get('epochs_run')}"
    ]
    if path.name == "model.cpt" and metrics.get("model_sha256") != sha256(path):
        lines.append("  NOT THE SAME MODEL: metrics.json is of another one")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("path", type=Path, help="model.cpt, last.cpt, or the folder of a run")
    parser.add_argument("--dry_run", action="store_true", help="print what would be read, read nothing")
    own = parser.parse_args(argv)
    path, names = own.path, ("model.cpt", "last.cpt")
    if own.dry_run:
        print(f"would read {path}" if path.name in names else f"would read {path}, or of that folder {names[0]} and "
              f"{names[1]}")  # fmt: skip
        return
    paths = [path / name for name in names if (path / name).exists()] if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: there is neither a model.cpt nor a last.cpt in it")
    faults = []
    for each in paths:
        try:
            print("\n".join(describe(each)))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("; ".join(faults))


if __name__ == "__main__":
    sys.exit(run_script(main))
