"""Pipelines that go through values, decide, try again and run side by side, on real kernels; killed, stopped and resumed."""

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

from aiexec.define.usecase import UseCase, load_usecase
from aiexec.errors import ParameterError, PipelineError, RunFailed
from aiexec.run.kernels import WarmKernels
from aiexec.run.proof import verify_run
from aiexec.run.records import RUNS, STEPS, Run
from aiexec.run.reasons import why_run
from aiexec.run.runner import resume_run, run_pipeline
from aiexec.settings import load_settings
from aiexec.store import Ledger, open_ledger, sa

from .conftest import aiexec, answer

# what a step leaves outside of the record: that it began, when, and with which GPU
LOG = ("import os, time, pathlib\nbegan = time.time()\nroot = pathlib.Path(os.environ['AIEXEC_ROOT'])\n"
       "def note(word):\n    with open(root / 'log', 'a') as log:\n"
       "        log.write(f\"{os.environ['AIEXEC_USECASE']} {os.environ['AIEXEC_STEP']} {word} {time.time()}"
       " {os.environ.get('CUDA_VISIBLE_DEVICES', '-')} {os.getpid()}\\n\")\nnote('began')")
DONE = ("", "note('ended')")
LIST = [("", "months = ['2013-01', '2013-02', '2013-03']"), ("outputs", "months: list[str]")]
MAKE = [("parameters", "month: str = '2013-01'"), ("", LOG), ("", "rows = int(month[-2:])"), DONE, ("outputs", "rows: int")]
SUM = [("parameters", "rows: list[int] = []"), ("", LOG), ("", "total = sum(rows)"), ("outputs", "total: int")]
TELL = [("parameters", "total: int = 0"), ("", LOG), ("", "text = f'{total} rows'"), ("outputs", "text: str")]
FAILS = "if (root / 'mend').exists() is False and month == '2013-02':\n    raise ValueError('not yet')"


class Project:
    def __init__(self, root: Path):
        (root / "settings.ini").write_text("[aiexec]\nrecorder = none\ngpus = 1\n")
        (root / "log").touch()
        self.settings = load_settings(root)
        self.ledger: Ledger = open_ledger(self.settings)
        self.kernels: WarmKernels | None = None

    def usecase(self, name: str, pipeline: dict, **notebooks: list[tuple[str, str]]) -> UseCase:
        folder = self.settings.root / "usecases" / name
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"name": name, "title": "Sales", "department": "shop", "owner": "ada@example.org", "risk": "minimal",
                 "success": [{"metric": "roc_auc", "at_least": 0.6}], "pipeline": pipeline,
                 "value": {"currency": "USD", "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 0}}
        (folder / "usecase.yaml").write_text(yaml.safe_dump(facts, sort_keys=False))
        for book, cells in notebooks.items():
            made = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}) for tag, source in cells]
            nbformat.write(nbformat.v4.new_notebook(cells=made), folder / f"{book}.ipynb")
        return load_usecase(name, self.settings)

    def run(self, usecase: UseCase, values: dict | None = None, **options) -> Run:
        return run_pipeline(usecase, values or {}, settings=self.settings, ledger=self.ledger, kernels=self.kernels, **options)

    def resume(self, run: str, **options) -> Run:
        return resume_run(run, settings=self.settings, ledger=self.ledger, kernels=self.kernels, **options)

    def log(self, name: str, word: str = "began") -> list[list[str]]:
        lines = [line.split() for line in (self.settings.root / "log").read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == name and line[2] == word]

    def began(self, name: str) -> list[str]:
        return [line[0] for line in self.log(name)]

    def last(self, name: str) -> dict:
        return self.ledger.rows(RUNS, order="-started", limit=1, usecase=name)[0]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    with WarmKernels(environment={"PYTHONPATH": str(project.settings.root)}) as kernels:
        project.kernels = kernels
        yield project


def step(notebook: str, **more) -> dict:
    return {"notebook": f"{notebook}.ipynb", **more}


EACH = {"list": step("list"), "make": step("make", foreach={"month": "list.months"}),
        "sum": step("sum", **{"with": {"rows": "make.rows"}}), "tell": step("tell", **{"with": {"total": "sum.total"}})}
