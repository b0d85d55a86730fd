"""Proof on real runs: what was made from what can be told later, and made again, through the command line."""

import json
import shutil
from pathlib import Path

import pytest

from aiexec.files import digest
from aiexec.run.proof import proof_of, read_executed
from aiexec.run.records import STEPS
from aiexec.run.stamp import cell_digests
from aiexec.settings import load_settings
from aiexec.store import EVENTS, Ledger, open_ledger
from tests.conftest import aiexec, answer
from tests.faults.project import CELLS, RUN, lay_out, write_notebook

CHANCE = [*CELLS["report"][:2], ("", "import random, time\nlucky = random.random()\nprint(time.time(), object(), 'at', time.ctime())"),
          ("", "text = f'{late} late in {month}'\nprint(text if lucky < 2 else '')"), CELLS["report"][-1]]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A project in which one run was done; copy it before changing it."""
    root = lay_out(tmp_path_factory.mktemp("proof") / "p", kernels="warm", cells={**CELLS, "report": CHANCE})
    ran = aiexec(*RUN, cwd=root)
    assert ran.returncode == 0, ran.stderr
    return root


@pytest.fixture()
def project(done, tmp_path) -> Path:
    """A copy that may be changed: a project that was moved, too."""
    return shutil.copytree(done, tmp_path / "moved")


def row(root: Path, step: str) -> dict:
    return open_ledger(load_settings(root)).rows(STEPS, step=step)[0]


def executed(root: Path, step: str) -> Path:
    return root / ".aiexec" / row(root, step)["notebook"]


def change(path: Path, edit) -> None:
    """Edit an executed notebook as a JSON file."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    edit(nb)
    path.write_text(json.dumps(nb), encoding="utf-8")


def printed(nb: dict, text: str) -> dict:
    """The output that holds a text."""
    return next(one for cell in nb["cells"] for one in cell.get("outputs", []) if text in "".join(one.get("text", "")))


def test_an_untouched_run_is_sound_and_bears_everything(project):
    assert answer("verify", cwd=project) == []
    proof = proof_of(read_executed(executed(project, "count")))
    assert proof["notebook"] == "usecases/late/count.ipynb" and proof["parameters"]["month"] == "2013-05"
    assert proof["inputs"]["flights"] == row(project, "make")["outputs"]["flights"]["digest"]
    assert {"python", "packages", "platform"} == {*proof["environment"]} and proof["status"] == "done" and proof["seal"]


def edit_output(nb: dict) -> None:
    printed(nb, "20")["text"] = ["21\n"]


def edit_source(nb: dict) -> None:
    nb["cells"][-2]["source"] = "late = 20"


def drop_cell(nb: dict) -> None:
    del nb["cells"][-1]


def edit_parameter(nb: dict) -> None:
    nb["metadata"]["papermill"]["parameters"]["month"] = "2013-06"


def edit_status(nb: dict) -> None:
    nb["metadata"]["aiexec"]["status"] = "failed"


def refit(nb: dict) -> None:
    edit_output(nb)
    nb["metadata"]["aiexec"]["proof"]["cells"] = cell_digests(nb)


@pytest.mark.parametrize(("edit", "says"), [
    (edit_output, "The output of code cell 4 was edited after the run."), (edit_source, "Code cell 4 was edited after the run."),
    (drop_cell, "Code cell 5 was removed after the run."), (edit_parameter, "The parameter month is not the one that it was run with."),
    (edit_status, "It says status failed, but its proof says done."), (refit, "The seal is wrong"),
], ids=lambda one: getattr(one, "__name__", ""))
def test_what_was_edited_is_named(project, tmp_path, edit, says):
    change(executed(project, "count"), edit)
    told = aiexec("verify", cwd=project)
    assert told.returncode == 1 and says in told.stdout and "count: notebook.ipynb is not what was recorded." in told.stdout
    alone = shutil.copy(executed(project, "count"), tmp_path / "mailed.ipynb")
    told = aiexec("verify", alone, cwd=tmp_path)
    assert "cannot be told" in told.stdout
    assert (told.returncode, says in told.stdout) == ((0, False) if edit is refit else (1, True))
    # where its project is worked in, the key is at hand
    assert says in aiexec("verify", alone, cwd=project).stdout


