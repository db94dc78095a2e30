"""Command line: trains or tests one run.

python main.py --dataset CIFAR10 --protocol II --M 4 --feat_dim 48 ... --notes CifarII32bits
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, parse, recipe_line, recorded
from utils import LOG, InputError, check_writable, locked, logging_to, naming_lack_of_memory, new_log, run_script

if TYPE_CHECKING:
    from results import Files


def run(config: Config) -> None:
    """Train and test, or only test, what the flags describe. Raises InputError, RunError or Stopped."""
    import engine  # with PyTorch, which --help need not wait for
    from checkpoint import Signals, find_state, is_finished
    from distributed import content_of_first, is_first, largest, own_device, process_group, use_device
    from results import Files

    asked = config.precision
    config = config.replace(device=own_device(config.device))
    config = config.replace(precision=use_device(config.device, asked))
    files = Files(Path(config.output), config.notes)
    with process_group(config.device), Signals() as signals, held(config, files) if is_first() else nullcontext():
        finished = is_first() and config.resume and is_finished(files, config)
        if finished:
            print(f"{files.checkpoints} is finished: nothing to do")
        if largest(int(finished))[0]:
            return
        state = content_of_first(find_state(files, config) if is_first() else None, files.last)
        with logged(config, files) if is_first() else nullcontext(files.log) as log:
            if config.precision != asked:
                LOG.warning("WARNING: this GPU has no bfloat16: running with --precision %s", config.precision)
            if config.test_only:
                engine.run_test(config, files, log)
            else:
                engine.run(config, files, log, state, signals)
            LOG.info("results are in %s", files.checkpoints)


@contextmanager
def held(config: Config, files: "Files") -> Iterator[None]:
    """The place of a run's files, for this process alone. Raises InputError if it cannot be had."""
    check_place(config, files.checkpoints, files.model)
    for folder in (files.checkpoints, files.log.parent if config.disable_writer else files.tensorboard):
        check_writable(folder)
    busy = f"--notes {config.notes}: another process is at this run"
    with locked(files.checkpoints / ".lock", busy, wait=False) as files.check_lock:
        yield


@contextmanager
def logged(config: Config, files: "Files") -> Iterator[Path]:
    """The log of a run, which begins with its flags: the file that it is written to until the run takes its place."""
    with new_log(files.log, beside=bool(files.present())) as log, logging_to(log):
        LOG.info(recipe_line(config))
        for flag, value in sorted(recorded(config).items()):
            LOG.info("--%s %s", flag, json.dumps(value))
        yield log


def check_place(config: Config, folder: Path, model: Path) -> None:
    """Raise InputError if a test would write into the folder of a trained model."""
    if config.test_only:
        same = folder.resolve() == Path(config.checkpoint).resolve().parent
        if same or model.exists():
            raise InputError(f"--notes {config.notes}: {folder} holds a trained model; choose another name")


def start(argv: list[str] | None) -> None:
    """Do what the flags say; a lack of memory ends in one line too."""
    config = parse(argv)
    if config.dry_run:
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0":
            print(json.dumps(vars(config), indent=2))
        return
    with naming_lack_of_memory():
        run(config)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that failed; 128 + its number for a signal (130: interrupted)."""
    script = partial(start, argv)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return run_script(script)
    from distributed import launched, leave, said_once

    code = run_script(said_once()(script))
    return leave(code) if code and launched() else code


if __name__ == "__main__":
    sys.exit(main())
