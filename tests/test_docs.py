"""The documents: every command in them is sound, every link leads somewhere, and the first page is short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands():
    """Each command line of the bash blocks, with the page it stands on."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip():
                    yield pytest.param(shlex.split(line), id=f"{page.name}: {' '.join(line.split())[:60]}")


COMMANDS = list(commands())
assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_are_sound(command, tmp_path):
    """With --dry_run: flags are checked, nothing is read, trained or written."""
    program = {"python": sys.executable, "bash": "bash"}[command[0]]
    flags = [] if "--dry_run" in command else ["--dry_run"]
    environment = os.environ | {"MECOQ_PYTHON": sys.executable}
    before = sorted(path.name for path in ROOT.iterdir())
    result = subprocess.run(
        [program, *command[1:], *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout
    assert sorted(path.name for path in ROOT.iterdir()) == before


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_first_page_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9216


def test_every_module_at_the_top_is_on_the_first_page():
    text = (ROOT / "README.md").read_text()
    missing = [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text]
    assert not missing


def test_no_path_of_a_machine_stands_anywhere():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".md", ".py", ".sh", ".txt", ".json", ".log", ".toml", ".cff") and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert not re.search(r"(?<![\w.{}/])/(root|work|home|Users)/", text), Path(name)