BOOKS = {"list": LIST, "make": MAKE, "sum": SUM, "tell": TELL}


def states(run: Run) -> dict[str, str]:
    return {name: one.status for name, one in run.steps.items()}


def test_a_step_goes_through_what_another_found_out(project):
    usecase = project.usecase("each", EACH, **BOOKS)
    first = project.run(usecase, jobs=2)
    assert first.steps["tell"].outputs == {"text": "6 rows"}
    assert sorted(project.began("each")) == ["make[month=2013-01]", "make[month=2013-02]", "make[month=2013-03]", "sum", "tell"]
    assert verify_run(project.ledger, first.run) == []
    assert set(states(project.run(usecase)).values()) == {"cached"}
    # one value that is given goes before the list
    narrowed = project.run(usecase, {"month": "2013-03"})
    assert narrowed.steps["tell"].outputs == {"text": "3 rows"} and "make[month=2013-01]" not in narrowed.steps
    # from here on: what comes before is on record
    assert [*project.run(usecase, start_at="sum").steps] == ["sum", "tell"]
    assert project.run(usecase, start_at="sum").steps["sum"].outputs == {"total": 6}
    with pytest.raises(ParameterError, match="no step 'som'. Did you mean 'sum'"):
        project.run(usecase, start_at="som")


def test_a_grid_meets_the_instances_of_its_values(project):
    train = [("parameters", "month: str = ''\ndepth: int = 1\nrows: int = 0"), ("", "score = rows * depth"), ("outputs", "score: int")]
    best = [("parameters", "scores: list[int] = []"), ("", "top = max(scores)\nn = len(scores)"), ("outputs", "top: int\nn: int")]
    pipeline = {"list": EACH["list"], "make": EACH["make"],
                "train": step("train", foreach={"month": "list.months", "depth": [2, 5]}, **{"with": {"rows": "make.rows"}}),
                "best": step("best", **{"with": {"scores": "train.score"}})}
    run = project.run(project.usecase("grid", pipeline, **BOOKS, train=train, best=best), jobs=2)
    assert run.steps["train[month=2013-03,depth=5]"].outputs == {"score": 15}
    assert run.steps["best"].outputs == {"top": 15, "n": 6}


def test_a_condition_skips_a_step_and_what_needs_it(project):
    again = [("parameters", "text: str = ''"), ("", "size = len(text)"), ("outputs", "size: int")]
    pipeline = {**EACH, "tell": {**EACH["tell"], "when": "sum.total > limit"}, "again": step("again", **{"with": {"text": "tell.text"}})}
    books = {**BOOKS, "tell": [("parameters", "total: int = 0\nlimit: int = 10"), *TELL[1:]], "again": again}
    usecase = project.usecase("when", pipeline, **books)
    run = project.run(usecase)
    assert (run.status, run.steps["tell"].status, run.steps["again"].status) == ("done", "skipped", "skipped")
    assert run.steps["tell"].error == "It runs when sum.total > limit: limit is 10, sum.total is 6."
    assert run.steps["again"].error == "It needs tell, which was skipped."
    assert verify_run(project.ledger, run.run) == []
    assert [one.what for one in why_run(project.ledger, run.run)][-2:] == ["skipped", "skipped"]
    held = project.run(usecase, {"limit": 5})
    assert (held.steps["tell"].status, held.steps["again"].outputs) == ("done", {"size": 6})
    with pytest.raises(PipelineError, match="may not use"):
        project.run(project.usecase("when", {**pipeline, "tell": {**EACH["tell"], "when": "open('x')"}}))


