"""Schedules, arrivals and backfills with real processes: killed, doubled, told to stop, and taken up again."""

import json
import os
import signal
import subprocess
import time
import xml.etree.ElementTree as xml
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import yaml
from click.testing import CliRunner, Result

from aiexec.cli.commands import main
from aiexec.data.datasets import record_dataset
from aiexec.define.usecase import load_usecase
from aiexec.errors import StaleWrite
from aiexec.govern.audit import verify_chain
from aiexec.run.runner import RUNS
from aiexec.run.schedule import read_moment
from aiexec.run.slots import holder, plan_times, slots, take
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, environment

COUNT = """import os, pathlib, time
root = pathlib.Path(os.environ['AIEXEC_ROOT'])
with open(root / 'ran.log', 'a') as log:
    log.write(f"{os.environ['AIEXEC_USECASE']} {month} {arrived}".strip() + "\\n")
while (root / f"hold-{os.environ['AIEXEC_USECASE']}").exists():
    time.sleep(0.05)
assert not (root / f"missing-{month}").exists(), f'no orders of {month}'
late = int(month[-2:])"""


class Project:
    """A project in which time passes by a file, and a step waits while another file is there."""

    def __init__(self, root: Path):
        self.root = root
        (root / "settings.ini").write_text("[aiexec]\nrecorder = none\nkernels = cold\n")
        (root / "ran.log").touch()
        self.clock("2024-01-15T12:00")
        self.ledger = open_ledger(load_settings(root))

    def clock(self, text: str) -> None:
        (self.root / "new").write_text(text)
        (self.root / "new").replace(self.root / "clock")

    def usecase(self, name: str, schedule: object = "0 6 1 * *", month: str = "str = '2024-01'"):
        folder = self.root / "usecases" / name
        folder.mkdir(parents=True, exist_ok=True)
        cells = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag] if tag else []})
                 for tag, source in [("parameters", f"month: {month}\narrived: str = ''"), ("", COUNT), ("outputs", "late: int")]]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "count.ipynb")
        facts = {"name": name, "title": "Late orders", "department": "logistics", "owner": "ada@example.org", "risk": "minimal",
                 "success": [{"metric": "roc_auc", "at_least": 0.6}], "pipeline": {"count": {"notebook": "count.ipynb"}},
                 "value": {"currency": "USD", "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 0}}
        (folder / "usecase.yaml").write_text(yaml.safe_dump({**facts, **({"schedule": schedule} if schedule else {})}))
        return load_usecase(name, self.ledger.settings)

    def ran(self) -> list[str]:
        return (self.root / "ran.log").read_text().splitlines()

    def slots(self, *words: str, **conditions) -> list[tuple]:
        return [tuple(getattr(one, word) for word in words) for one in slots(self.ledger, **conditions)]

    @contextmanager
    def service(self, *words: str):
        """The service in a process of its own, killed at the end."""
        with (self.root / "service.log").open("a") as log:
            process = subprocess.Popen([AIEXEC, "schedule", "run", "--every", "0.1", *words], cwd=self.root, stdout=log, stderr=log,
                                       env=environment(AIEXEC_CLOCK=str(self.root / "clock")))
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def here(self, *words: str, code: int = 0, clock: bool = True) -> Result:
        """A command in this process; slots are worked on by processes of their own all the same."""
        surroundings = {"AIEXEC_ROOT": str(self.root), "AIEXEC_CLOCK": str(self.root / "clock") if clock else None}
        done = CliRunner().invoke(main, [*words, "--project", str(self.root)], env=surroundings)
        assert done.exit_code == code, done.output
        return done

    def once(self, *words: str, code: int = 0) -> str:
        return self.here("schedule", "run", "--once", *words, code=code).stderr

    def rows(self, *words: str, code: int = 0) -> list[dict]:
        return json.loads(self.here(*words, "--json", code=code, clock=False).stdout)

    def overview(self) -> dict:
        return json.loads(self.here("schedule", "--json").stdout)

    def wait_for(self, what, *arguments) -> None:
        deadline = time.monotonic() + 60
        while not what(*arguments):
            assert time.monotonic() < deadline, (self.root / "service.log").read_text()
            time.sleep(0.05)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_a_service_killed_during_a_slot_is_followed_by_one_that_resumes_its_run(project):
    project.usecase("orders")
    project.once()  # the schedule begins
    project.clock("2024-02-01T06:00")
    (project.root / "hold-orders").touch()
    with project.service() as first:
        project.wait_for(lambda: project.ran() == ["orders 2024-01"])
        with project.service("--wait") as second:
            refused = aiexec("schedule", "run", "--once", cwd=project.root)
            assert refused.returncode == 1 and f"(process {first.pid} on " in refused.stderr and "--wait" in refused.stderr
            assert project.overview()["scheduler"]["alive"]
            first.kill()  # the second takes over, and finds the slot running
            first.wait()
            (project.root / "hold-orders").unlink()
            project.wait_for(lambda: project.slots("state") == [("done",)])
            second.terminate()
            assert second.wait(30) == 0
    rows = project.ledger.rows(RUNS)
    assert [(row["partition"], row["status"]) for row in rows] == [("2024-01", "done")]
    assert project.slots("runs", "partition", "attempt", "interrupted") == [([rows[0]["run"]], "2024-01", 2, 1)]
    assert project.ran() == ["orders 2024-01"] * 2  # the step that was cut off, and again
    project.clock("2024-02-01T05:00")  # a clock that goes back does not repeat it
    project.once()
    project.clock("2024-02-20T00:00")
    project.once()
    assert len(project.ran()) == 2 and len(project.ledger.rows(RUNS)) == 1
    assert verify_chain(project.ledger).ok


def test_what_a_standstill_missed_is_said_and_the_latest_is_run(project):
    project.usecase("orders")
    project.usecase("parcels", {"cron": "0 6 1 * *", "catch_up": "all"})
    project.usecase("returns", {"cron": "0 6 1 * *", "catch_up": "none"})
    project.once()
    project.clock("2024-04-10T00:00")
    project.once("--jobs", "3")
    assert sorted(project.ran()) == ["orders 2024-03", "parcels 2024-01", "parcels 2024-02", "parcels 2024-03"]
    assert project.slots("partition", "state", usecase="orders") == [("2024-01", "missed"), ("2024-02", "missed"), ("2024-03", "done")]
    assert project.slots("state", usecase="returns") == [("missed",)] * 3
    said = {row["usecase"]: row for row in project.overview()["schedules"]}
    assert said["orders"]["slots"]["missed"] == 2 and said["orders"]["last"]["slot"] == "2024-04-01T06:00Z"
    shown = project.here("schedule").stdout
    assert "At 06:00 on the first day of every month (UTC)" in shown and "2 missed" in shown


def test_two_schedulers_of_one_ledger_never_take_one_slot_twice(project):
    usecase = project.usecase("orders")
    others = [open_ledger(load_settings(project.root)) for _ in range(2)]
    plan_times(others[0], usecase, read_moment("2024-01-15"), read_moment("2024-01-15"))
    for ledger in others:
        plan_times(ledger, usecase, read_moment("2024-02-01T06:00"), read_moment("2024-01-15"))
    seen = [slots(ledger, state="planned") for ledger in others]
    assert [len(one) for one in seen] == [1, 1]
    take(others[0], seen[0][0], holder(others[0].settings))
    with pytest.raises(StaleWrite, match="slots changed in the meantime"):
        take(others[1], seen[1][0], holder(others[1].settings))


def test_a_failure_is_tried_again_then_shown_and_stops_nobody_else(project):
    project.usecase("orders", {"cron": "0 6 1 * *", "retries": {"times": 1, "wait": 600}})
    project.usecase("parcels", "5 6 1 * *")
    project.usecase("returns")
    project.once()
    (project.root / "usecases" / "returns" / "usecase.yaml").write_text("name: returns\nschedule: 0 6 31 2 *\n")
    (project.root / "missing-2024-01").touch()
    project.clock("2024-02-01T06:00")
    told = project.once()
    assert "returns/usecase.yaml" in told and "is tried again at 2024-02-01T06:10Z" in told and "no orders of 2024-01" in told
    project.clock("2024-02-01T06:09")
    (project.root / "missing-2024-01").unlink()
    project.once()
    assert project.ran() == ["orders 2024-01", "parcels 2024-01"]
    (project.root / "missing-2024-01").touch()
    project.clock("2024-02-01T06:11")
    assert "FAILED" in project.once(code=1)
    assert project.slots("usecase", "state", "failures") == [("orders", "failed", 2), ("parcels", "done", 0)]
    assert [row["status"] for row in project.ledger.rows(RUNS, usecase="orders")] == ["failed"]  # one run, resumed
    shown = project.here("schedule").stdout
    assert "FAILED: Step count failed" in " ".join(shown.split())


def test_sigterm_cancels_the_run_and_the_next_service_resumes_it(project):
    project.usecase("orders")
    project.once()
    project.clock("2024-02-01T06:00")
    (project.root / "hold-orders").touch()
    with project.service() as process:
        project.wait_for(lambda: len(project.ran()) == 1)
        process.terminate()
        assert process.wait(40) == 0
    assert [row["status"] for row in project.ledger.rows(RUNS)] == ["cancelled"]
    assert project.slots("state", "failures", "interrupted", "error") == [("planned", 0, 0, "it was stopped")]
    (project.root / "hold-orders").unlink()
    project.once()
    assert [row["status"] for row in project.ledger.rows(RUNS)] == ["done"]
    assert project.slots("state") == [("done",)]


def test_data_starts_a_run_once_and_not_before_it_is_whole(project):
    project.usecase("orders", {"files": ["incoming/*.csv"], "settle": 1})
    project.usecase("report", {"datasets": ["orders:count.table"]})
    incoming = project.root / "incoming"
    incoming.mkdir()
    (incoming / "orders-2023-12.csv").write_text("there before\n")
    time.sleep(1.1)  # as long as it takes to settle
    with project.service():
        project.wait_for(lambda: project.slots("state") == [("missed",)])
        with (incoming / "orders-2024-02.csv").open("w") as slow:
            for line in range(15):
                slow.write(f"order {line}\n")
                slow.flush()
                os.utime(incoming / "orders-2024-02.csv", (0, 0))
                assert project.ran() == []
                time.sleep(0.1)
        project.wait_for(lambda: project.slots("partition", "state")[1:] == [("2024-02", "done")])
        (incoming / "orders-2024-02.csv").touch()
        record_dataset(project.ledger, "orders", "count.table", "2024-03", incoming / "orders-2024-02.csv", rows=15)
        project.wait_for(lambda: project.slots("partition", "state", usecase="report") == [("2024-03", "done")])
    assert project.ran() == ["orders 2024-02 incoming/orders-2024-02.csv", "report 2024-03 orders:count.table@2024-03"]


def test_a_past_time_can_be_tried_and_a_future_one_not(project):
    project.usecase("orders")
    project.here("schedule", "run", "--at", "2024-01-20T08:00", clock=False)
    assert project.slots("slot", "partition", "state") == [("2024-01-01T06:00Z", "2023-12", "done")]
    project.here("schedule", "run", "--at", "2024-01-20T08:00", clock=False)
    assert project.ran() == ["orders 2023-12"]
    assert "2999-01-01 is still to come." in project.here("schedule", "run", "--at", "2999-01-01", code=1, clock=False).stderr
    assert "ExecStart=" in project.here("schedule", "unit").stdout


def test_a_backfill_killed_at_any_time_goes_on(project):
    project.usecase("orders", schedule=None)
    stretch = ["backfill", "orders", "--from", "2024-01", "--to", "2024-04"]
    planned = project.rows(*stretch, "--dry-run")
    assert [row["status"] for row in planned] == ["never run"] * 4 and project.ran() == []
    (project.root / "hold-orders").touch()
    process = subprocess.Popen([AIEXEC, *stretch], cwd=project.root, env=environment(AIEXEC_KERNELS="cold"), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    project.wait_for(lambda: len(project.ran()) == 1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (project.root / "hold-orders").unlink()
    (project.root / "missing-2024-03").touch()
    rows = project.rows(*stretch, code=1)
    assert [row["state"] for row in rows] == ["done", "done", "failed", "left"]
    (project.root / "missing-2024-03").unlink()
    rows = project.rows(*stretch, "--junit", str(project.root / "report.xml"))
    assert [row["state"] for row in rows] == ["unchanged", "unchanged", "done", "done"]
    assert {one.get("name") for one in xml.parse(project.root / "report.xml").iter("testsuite")} == {f"orders 2024-0{n}" for n in range(1, 5)}
    resumed = [row for row in project.ledger.rows(RUNS, order="started") if row["partition"] in ("2024-01", "2024-03")]
    assert [row["status"] for row in resumed] == ["done"] * 3  # January cut off and resumed, and looked at once more; March mended
    (project.root / "missing-2024-05").touch()
    rows = project.rows("backfill", "orders", "--from", "2024-05", "--to", "2024-06", "--keep-going", code=1)
    assert [row["state"] for row in rows] == ["failed", "done"]


@pytest.mark.parametrize("words, says", [
    (["--from", "2024-06", "--to", "2024-01"], "The first month, 2024-06, lies after the last, 2024-01."),
    (["--from", "2024-13", "--to", "2024-14"], "'2024-13' is no year, month, day or hour."),
    (["--from", "2024-01", "--to", "2024-01-31"], "2024-01 is a month, but 2024-01-31 is a day."),
    (["--from", "2024-01-01", "--to", "2024-01-31"], "orders works by the month, but 2024-01-01 is a day."),
    (["--from", "2024-01", "--to", "2998-01"], "is not over before"),
    (["--from", "2024-01", "--to", "2024-02", "--only", "cuont"], "Did you mean 'count'?"),
])
def test_a_wrong_stretch_is_refused_in_a_sentence(project, words, says):
    project.usecase("orders", schedule=None)
    assert says in project.here("backfill", "orders", *words, code=1, clock=False).stderr
    assert project.ledger.rows(RUNS) == []
