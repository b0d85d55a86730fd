"""The README is true: it is what its notebook says, its commands run, its links lead somewhere, its figures are the ledger's."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from aiexec.cli.commands import main
from aiexec.cli.work import SECTIONS, year_text
from aiexec.define.usecase import load_usecase
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from . import generated
from .conftest import ROOT, aiexec

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("path", generated.wanted(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_made_from_notebooks_is_in_step(path):
    assert path.read_text(encoding="utf-8") == generated.wanted()[path], "make notebooks brings it in step"


def test_every_verb_is_in_the_readme_and_in_a_section_of_the_help():
    assert sorted(main.commands) == sorted(name for names in SECTIONS.values() for name in names)
    for name in main.commands:
        assert f"aiexec {name}" in README or f"`{name}`" in README, name


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 30
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_table_is_the_one_of_the_ledger(year):
    settings = load_settings(year)
    for line in year_text(load_usecase("flight_delays", settings), open_ledger(settings)).splitlines():
        assert line.strip() in README, line


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make ")])
def test_the_two_commands_are_there(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_the_tour_runs_as_written(year, tmp_path):
    project = tmp_path / "demo"
    shutil.copytree(year, project)
    tour = [shlex.split(line)[1:] for line in COMMANDS[COMMANDS.index("cd demo") + 1 :] if line.startswith("aiexec ")]
    assert len(tour) > 12
    for words in tour:
        done = aiexec(*words, cwd=project)
        # an open alert makes `monitor` end with 1, so that a scheduler notices
        assert done.returncode == (1 if words[0] == "monitor" else 0), (words, done.stdout + done.stderr)
        assert done.stdout.strip(), words
        if words[:2] == ["run", "flight_delays"]:
            assert done.stderr.count("unchanged") == 4, done.stderr