def test_a_failure_is_tried_again_and_each_attempt_is_on_record(project):
    flaky = [("parameters", "month: str = ''"), ("", LOG), ("", "left = root / 'flaky'\ntimes = int(left.read_text()) if left.exists() else 0"),
             ("", "left.write_text(str(times + 1))\nassert times >= 2, f'attempt {times}'\nrows = times"), ("outputs", "rows: int")]
    told = []
    usecase = project.usecase("flaky", {"make": step("make", retries={"times": 3, "wait": 0.1})}, make=flaky)
    run = project.run(usecase, progress=told.append)
    assert (run.steps["make"].outputs, run.steps["make"].attempt) == ({"rows": 2}, 3)
    rows = project.ledger.rows(STEPS, order="attempt", run=run.run)
    assert [(row["attempt"], row["status"], row["failure"]) for row in rows] == [
        (1, "failed", "error in cell"), (2, "failed", "error in cell"), (3, "done", "")]
    assert [one.waiting for one in told if one.waiting] == ["attempt 2 of 4", "attempt 3 of 4"]
    assert verify_run(project.ledger, run.run) == []
    # what another attempt cannot mend is not tried again
    usecase = project.usecase("final", {"make": step("make", retries={"times": 3, "wait": 0.1})},
                              make=[("", LOG), ("", "rows = 'many'"), ("outputs", "rows: int")])
    with pytest.raises(RunFailed):
        project.run(usecase)
    assert len(project.began("final")) == 1


def test_a_step_has_a_time_of_its_own(project):
    slow = [("", "import time\ntime.sleep(60)")]
    with pytest.raises(RunFailed, match="Step make failed: .*did not end within 1 s"):
        project.run(project.usecase("slow", {"make": step("make", timeout=1.0)}, make=slow))
    assert project.ledger.rows(STEPS, usecase="slow")[0]["failure"] == "timeout"


def test_what_does_not_need_a_failed_step_goes_on_when_asked(project):
    books = {**BOOKS, "make": [*MAKE[:2], ("", FAILS), *MAKE[2:]], "other": [("", LOG), ("", "n = 1"), ("outputs", "n: int")]}
    pipeline = {**EACH, "other": step("other")}
    usecase = project.usecase("going", pipeline, **books)
    with pytest.raises(RunFailed, match=r"Step make\[month=2013-02\] failed: ValueError: not yet"):
        project.run(usecase, keep_going=True)
    run = project.last("going")["run"]
    assert sorted(project.began("going")) == ["make[month=2013-01]", "make[month=2013-02]", "make[month=2013-03]", "other"]
    (project.settings.root / "mend").touch()
    assert project.resume(run, jobs=2).steps["tell"].outputs == {"text": "6 rows"}
    assert sorted(project.began("going"))[1:3] == ["make[month=2013-02]"] * 2 and len(project.began("going")) == 7
    (project.settings.root / "mend").unlink()
    usecase = project.usecase("stopping", pipeline, **books)
    with pytest.raises(RunFailed):
        project.run(usecase)
    assert set(project.began("stopping")) <= {"make[month=2013-01]", "make[month=2013-02]", "other"}


def overlaps(project: Project, name: str) -> bool:
    spans = sorted((float(a[2]), float(b[2])) for a, b in zip(sorted(project.log(name)), sorted(project.log(name, "ended"))))
    return any(begun < ended for (_, ended), (begun, _) in zip(spans, spans[1:]))


def test_steps_that_ask_for_the_one_gpu_never_run_together(project):
    hold = [("parameters", "month: str = ''"), ("", LOG), ("", "time.sleep(0.4)\nrows = 1"), DONE, ("outputs", "rows: int")]
    each = {"month": ["a", "b", "c"]}
    project.run(project.usecase("gpu", {"make": step("make", foreach=each, gpu=1)}, make=hold), jobs=3)
    assert not overlaps(project, "gpu") and {line[3] for line in project.log("gpu")} == {"0"}
    project.run(project.usecase("free", {"make": step("make", foreach=each)}, make=hold), jobs=3)
    assert overlaps(project, "free") and {line[3] for line in project.log("free")} == {"-"}
    for asks, says in [({"gpu": 2}, "asks for 2 GPUs, and this machine has 1"), ({"cpu": 4000.0}, "4000 processors"),
                       ({"memory": "900 TB"}, "GB of memory")]:
        with pytest.raises(PipelineError, match=says):
            project.run(project.usecase("greedy", {"make": step("make", **asks)}, make=hold))
    assert project.ledger.rows(RUNS, usecase="greedy") == []


