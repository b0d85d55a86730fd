"""A project of your own: laid out in a second, sound at once, and its README and notebooks do what they say."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from aiexec.files import digest
from aiexec.govern.audit import verify_chain
from aiexec.model.findings import findings
from aiexec.model.gates import gates
from aiexec.model.registry import VERSIONS, champion
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, answer, environment, plain_user

NAME = "my_usecase"
NOTEBOOKS = ["ingest", "train", "gate", "score"]


def shell(**more: str) -> dict[str, str]:
    """What a person's shell has: the commands of this environment on the path."""
    return environment(PATH=os.pathsep.join([str(AIEXEC.parent), os.environ["PATH"]]), **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("new")
    done = aiexec("new", NAME, cwd=place)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in place.iterdir()] == [NAME]
    return place / NAME


def test_what_is_laid_out_is_complete_and_clean(made, tmp_path):
    texts = [path for path in made.rglob("*") if path.is_file()]
    assert len(texts) > 12
    assert not [path for path in texts if "{{" in f"{path}{path.read_text(encoding='utf-8')}"]
    before = digest(made)
    for command in ("nbdev-clean", "nbdev-export"):
        copy = shutil.copytree(made, tmp_path / command)
        subprocess.run([AIEXEC.with_name(command)], cwd=copy, check=True, capture_output=True)
        if command == "nbdev-clean":
            subprocess.run([AIEXEC.with_name(command), "--fname", "usecases"], cwd=copy, check=True, capture_output=True)
        for path in texts:
            assert (copy / path.relative_to(made)).read_bytes() == path.read_bytes(), f"{command} changes {path.name}"
    assert digest(made) == before


def test_nothing_is_wrong_with_it(made):
    assert answer("check", cwd=made) == []
    for verb in ("doctor", "models", "portfolio"):  # before anything was run
        done = aiexec(verb, cwd=made)
        assert done.returncode == 0, done.stderr


def commands(readme: str) -> list[str]:
    """The commands of a README: what stands indented, up to the remark."""
    return [re.split(r" {2,}", line.strip())[0] for line in readme.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def followed(made) -> Path:
    """The project after somebody typed what its README says, to the last but one command."""
    *typed, last = commands((made / "README.md").read_text(encoding="utf-8"))
    assert typed[0] == "pytest" and last == "aiexec dashboard"
    for command in typed:
        done = subprocess.run(shlex.split(command), cwd=made, env=shell(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if command == "pytest":
            assert re.search(r"\d passed", done.stdout) and not re.search(r"skipped|warning", done.stdout), done.stdout
    return made


def test_its_own_tests_and_the_commands_of_its_readme_work(followed):
    settings = load_settings(followed)
    ledger = open_ledger(settings)
    assert champion(NAME, ledger) == 1
    assert [row["version"] for row in ledger.rows(VERSIONS)] == [1]
    assert answer("portfolio", cwd=followed)[0]["champion"] == 1
    assert verify_chain(ledger).ok
    assert {one["outcome"] for one in gates(NAME, 1, ledger)} == {"pass"}
    assert set(findings(NAME, 1, ledger)) >= {"evaluation", "calibration", "importance", "limits"}
    page = (followed / "packets" / f"{NAME}-1.html").read_text(encoding="utf-8")
    assert all(words in page for words in ("flavanoids", "roc_auc", "Calibration")) and "<script" not in page
    for words in (["roi"], ["models", "--card", 1], ["verify"]):
        done = aiexec(*words, cwd=followed)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_its_dashboard_opens(followed):
    serving = subprocess.Popen([AIEXEC, "dashboard"], cwd=followed, env=shell(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        address = next(found[0] for line in serving.stdout if (found := re.search(r"http://\S+", line)))
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(address, timeout=60) as page:
            assert NAME in page.read().decode()
    finally:
        serving.send_signal(signal.SIGTERM)
        said = serving.communicate(timeout=30)[1]
    assert "Traceback" not in said


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_its_notebooks_run_as_they_stand(followed, notebook, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(followed))
    path = followed / "usecases" / NAME / f"{notebook}.ipynb"
    NotebookClient(nbformat.read(path, 4), timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize(("name", "said"), [
    ("My usecase!", "such as 'my_usecase'"),
    ("2nd", "such as 'p_2nd'"),
    ("späte_flüge", "such as"),
    ("class", "such as 'my_class'"),
    ("json", "such as 'my_json'"),
    ("tests", "such as 'my_tests'"),
    ("..", "cannot be the name"),
    ("", "cannot be the name"),
    ("a" * 60, "cannot be the name"),
])
def test_a_bad_name_is_refused(tmp_path, name, said):
    done = aiexec("new", name, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "", done.stdout
    assert said in done.stderr and done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(made):
    before = digest(made)
    done = aiexec("new", NAME, cwd=made.parent)
    assert done.returncode == 1 and f"{NAME} exists and is not empty. Choose another name" in done.stderr
    told = answer("new", NAME, cwd=made.parent, code=1)
    assert "exists" in told["problem"] and told["remedy"]
    assert digest(made) == before and [path.name for path in made.parent.iterdir()] == [NAME]


def test_a_place_that_cannot_be_written_is_left_alone(tmp_path):
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    done = subprocess.run([AIEXEC, "new", NAME], cwd=place, env=environment(), capture_output=True, text=True, preexec_fn=plain_user)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"{NAME} cannot be made: Permission denied. Choose a folder you can write." in done.stderr
    assert list(place.iterdir()) == []


def test_it_is_a_package(made, tmp_path):
    """Somebody else can install it: its library comes along, its data and records do not."""
    copy = shutil.copytree(made, tmp_path / NAME, ignore=shutil.ignore_patterns(".aiexec"))
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        listed = wheel.namelist()
    assert f"{NAME}/features.py" in listed and not [name for name in listed if "usecase.yaml" in name or name.startswith("tests/")]
