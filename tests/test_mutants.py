"""The table of mutations fits the code as it is: a change that moved away would be tried on nothing."""

import re

import pytest
from mutants import fault, names_of_tests, selections
from mutations import MUTATIONS, Mutation

ROWS = [mutation for rows in MUTATIONS.values() for mutation in rows]


@pytest.mark.parametrize("mutation", ROWS, ids=lambda mutation: f"{mutation.file}-{mutation.old.strip()[:40]}")
def test_a_mutation_fits_the_code_and_the_tests(mutation):
    assert fault(mutation) is None
    names = "\n".join(map(names_of_tests, mutation.tests.split()))
    for word in re.findall(r"\w+", mutation.k):
        parametrized = mutation.tests in ("every_flag", "feature_cache")  # some words are of parameters
        assert parametrized or word in ("and", "or", "not") or word in names, word


def test_there_are_many_and_few_change_nothing():
    assert len(ROWS) == len({(row.file, row.old, row.new) for row in ROWS}) >= 120
    assert sum(bool(row.equivalent) for row in ROWS) <= 5
    assert all(len(row.equivalent) > 20 for row in ROWS if row.equivalent)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"old": "not there"}, "0 times"),
        ({"old": "import"}, "instead of once"),
        ({"new": "LOG = logging.getLogger"}, "changes nothing"),
        ({"new": "LOG = ("}, "makes no Python"),
        ({"tests": "nothing"}, "no tests in nothing"),
        ({"tests": ""}, "no tests in"),
    ],
)
def test_rows_that_do_not_fit_are_found(change, words):
    row = {"file": "utils.py", "old": "LOG = logging.getLogger", "new": "LOG = logging.Logger", "tests": "utils"}
    assert fault(Mutation(**row)) is None
    assert words in fault(Mutation(**(row | change)))


def test_a_file_is_run_once_with_all_that_mutations_name_of_it():
    rows = [Mutation("a", "b", "c", tests, k) for tests, k in (("x y", "p"), ("x", "q or r"), ("z", "s"), ("z", ""))]
    assert selections(rows) == {"x": "(p) or (q or r)", "y": "(p)", "z": ""}
