"""Scripts called in this process as `main(argv)` under `run_script`, and archives of folders."""

import importlib.util
import zipfile

from conftest import ROOT

from utils import run_script


def load(name):
    """The module in scripts/ or experiments/."""
    (path,) = (path for folder in ("scripts", "experiments") if (path := ROOT / folder / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(name, *argv):
    """The exit code."""
    return run_script(lambda: load(name).main([str(arg) for arg in argv]))


def refused(capsys, name, *argv):
    """The error, which must be one line, of a call that must end with exit code 2."""
    assert call(name, *argv) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


def zipped(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path
