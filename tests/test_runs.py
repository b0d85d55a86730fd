"""Runs on real small pipelines: caching, failure, crash, resume, concurrency, and what is refused before anything starts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import yaml

from aiexec.data.datasets import read, resolve
from aiexec.define.usecase import UseCase, load_usecase
from aiexec.errors import AiexecError, LockedError, NotebookError, ParameterError, PipelineError, RunFailed
from aiexec.run.kernels import WarmKernels
from aiexec.run.proof import verify_run
from aiexec.run.records import RUNS, STEPS, Run
from aiexec.run.runner import resume_run, run_pipeline
from aiexec.settings import Settings, load_settings
from aiexec.store import Ledger, open_ledger

RAN = "import os, pathlib\nwith open(pathlib.Path(os.environ['AIEXEC_ROOT']) / 'ran.log', 'a') as log:\n" \
      "    log.write(f\"{os.environ['AIEXEC_USECASE']} {os.environ['AIEXEC_STEP']} {os.getpid()}\\n\")"
SLOW = "import time\nif os.environ.get('SLOW'):\n    time.sleep(60)"
MAKE = [("parameters", "month: str = '2013-04'\nn: int = 4"), ("", RAN),
        ("", "import pandas as pd\nflights = pd.DataFrame({'late': [i % 2 for i in range(n)]})\nrows = n"),
        ("outputs", "flights: 'pd.DataFrame'\nrows: int")]
COUNT = [("parameters", "month: str = '2013-04'\nflights: 'Dataset' = 'make.flights@2013-04'"), ("", RAN), ("", SLOW),
         ("", "import pandas as pd\nlate = int(pd.read_parquet(flights)['late'].sum())"), ("outputs", "late: int")]
REPORT = [("parameters", "month: str = '2013-04'\nlate: int = 0"), ("", RAN), ("", "text = f'{late} late in {month}'"),
          ("outputs", "text: str")]
PIPELINE = {"make": {"notebook": "make.ipynb"}, "count": {"notebook": "count.ipynb", "with": {"flights": "make.flights"}},
            "report": {"notebook": "report.ipynb", "with": {"late": "count.late"}}}
MONTH = {"month": "2013-05"}


class Project:
    """One project whose use cases share a fork server, each test with a use case of its own."""

    def __init__(self, root: Path):
        (root / "settings.ini").write_text("[aiexec]\nrecorder = none\n")
        (root / "ran.log").touch()
        self.settings: Settings = load_settings(root)
        self.ledger: Ledger = open_ledger(self.settings)
        self.kernels: WarmKernels | None = None

    def usecase(self, name: str, pipeline: dict = PIPELINE) -> UseCase:
        folder = self.settings.root / "usecases" / name
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"name": name, "title": "Late flights", "department": "operations", "owner": "ada@example.org", "risk": "minimal",
                 "success": [{"metric": "roc_auc", "at_least": 0.6}], "pipeline": pipeline,
                 "value": {"currency": "USD", "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 0}}
        (folder / "usecase.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))
        for step, cells in [("make", MAKE), ("count", COUNT), ("report", REPORT)]:
            if step in pipeline:
                self.write(name, step, cells)
        return load_usecase(name, self.settings)

    def write(self, name: str, step: str, cells: list[tuple[str, str]], text: str = "") -> None:
        made = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}) for tag, source in cells]
        notebook = nbformat.v4.new_notebook(cells=[*([nbformat.v4.new_markdown_cell(text)] if text else []), *made])
        nbformat.write(notebook, self.settings.root / "usecases" / name / f"{step}.ipynb")

    def run(self, usecase: UseCase, parameters: dict = MONTH, **options) -> Run:
        return run_pipeline(usecase, parameters, settings=self.settings, ledger=self.ledger, kernels=self.kernels, **options)

    def resume(self, run: str) -> Run:
        return resume_run(run, settings=self.settings, ledger=self.ledger, kernels=self.kernels)

    def ran(self, name: str, word: int = 1) -> list[str]:  # word 1: the steps that ran; 2: their processes
        lines = (self.settings.root / "ran.log").read_text().splitlines()
        return [line.split()[word] for line in lines if line.startswith(f"{name} ")]

    def rows(self, run: str, **conditions) -> list[dict]:
        return self.ledger.rows(STEPS, order="started", run=run, **conditions)

    def last(self, name: str) -> dict:
        return self.ledger.rows(RUNS, order="-started", usecase=name)[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    with WarmKernels(environment={"PYTHONPATH": str(project.settings.root)}) as kernels:
        project.kernels = kernels
        yield project


def statuses(run: Run) -> list[str]:
    return [step.status for step in run.steps.values()]


def edited(cells: list[tuple[str, str]], old: str, new: str) -> list[tuple[str, str]]:
    assert any(old in source for _, source in cells)
    return [(tag, source.replace(old, new)) for tag, source in cells]


def test_a_run_is_recorded_and_unchanged_steps_are_not_run_again(project):
    usecase = project.usecase("cached")
    first = project.run(usecase)
    assert (first.status, statuses(first)) == ("done", ["done", "done", "done"])
    assert first.steps["report"].outputs == {"text": "2 late in 2013-05"}
    assert resolve("make.flights@2013-05", "cached", project.ledger).rows == 4
    assert read("make.flights@2013-05", "cached", project.ledger)["late"].tolist() == [0, 1, 0, 1]
    assert project.last("cached")["status"] == "done"
    assert statuses(project.run(usecase)) == ["cached", "cached", "cached"]
    assert statuses(project.run(usecase, {"month": "2013-06"})) == ["done", "done", "done"]
    assert all(verify_run(project.ledger, row["run"]) == [] for row in project.ledger.rows(RUNS, usecase="cached"))


def test_an_edit_runs_a_step_and_what_depends_on_it(project):
    usecase = project.usecase("edited")
    project.run(usecase)
    project.write("edited", "count", COUNT, text="# Count\nthe late flights")
    assert statuses(project.run(usecase)) == ["cached", "cached", "cached"]
    project.write("edited", "count", edited(COUNT, ".sum())", ".sum()) + 10"))
    changed = project.run(usecase)
    assert statuses(changed) == ["cached", "done", "done"]
    assert changed.steps["report"].outputs == {"text": "12 late in 2013-05"}
    # another code with the same result costs nothing downstream
    project.write("edited", "count", edited(COUNT, ".sum())", ".sum() + 10)"))
    assert statuses(project.run(usecase)) == ["cached", "done", "cached"]
    assert project.ran("edited") == ["make", "count", "report", "count", "report", "count"]


def test_a_failure_keeps_the_notebook_and_the_run_goes_on_from_there(project):
    usecase = project.usecase("failing")
    project.write("failing", "count", [*COUNT[:-1], ("", "raise ValueError('no late flights')"), ("", "late += 1"), COUNT[-1]])
    with pytest.raises(RunFailed, match="Step count failed: ValueError: no late flights. Look at .*notebook.ipynb"):
        project.run(usecase)
    run = project.last("failing")
    rows = project.rows(run["run"])
    assert (run["status"], [(row["step"], row["status"]) for row in rows]) == ("failed", [("make", "done"), ("count", "failed")])
    executed = nbformat.read(project.settings.home / rows[1]["notebook"], 4)
    marks = [cell.source.split("\n")[0] for cell in executed.cells if "aiexec-mark" in cell.metadata.get("tags", [])]
    assert marks == ["**FAILED** · error in cell", "**NOT RUN** · this cell and those below"]
    project.write("failing", "count", COUNT)
    resumed = project.resume(run["run"])
    assert (resumed.run, resumed.steps["report"].outputs) == (run["run"], {"text": "2 late in 2013-05"})
    assert project.ran("failing") == ["make", "count", "count", "report"]
    assert [row["status"] for row in project.rows(run["run"], step="count")] == ["failed", "done"]


@contextmanager
def slow_runner(project: Project, name: str):
    """A run in a process of its own that stands in the middle of its second step."""
    program = ("import sys\nfrom pathlib import Path\nfrom aiexec.define.usecase import load_usecase\n"
               "from aiexec.settings import load_settings\nfrom aiexec.run.runner import run_pipeline\n"
               f"settings = load_settings(Path(sys.argv[1]))\nusecase = load_usecase(sys.argv[2], settings)\n"
               f"run_pipeline(usecase, {MONTH!r}, settings=settings)")
    process = subprocess.Popen([sys.executable, "-c", program, str(project.settings.root), name], stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "SLOW": "1", "AIEXEC_KERNELS": "cold"})
    try:
        deadline = time.monotonic() + 60
        while "count" not in project.ran(name):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def ended(process: int) -> bool:
    """Whether a process is gone, or goes within two seconds."""
    for _ in range(40):
        if not Path(f"/proc/{process}").exists() or ") Z " in Path(f"/proc/{process}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


def test_two_at_once_names_the_holder_and_a_killed_runner_is_resumed(project):
    usecase = project.usecase("killed")
    with slow_runner(project, "killed") as process:
        with pytest.raises(LockedError, match=rf"The run r\S+ of killed \(process {process.pid} on "):
            project.run(usecase)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    run = project.last("killed")
    assert (run["status"], len(project.ledger.rows(RUNS, usecase="killed"))) == ("running", 1)
    assert ended(int(project.ran("killed", word=2)[-1])), "the kernel outlived its runner"
    resumed = project.resume(run["run"])
    assert (resumed.run, statuses(resumed)) == (run["run"], ["done", "done", "done"])
    assert resumed.steps["report"].outputs == project.run(project.usecase("unhurt")).steps["report"].outputs
    assert project.ran("killed") == ["make", "count", "count", "report"]
    assert verify_run(project.ledger, run["run"]) == []


class Crash(BaseException):
    """Stands in for the end of the process: nothing after it is recorded."""


@contextmanager
def crashing(ledger: Ledger, at: int, after: bool):
    """Let the ledger end the process at its n-th transaction, before or after it is durable."""
    change, count = ledger.change, 0

    @contextmanager
    def limited(*arguments, **options):
        nonlocal count
        count += 1
        if count > at or count == at and not after:
            raise Crash
        with change(*arguments, **options) as one:
            yield one
        if count == at:
            raise Crash

    ledger.change = limited
    try:
        yield
    finally:
        del ledger.change


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_each_record_loses_nothing(project, after):
    name = f"crash_{'after' if after else 'before'}"
    pipeline = {"report": {"notebook": "report.ipynb"}, "again": {"notebook": "again.ipynb", "with": {"text": "report.text"}}}
    usecase = project.usecase(name, pipeline)
    again = [("parameters", "text: str = ''"), ("", RAN), ("", "size = len(text)"), ("outputs", "size: int")]
    project.write(name, "again", again)
    for at in range(1, 7):  # run.started, then started and done of two steps, run.done
        month = {"month": f"2013-{at:02}", "late": at}
        before = len(project.ran(name))
        with pytest.raises(Crash), crashing(project.ledger, at, after):
            project.run(usecase, month)
        rows = project.ledger.rows(RUNS, usecase=name, partition=month["month"])
        result = project.resume(rows[0]["run"]) if rows else project.run(usecase, month)
        assert result.steps["again"].outputs == {"size": len(f"{at} late in 2013-{at:02}")}
        assert verify_run(project.ledger, result.run) == []
        # complete on the disk, though not in the ledger: recorded, not done twice
        assert len(project.ran(name)) - before == 2, f"crash at record {at}"


def test_ctrl_c_is_recorded_as_cancelled_and_resumed(project, monkeypatch):
    usecase = project.usecase("cancelled")
    monkeypatch.setenv("SLOW", "1")

    def interrupt():
        while "count" not in project.ran("cancelled"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        project.run(usecase)
    monkeypatch.delenv("SLOW")
    run = project.last("cancelled")
    assert run["status"] == "cancelled"
    assert [row["status"] for row in project.rows(run["run"])] == ["done", "cancelled"]
    assert statuses(project.resume(run["run"])) == ["done", "done", "done"]
    assert project.ran("cancelled") == ["make", "count", "count", "report"]
    assert project.last("cancelled")["status"] == "done"


def test_a_flipped_bit_in_a_cached_output_is_found_and_computed_again(project):
    usecase = project.usecase("flipped")
    first = project.run(usecase)
    path = first.steps["make"].outputs["flights"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # what made it, and what was given it
    assert [finding.step for finding in verify_run(project.ledger, first.run)] == ["make", "count"]
    with pytest.raises(AiexecError, match="make.flights .* is not what was recorded"):
        project.run(usecase, only=["count"])
    again = project.run(usecase)
    assert statuses(again) == ["done", "cached", "cached"]
    assert again.steps["report"].outputs == first.steps["report"].outputs


def test_a_kernel_that_dies_is_reported_as_such(project):
    usecase = project.usecase("dying", {"report": PIPELINE["report"] | {"with": {}}})
    for number in (signal.SIGKILL, signal.SIGSEGV):
        death = [("", f"os.kill(os.getpid(), {int(number)})"), ("", "text = ''")]
        project.write("dying", "report", [*REPORT[:2], *death, REPORT[-1]])
        with pytest.raises(RunFailed, match=f"the kernel ended by signal {int(number)}"):
            project.run(usecase)
        row = project.ledger.rows(STEPS, order="-started", usecase="dying")[0]
        executed = nbformat.read(project.settings.home / row["notebook"], 4)
        assert executed.metadata["aiexec"]["failure"] == f"kernel died (signal {int(number)})"
        assert any(cell.source.startswith("**NOT RUN**") for cell in executed.cells)


class BrokenRecorder:
    def start(self, *arguments):
        raise ConnectionError("the tracking server is down")


class ListRecorder:
    def __init__(self):
        self.calls = []

    def start(self, usecase, run, step, notebook, parameters):
        self.calls.append(("start", step, parameters["month"]))
        return f"t-{step}", {"TRACKED": step}

    def finish(self, tracked, status, outputs, notebook, seconds, inputs):
        self.calls.append(("finish", tracked, status, sorted(outputs), notebook.is_file(), sorted(inputs)))


def test_the_recorder_is_told_and_its_failure_never_loses_the_run(project):
    usecase, told, recorder = project.usecase("recorded"), [], ListRecorder()
    assert project.run(usecase, recorder=BrokenRecorder(), progress=told.append).status == "done"
    assert {one.message for one in told if one.status == "notice"} == {"The recorder none failed: the tracking server is down"}
    run = project.run(usecase, {"month": "2013-06"}, recorder=recorder)
    # that a step ended is told beside the work, so the next may begin first
    told = [[call for call in recorder.calls if call[1].removeprefix("t-") == step] for step in ("make", "count")]
    assert told == [
        [("start", "make", "2013-06"), ("finish", "t-make", "FINISHED", ["flights", "rows"], True, [])],
        [("start", "count", "2013-06"), ("finish", "t-count", "FINISHED", ["late"], True, ["flights"])]]
    assert run.steps["count"].tracked == "t-count"


@pytest.mark.parametrize("parameters, says", [
    ({"mont": "2013-05"}, "No step of this run has a parameter 'mont'. Did you mean 'month'?"),
    ({"month": 5}, "month of make.ipynb is str, not 5"),
    ({"month": "2013-05", "n": "four"}, "n of make.ipynb is int, not 'four'"),
    ({}, "report.ipynb needs a value for month"),
])
def test_wrong_parameters_are_refused_before_anything_starts(project, parameters, says):
    usecase = project.usecase("parameters")
    project.write("parameters", "report", edited(REPORT, "month: str = '2013-04'", "month: str"))
    with pytest.raises(ParameterError) as refused:
        project.run(usecase, parameters)
    assert says in str(refused.value)
    assert project.ledger.rows(RUNS, usecase="parameters") == [] and project.ran("parameters") == []


@pytest.mark.parametrize("pipeline, says", [
    ({**PIPELINE, "make": {"notebook": "make.ipynb", "with": {"n": "count.late"}}}, "circle: make → count → make"),
    ({**PIPELINE, "report": {"notebook": "report.ipynb", "with": {"late": "cuont.late"}}}, "Did you mean 'count'?"),
    ({**PIPELINE, "report": {"notebook": "report.ipynb", "with": {"late": "count.lat"}}}, "count has no output 'lat'"),
    ({**PIPELINE, "report": {"notebook": "reprot.ipynb"}}, "Did you mean 'report.ipynb'?"),
])
def test_a_pipeline_that_cannot_run_is_refused(project, pipeline, says):
    project.usecase("graphs")
    usecase = project.usecase("graphs", pipeline)
    with pytest.raises(PipelineError) as refused:
        project.run(usecase)
    assert says in str(refused.value)
    assert project.ledger.rows(RUNS, usecase="graphs") == []


def test_what_is_no_notebook_is_refused(project):
    usecase = project.usecase("torn")
    path = usecase.folder / "report.ipynb"
    whole = path.read_bytes()
    for content, says in [
        (whole[: len(whole) // 2], "report.ipynb is truncated or not a notebook"), (b"", "truncated or not a notebook"),
        (b"\x89PNG\r\n", "truncated or not a notebook"), (b"[1, 2]", "truncated or not a notebook"),
        (json.dumps({"cells": [], "metadata": {}, "nbformat": 3, "nbformat_minor": 0}).encode(), "in notebook format 3"),
        (whole.replace(b'"parameters"', b'"hidden"'), "report.ipynb is given late but has no cell tagged parameters"),
        (whole.replace(b'"parameters"\n', b"\n"), "looks like parameters but has no tag parameters"),
    ]:
        path.write_bytes(content)
        with pytest.raises(NotebookError) as refused:
            project.run(usecase)
        assert says in str(refused.value)
    assert project.ledger.rows(RUNS, usecase="torn") == []