def test_a_torn_table_made_again_stands_for_the_one_that_a_later_step_was_given(project):
    table = project / ".aiexec" / row(project, "make")["outputs"]["flights"]["file"]
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    assert [found["step"] for found in answer("verify", cwd=project, code=1)] == ["make", "count"]
    again = aiexec(*RUN, cwd=project)
    assert again.returncode == 0, again.stderr
    newest = {one["step"]: one["status"] for one in open_ledger(load_settings(project)).rows(STEPS, order="started")}
    assert (newest["make"], newest["count"]) == ("done", "cached")
    assert answer("verify", cwd=project) == []


def test_what_has_changed_since_is_named(project):
    source = project / "usecases" / "late" / "make.ipynb"
    whole = source.read_text()
    source.write_text(whole.replace("rows = n", "rows = n + 0"))
    table = project / ".aiexec" / row(project, "make")["outputs"]["flights"]["file"]
    kept = table.read_bytes()
    table.write_bytes(kept + b" ")
    said = [found["problem"].split(" (")[0] for found in answer("verify", cwd=project, code=1)]
    assert said == ["flights.parquet is not what was recorded.", "make.ipynb has changed since: code cell 3 was edited.",
                    "Its input flights"]
    table.unlink()
    assert "count: Its input flights" in aiexec("verify", cwd=project).stdout
    refused = aiexec("reproduce", "--step", "count", cwd=project)
    assert refused.returncode == 1 and "count cannot be made again: Its input flights" in refused.stderr
    table.write_bytes(kept)
    source.write_text(whole)
    assert answer("verify", cwd=project) == []


def test_a_notebook_without_a_project_is_verified(tmp_path):
    write_notebook(tmp_path / "report.ipynb", [CELLS["report"][0], *CELLS["report"][2:]])
    ran = aiexec("run", "report.ipynb", "-p", "late", 3, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    told = aiexec("verify", "report-output.ipynb", cwd=tmp_path)
    assert told.returncode == 0 and "bears no seal" in told.stdout, told.stdout + told.stderr
    change(tmp_path / "report-output.ipynb", lambda nb: printed(nb, "3 late").update(text="0 late in 2013-04\n"))
    told = aiexec("verify", "report-output.ipynb", cwd=tmp_path)
    assert told.returncode == 1 and "The output of code cell 2 was edited after the run." in told.stdout
    assert aiexec("verify", "report.ipynb", cwd=tmp_path).stderr.startswith("Error: report.ipynb bears no proof.")


def records(root: Path) -> tuple:
    """What is on record, to see that nothing was added."""
    ledger = Ledger(load_settings(root))
    return ledger.count(EVENTS), ledger.count(STEPS), digest(root / ".aiexec" / "runs")


def test_a_run_is_made_again_beside_its_record(project):
    before = records(project)
    found = answer("reproduce", cwd=project)
    assert (found["same"], found["differences"], found["left_out"]) == (["make", "count", "report"], [], {})
    assert records(project) == before
    # the library of today gives another result, and that is named with its cause
    for step, old, new in [("make", "i % 2", "i % 2 + 0.25"), ("count", "print(late)", "print(late + shop.more)")]:
        path = project / "usecases" / "late" / f"{step}.ipynb"
        path.write_text(path.read_text().replace(old, new).replace("import pandas as pd", "import shop\\nimport pandas as pd"))
    (project / "shop.py").write_text("more = 1\n")
    again = aiexec("run", "late", "-p", "month", "2013-06", cwd=project)
    assert again.returncode == 0, again.stderr
    (project / "shop.py").write_text("more = 2\n")
    told = aiexec("reproduce", "--step", "count", cwd=project)
    assert told.returncode == 1, told.stdout + told.stderr
    assert "shop.py, which it used, has changed since." in told.stdout
    assert "count: code cell 4 shows something else: line 1 was" in told.stdout


def test_what_acts_is_left_out_and_what_is_unknown_is_refused(project):
    path = project / "usecases" / "late" / "report.ipynb"
    path.write_text(path.read_text().replace("import random", "import aiexec.decide.outbox\\nimport random"))
    ran = aiexec(*RUN, cwd=project)
    assert ran.returncode == 0, ran.stderr
    told = aiexec("reproduce", "--step", "report", cwd=project)
    assert told.returncode == 0 and "Left out report: it imports aiexec.decide.outbox" in told.stdout
    assert answer("reproduce", "--step", "report", "--all", cwd=project)["same"] == ["report"]
    refused = aiexec("reproduce", "--step", "reprot", cwd=project)
    assert refused.returncode == 1 and "Did you mean 'report'?" in refused.stderr
