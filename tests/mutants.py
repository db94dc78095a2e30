"""Runs the mutations of `mutations.py`: each is made in a copy of the project, where the tests that its row names must
fail.

    bash scripts/test.sh --mutants [--only TEXT] [--workers N] [--verbose]

Exit code 0 if only mutations that are marked as equivalent survive, 1 if others do, 2 if the table is wrong or the
tests fail without any mutation.
"""

import argparse
import ast
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mutations import MUTATIONS, Mutation
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120  # seconds, of the tests of one mutation
TIMEOUT_OF_ALL = 900  # seconds, of the tests of one file without any
NO_TESTS, WRONG_CALL = 5, 4  # pytest's exit codes


class WrongTableError(Exception):
    """Rows that do not fit the code, or tests that fail or are not there without any mutation."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: whether it survived, which test noticed it, and the seconds that took."""

    area: str
    mutation: Mutation
    survived: bool
    killer: str
    seconds: float


# ---------------------------------------------------------------- the table


@cache
def names_of_tests(test: str) -> str:
    """The names of the test functions of a file, one a line; empty if there is no such file."""
    path = ROOT / "tests" / f"test_{test}.py"
    return "\n".join(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)) if path.exists() else ""


def fault(mutation: Mutation) -> str | None:
    """What is wrong with a row; None if it fits the code and the tests as they are."""
    path = ROOT / mutation.file
    text = path.read_text() if path.exists() else ""
    if text.count(mutation.old) != 1:
        return f"stands {text.count(mutation.old)} times in the file instead of once"
    if mutation.new == mutation.old:
        return "changes nothing"
    try:
        ast.parse(text.replace(mutation.old, mutation.new))
    except SyntaxError as error:
        return f"makes no Python: {error}"
    missing = [test for test in mutation.tests.split() if not names_of_tests(test)]
    return f"no tests in {', '.join(missing)}" if missing or not mutation.tests else None


# ---------------------------------------------------------------- running


def copy_project(folder: Path) -> None:
    """Copy the tracked files, as they are in the working tree."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str], k: str, timeout: float) -> tuple[int | None, str]:
    """The exit code of pytest, None if it took too long, and what it printed."""
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-seed=0",
        f"--basetemp={folder / 'tmp'}", *(f"tests/test_{test}.py" for test in tests), *(["-k", k] if k else []),
    ]  # fmt: skip
    # without bytecode: that of a file is told from a change's by size and whole seconds alone
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output = process.communicate(timeout=timeout)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, "took too long"


@contextmanager
def mutated(folder: Path, mutation: Mutation) -> Iterator[None]:
    """The copy with a mutation in it."""
    path = folder / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(text)


def run_mutation(copies: queue.Queue, area: str, mutation: Mutation) -> Outcome:
    """Make a mutation in one of the copies that are free, and run its tests."""
    folder, start = copies.get(), time.perf_counter()
    try:
        with mutated(folder, mutation):
            code, output = run_tests(folder, mutation.tests.split(), mutation.k, TIMEOUT)
    finally:
        copies.put(folder)
    if code in (NO_TESTS, WRONG_CALL):
        raise WrongTableError(f"{output}\nerror: {mutation.tests} -k {mutation.k!r}: no such tests")
    noticed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    killer = noticed[0] if noticed else output.strip().rpartition("\n")[2]
    return Outcome(area, mutation, code == 0, killer, time.perf_counter() - start)


def run_unchanged(copies: queue.Queue, test: str, k: str) -> None:
    """Run tests without any mutation."""
    folder = copies.get()
    try:
        code, output = run_tests(folder, [test], k, TIMEOUT_OF_ALL)
    finally:
        copies.put(folder)
    if code != 0:
        raise WrongTableError(f"{output}\nerror: tests/test_{test}.py fails without any mutation")


def selections(mutations: list[Mutation]) -> dict[str, str]:
    """Test file -> the expression for all of its tests that mutations name; empty: all of them."""
    found: dict[str, set[str]] = {}
    for mutation in mutations:
        for test in mutation.tests.split():
            found.setdefault(test, set()).add(mutation.k)
    return {test: "" if "" in ks else " or ".join(f"({k})" for k in sorted(ks)) for test, ks in found.items()}


# ---------------------------------------------------------------- all of them


def run_all(chosen: list[tuple[str, Mutation]], folders: list[Path], verbose: bool) -> list[Outcome]:
    """First the tests without any mutation, then each mutation."""
    copies: queue.Queue = queue.Queue()
    for folder in folders:
        copy_project(folder)
        copies.put(folder)
    outcomes: list[Outcome] = []
    pool = ThreadPoolExecutor(len(folders))
    try:
        before = selections([mutation for _, mutation in chosen])
        waiting = [pool.submit(run_unchanged, copies, test, k) for test, k in before.items()]
        for done in tqdm(as_completed(waiting), desc="without mutations", total=len(waiting)):
            done.result()
        waiting = [pool.submit(run_mutation, copies, *each) for each in chosen]
        with tqdm(as_completed(waiting), desc="mutations", total=len(waiting)) as bar:
            for done in bar:
                outcomes.append(done.result())
                bar.set_postfix(survivors=sum(outcome.survived for outcome in outcomes))
                if verbose:
                    bar.write(line_of(outcomes[-1]))
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or an interrupt those that wait do not begin
    return outcomes


def line_of(outcome: Outcome) -> str:
    mutation, what = outcome.mutation, "SURVIVED" if outcome.survived else f"killed by {outcome.killer}"
    return f"{outcome.seconds:5.1f} s  {mutation.file}: {mutation.old.strip()!r} -> {mutation.new.strip()!r}: {what}"


def report(outcomes: list[Outcome]) -> int:
    """Print the counts of each area and the survivors. Returns the exit code."""
    for area in MUTATIONS:
        found = [outcome for outcome in outcomes if outcome.area == area]
        if found:
            print(f"{area}: {sum(not outcome.survived for outcome in found)} of {len(found)} killed")
    survivors = [outcome.mutation for outcome in outcomes if outcome.survived]
    for mutation in survivors:
        print(f"\nSURVIVED  {mutation.file}\n  - {mutation.old.strip()}\n  + {mutation.new.strip()}")
        print(f"  tests: {mutation.tests}{f', -k {mutation.k!r}' if mutation.k else ''}")
        if mutation.equivalent:
            print(f"  equivalent: {mutation.equivalent}")
    unexpected = sum(not mutation.equivalent for mutation in survivors)
    print(f"\n{len(outcomes)} mutations, {len(survivors)} survived, {unexpected} of them unexpectedly")
    return 1 if unexpected else 0


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run those whose area, file or text contains this")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="(default: a core each)")
    parser.add_argument("--verbose", action="store_true", help="say which test noticed each mutation")
    given = parser.parse_args()
    every = [(area, mutation) for area, rows in MUTATIONS.items() for mutation in rows]
    chosen = [row for row in every if given.only in "\n".join((row[0], row[1].file, row[1].old, row[1].new))]
    try:
        faults = [f"{mutation.file}: {mutation.old!r}: {found}" for _, mutation in every if (found := fault(mutation))]
        if faults:
            raise WrongTableError("\n".join(faults))
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            folders = [Path(folder) / str(number) for number in range(max(given.workers, 1))]
            return report(run_all(chosen, folders, given.verbose))
    except WrongTableError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