@contextmanager
def runner(project: Project, name: str, *begun: str, verb: str = "run_pipeline(load_usecase(sys.argv[2], settings), {}"):
    """A run with two jobs in a process of its own, once some steps have begun."""
    program = ("import sys\nfrom pathlib import Path\nfrom aiexec.define.usecase import load_usecase\n"
               "from aiexec.settings import load_settings\nfrom aiexec.run.runner import resume_run, run_pipeline\n"
               f"settings = load_settings(Path(sys.argv[1]))\n{verb}, settings=settings, jobs=2)")
    process = subprocess.Popen([sys.executable, "-c", program, str(project.settings.root), name], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "SLOW": "1"})
    try:
        deadline = time.monotonic() + 60
        while not set(begun) <= set(project.began(name)):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


SLOW = ("", "if os.environ.get('SLOW') and month != '2013-01':\n    time.sleep(60)")


def gone(process: int) -> bool:
    for _ in range(100):
        if not Path(f"/proc/{process}").exists() or ") Z " in Path(f"/proc/{process}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


def parallel(project: Project, name: str) -> tuple[UseCase, tuple[str, ...]]:
    books = {**BOOKS, "make": [*MAKE[:2], SLOW, *MAKE[2:]]}
    return project.usecase(name, EACH, **books), ("make[month=2013-01]", "make[month=2013-02]", "make[month=2013-03]")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parallel_run_is_resumed_to_the_same_result(project, number):
    name = f"killed_{int(number)}"
    usecase, begun = parallel(project, name)
    with runner(project, name, *begun) as process:
        process.send_signal(number)
        process.wait(30)
    run = project.last(name)
    rows = {row["step"]: row["status"] for row in project.ledger.rows(STEPS, run=run["run"])}
    cut = "running" if number == signal.SIGKILL else "cancelled"
    assert (run["status"], rows) == (cut, {"list": "done", begun[0]: "done", begun[1]: cut, begun[2]: cut})
    assert all(gone(int(line[4])) for line in project.log(name)), "a kernel outlived its runner"
    if number == signal.SIGTERM:
        for row in project.ledger.rows(STEPS, run=run["run"], status="cancelled"):
            assert nbformat.read(project.settings.home / row["notebook"], 4).metadata["aiexec"]["failure"] == "cancelled"
    resumed = project.resume(run["run"], jobs=2)
    assert resumed.steps["tell"].outputs == {"text": "6 rows"}
    assert sorted(project.began(name)) == sorted([*begun, *begun[1:], "sum", "tell"])
    assert verify_run(project.ledger, run["run"]) == []


def test_a_stopped_runner_that_wakes_up_later_writes_nothing(project):
    usecase, begun = parallel(project, "fenced")
    with runner(project, "fenced", *begun) as process:
        process.send_signal(signal.SIGSTOP)
        # somebody takes the lock of a process that seems dead out of the way
        for left in (project.settings.home / "locks").glob("fenced.lock*"):
            left.unlink()
        run = project.last("fenced")["run"]
        resumed = project.resume(run)
        assert resumed.steps["tell"].outputs == {"text": "6 rows"}
        before = project.ledger.rows(STEPS, order="started", run=run)
        for line in project.log("fenced"):  # its kernels end, and it hears of it when it wakes
            if not gone_now(int(line[4])):
                os.kill(int(line[4]), signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        told = process.communicate(timeout=30)[1]
    assert process.returncode == 1 and "was taken up by another runner" in told
    assert project.ledger.rows(STEPS, order="started", run=run) == before
    assert project.ledger.rows(RUNS, run=run)[0]["status"] == "done"
    assert verify_run(project.ledger, run) == []


def gone_now(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def test_ctrl_c_ends_all_that_run_and_keeps_their_notebooks(project, monkeypatch):
    usecase, begun = parallel(project, "ctrl")
    monkeypatch.setenv("SLOW", "1")

    def interrupt():
        while not set(begun) <= set(project.began("ctrl")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        project.run(usecase, jobs=2)
    monkeypatch.delenv("SLOW")
    rows = project.ledger.rows(STEPS, usecase="ctrl", status="cancelled")
    assert sorted(row["step"] for row in rows) == list(begun[1:])
    assert all((project.settings.home / row["notebook"]).is_file() for row in rows)
    assert project.resume(project.last("ctrl")["run"]).status == "done"


@contextmanager
def counted(ledger: Ledger):
    """How many statements the ledger is asked during the block."""
    count = [0]

    def one_more(*_):
        count[0] += 1

    sa.event.listen(ledger.engine, "before_cursor_execute", one_more)
    try:
        yield count
    finally:
        sa.event.remove(ledger.engine, "before_cursor_execute", one_more)


def test_the_record_of_many_steps_grows_in_step_with_them(project):
    tiny = [("parameters", "n: int = 0"), ("", "m = n"), ("outputs", "m: int")]
    gather = [("parameters", "all: list[int] = []"), ("", "total = sum(all)"), ("outputs", "total: int")]

    def many(number: int) -> UseCase:
        pipeline = {"tiny": step("tiny", foreach={"n": list(range(number))}), "gather": step("gather", **{"with": {"all": "tiny.m"}})}
        return project.usecase(f"many_{number}", pipeline, tiny=tiny, gather=gather)

    def asked(number: int, usecase: UseCase) -> int:
        with counted(project.ledger) as count:
            run = project.run(usecase, jobs=2)
        assert run.steps["gather"].outputs == {"total": number * (number - 1) // 2}
        return count[0]

    few, more = many(10), many(60)
    first = asked(10, few)
    second = asked(60, more)
    assert (second - first) / 50 <= 1.1 * first / 10
    assert asked(60, more) < second / 2  # all unchanged


def test_a_ledger_of_the_last_version_goes_on(project, tmp_path):
    """Without the columns that came since, made as they were then."""
    (tmp_path / "settings.ini").write_text("[aiexec]\nrecorder = none\n")
    old = Project(tmp_path)
    usecase = old.usecase("each", EACH, **BOOKS)
    old.kernels = project.kernels
    old.run(usecase)
    with old.ledger.engine.connect().execution_options(writes=True) as connection, connection.begin():
        found = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index' AND sql NOT NULL")
        for index in [row[0] for row in found]:
            connection.exec_driver_sql(f"DROP INDEX {index}")
        for table, names in [("runs", ["fence"]), ("steps", ["of", "instance", "failure", "usage", "cells", "fence"])]:
            for name in names:
                connection.exec_driver_sql(f"ALTER TABLE {table} DROP COLUMN {name}")
    old.ledger = open_ledger(old.settings)
    again = old.run(usecase)
    assert set(states(again).values()) == {"cached"}
    assert verify_run(old.ledger, again.run) == []


def test_the_verbs(project, tmp_path):
    root = project.settings.root
    project.usecase("verbs", EACH, **BOOKS)
    done = answer("run", "verbs", "--jobs", "2", "--junit", tmp_path / "out.xml", "--html", tmp_path / "pages", cwd=root)
    assert done["steps"]["sum"]["outputs"] == {"total": 6} and 'tests="6"' in (tmp_path / "out.xml").read_text()
    assert (tmp_path / "pages" / "make[month=2013-01].html").is_file()
    assert {one["what"] for one in answer("why", "verbs", cwd=root)} == {"would be taken"}
    [one] = answer("why", "make[month=2013-02]", "--usecase", "verbs", cwd=root)
    assert (one["what"], one["run"]) == ("would be taken", done["run"])
    assert answer("why", done["run"], cwd=root)[0]["why"] == ["It had not run."]
    [row] = answer("runs", "verbs", cwd=root)
    assert (row["run"], row["failed"], row["status"]) == (done["run"], [], "done")
    # any notebook, of no project: a grid, side by side
    book = tmp_path / "tree.ipynb"
    cells = [("parameters", "depth: int = 2"), ("", "leaves = 12 // depth"), ("outputs", "leaves: int")]
    made = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []}) for tag, source in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=made), book)
    rows = answer("run", "tree.ipynb", "-p", "depth", "0,2,3", "--grid", "--jobs", "2", cwd=tmp_path, code=1)
    assert [(row["status"], row["outputs"].get("leaves")) for row in rows] == [("failed", None), ("done", 6), ("done", 4)]
    assert (tmp_path / "tree-output" / "depth=2.ipynb").is_file()
    refused = aiexec("run", "tree.ipynb", "-p", "dept", "2", cwd=tmp_path)
    assert refused.returncode == 1 and "Did you mean 'depth'?" in refused.stderr
