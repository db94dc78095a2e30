"""The house: what may import what, how large files and functions may be, and which words are used."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

# bottom to top: a module imports modules of lower rows only, or of its own row, without a circle
ORDER = [
    {"utils"},
    {"decoding", "ties", "packages"},
    {"transforms", "retrieval", "distributed", "loss", "photos"},
    {"readers", "spq_views"},
    {"vectors"},
    {"data"},
    {"loaders", "methods.flags"},
    {"methods", "methods.prepared", "methods.batch_norm"},
    {"methods.int8"},
    {"methods.backbones"},
    {"methods.base"},
    {"methods.mecoq", "methods.spq", "methods.cibhash"},
    {"config"},
    {"quantizers", "results", "feature_cache", "model_file", "optimizer"},
    {"checkpoint", "evaluation"},
    {"engine"},
    {"search"},
    {"main", "main_SPQ", "experiments"},
    {"scripts"},
]
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 400, 40, 6
# keyword-only, and as many as the paper's equations have symbols
EQUATIONS = {"loss.log_negative_term", "loss.contrastive_loss"}


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


SOURCES = [path for path in tracked("*.py") if path.parts[0] != "tests"]
TESTS = [path for path in tracked("*.py") if path.parts[0] == "tests"]
assert len(SOURCES) > 30


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imported(path: Path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def row_of(module: str) -> int:
    for row, names in enumerate(ORDER):
        if module in names or module.partition(".")[0] in names - {"methods"}:
            return row
    raise AssertionError(f"{module} is in no row of ORDER")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module):
    package = module.partition(".")[0]
    for below in imported(MODULES[module]) - {module}:
        same = package in ("experiments", "scripts", "search") and below.partition(".")[0] == package
        if not same:
            assert row_of(below) < row_of(module), f"{module} imports {below}"


def test_nothing_imports_main():
    assert not [module for module, path in MODULES.items() if "main" in imported(path)]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_only_spqs_views_need_kornia(path):
    for node in tree_of(path).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
        assert not any(name and name.partition(".")[0] == "kornia" for name in names)


def test_there_is_no_circle():
    graph = {module: imported(path) for module, path in MODULES.items()}
    done, order = set(), list(graph)
    while order:
        free = [module for module in order if graph[module] - {module} <= done]
        assert free, f"a circle among {order}"
        done |= set(free)
        order = [module for module in order if module not in done]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_files_and_functions_fit_on_a_screen(path):
    assert len((ROOT / path).read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{module_of(path)}.{node.name}"
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION or name in EQUATIONS, name
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
            assert len(parameters) <= MOST_PARAMETERS or name in EQUATIONS, name


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_tests_can_be_read_too(path):
    assert len((ROOT / path).read_text().splitlines()) <= 600
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


PRIVATE = re.compile(r"\b(can not|is no number|no numbers|cells?|grounds?|bank(ed)?)\b")
QUESTION = re.compile(r"\A(What|How|Where|Who|When|Which|Is|Does|Do)\b[^.]*\?")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_docstrings_are_statements_in_the_fields_words(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            assert not QUESTION.match(text), text
            assert not PRIVATE.search(text), text


def test_words_of_the_documents():
    for path in tracked("*.md"):
        if path.name != "CHANGELOG.md":
            found = re.search(r"\bcan not\b|\bis no number\b|\btrained cells\b", (ROOT / path).read_text())
            assert not found, f"{path}: {found}"
