"""Command line: trains or tests one run.

python main.py --dataset CIFAR10 --protocol II --M 4 --feat_dim 48 ... --notes CifarII32bits
"""

import json
import sys
from pathlib import Path

from config import Config, parse, recipe_line, recorded
from utils import LOG, InputError, check_writable, locked, logging_to, naming_lack_of_memory, new_log, run_script


def run(config: Config) -> None:
    """Train and test, or only test, what the flags describe. Raises InputError, RunError or Stopped."""
    import engine  # with PyTorch, which --help need not wait for
    from checkpoint import Signals, find_state, is_finished
    from distributed import use_device
    from results import Files

    asked = config.precision
    config = config.replace(precision=use_device(config.device, asked))
    files = Files(Path(config.output), config.notes)
    check_place(config, files.checkpoints, files.model)
    for folder in (files.checkpoints, files.log.parent if config.disable_writer else files.tensorboard):
        check_writable(folder)
    busy = f"--notes {config.notes}: another process is at this run"
    with Signals() as signals, locked(files.checkpoints / ".lock", busy, wait=False) as files.check_lock:
        if config.resume and is_finished(files, config):
            print(f"{files.checkpoints} is finished: nothing to do")
            return
        state = find_state(files, config)
        with new_log(files.log, beside=bool(files.present())) as log, logging_to(log):
            LOG.info(recipe_line(config))
            if config.precision != asked:
                LOG.warning("WARNING: this GPU has no bfloat16: running with --precision %s", config.precision)
            for flag, value in sorted(recorded(config).items()):
                LOG.info("--%s %s", flag, json.dumps(value))
            if config.test_only:
                engine.run_test(config, files, log)
            else:
                engine.run(config, files, log, state, signals)
            LOG.info("results are in %s", files.checkpoints)


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
        print(json.dumps(vars(config), indent=2))
        return
    with naming_lack_of_memory():
        run(config)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that failed; 128 + its number for a signal (130: interrupted)."""
    return run_script(lambda: start(argv))


if __name__ == "__main__":
    sys.exit(main())
