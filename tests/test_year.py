"""The year of flights: known truths of the data, an honest story, and figures that agree wherever they stand."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from mlflow import MlflowClient
from nbclient import NotebookClient

from aiexec.decide.decisions import DECISIONS
from aiexec.decide.outbox import OUTBOX
from aiexec.define.usecase import load_usecase
from aiexec.govern.audit import verify_chain
from aiexec.govern.months import monthly
from aiexec.govern.roi import VALUES
from aiexec.model.registry import ALIASES, VERSIONS
from aiexec.monitor.alerts import ALERTS
from aiexec.monitor.retrain import PROPOSALS
from aiexec.run.records import RUNS, STEPS
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, answer, environment

LATE = dict(zip([f"2013-{month:02}" for month in range(4, 13)], [0.279, 0.220, 0.308, 0.315, 0.238, 0.132, 0.168, 0.174, 0.326]))


@pytest.fixture(scope="module")
def ledger(year):
    return open_ledger(load_settings(year))


@pytest.fixture(scope="module")
def usecase(year):
    return load_usecase("flight_delays", load_settings(year))


@pytest.fixture(scope="module")
def months(usecase, ledger):
    return monthly(usecase, ledger).set_index("window")


def test_the_late_rate_of_each_month_is_the_known_one(months):
    assert list(months.index) == list(LATE)
    for month, rate in LATE.items():
        assert abs(months.rate[month] - rate) < 0.0006, month
    assert months.rows.sum() == 255_987 or abs(months.rows.sum() - 255_987) <= 1  # one row of July is in quarantine


def test_categories_stay_stable_while_temperature_alarms(ledger, usecase):
    from aiexec.monitor.watch import measurements

    drift = measurements(ledger, usecase.name, kind="drift")
    assert drift[drift.name.isin(["origin", "dest", "carrier"])].value.max() < 0.10
    assert (drift[(drift.name == "evening_temp") & drift.window.between("2013-05", "2013-09")].verdict == "act").all()


def test_the_gate_promotes_one_challenger_and_refuses_another(ledger, months):
    proposals = ledger.rows(PROPOSALS, order="window", usecase="flight_delays")
    assert {row["status"] for row in proposals} == {"promoted", "refused"}
    promoted = next(row for row in proposals if row["status"] == "promoted")
    after = [month for month in months.index if month > promoted["window"]]
    assert (months.champion[after] == promoted["version"]).all()
    assert (months.champion[[month for month in months.index if month <= promoted["window"]]] == 1).all()


def test_an_alert_was_raised_and_names_its_owner(ledger):
    rows = ledger.rows(ALERTS, usecase="flight_delays")
    assert any("roc_auc" in row["sentence"] or "value" in row["sentence"] for row in rows)
    assert all("@" in row["owner"] for row in rows)


def test_capacity_and_hold_out_are_kept(ledger, months):
    rows = pd.DataFrame(ledger.rows(DECISIONS, usecase="flight_delays"))
    for month, chosen in rows.groupby("window"):
        assert len(chosen) <= 0.05 * months.rows[month]
    share = (rows.arm == "hold-out").mean()
    assert 0.08 < share < 0.12


def test_nobody_was_warned_so_the_effect_is_around_nought(ledger, year):
    from aiexec.decide.decisions import uplift

    rows = ledger.rows(DECISIONS, usecase="flight_delays")
    effect = uplift(*[[row["outcome"] for row in rows if row["arm"] == arm] for arm in ("treated", "hold-out")])
    assert effect.low < 0 < effect.high
    assert effect.sentence in (year.parent / "printed.txt").read_text(encoding="utf-8")


def test_every_delivered_decision_stands_once_in_the_operations_database(ledger, year):
    sent = ledger.rows(OUTBOX, usecase="flight_delays")
    assert {row["status"] for row in sent} == {"delivered"}
    with sqlite3.connect(year / ".aiexec" / "operations.db") as operations:
        table = operations.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchone()[0]
        keys = [row[0] for row in operations.execute(f"SELECT message FROM {table}")]
    assert len(keys) == len(set(keys)) and set(keys) == {row["message"] for row in sent}
    treated = {row["prediction_id"] for row in ledger.rows(DECISIONS, usecase="flight_delays", arm="treated")}
    assert {row["message"].split(":")[1] for row in sent} == treated


def test_realised_value_is_what_the_outcomes_are_worth(ledger, months):
    rows = pd.DataFrame(ledger.rows(DECISIONS, usecase="flight_delays", arm="treated"))
    worth = rows[rows.outcome.notna()].assign(worth=lambda frame: frame.outcome.map({1: 38, 0: -9})).groupby("window").worth.sum()
    for month in months.index:
        assert months.realised[month] == pytest.approx(worth[month])
    assert {row["grade"] for row in ledger.rows(VALUES, usecase="flight_delays")} == {"assumed"}


def test_roi_agrees_with_the_ledger(year, ledger, months):
    told = answer("roi", "flight_delays", cwd=year)
    amounts = {kind: sum(row["amount"] for row in ledger.rows(VALUES, usecase="flight_delays", kind=kind))
               for kind in ("planned", "realised", "baseline")}
    assert told["realised"] == pytest.approx(amounts["realised"]) == pytest.approx(months.realised.sum())
    assert told["planned"] == pytest.approx(amounts["planned"])
    assert told["baseline"] == pytest.approx(amounts["baseline"])
    assert told["net_benefit"] == pytest.approx(told["realised"] - told["cost"])


def test_models_agree_with_mlflow_and_the_ledger(year, ledger):
    told = answer("models", "flight_delays", cwd=year)
    client = MlflowClient(load_settings(year).url("tracking"))
    recorded = ledger.rows(VERSIONS, model="flight_delays")
    assert {row["version"] for row in told["versions"]} == {row["version"] for row in recorded}
    assert {row["version"] for row in recorded} == {int(v.version) for v in client.search_model_versions("name='flight_delays'")}
    champion = [row["version"] for row in told["versions"] if row["champion"]]
    assert champion == [int(client.get_model_version_by_alias("flight_delays", "champion").version)]
    moves = ledger.rows(ALIASES, order="seq", model="flight_delays", alias="champion")
    assert [move["version"] for move in told["moves"]] == [move["version"] for move in moves]
    for row in recorded:
        assert client.get_run(row["tracked"]).data.tags["mlflow.source.name"].endswith("train.ipynb")


def test_runs_agree_with_mlflow_and_the_ledger(year, ledger):
    told = answer("runs", "--limit", 0, cwd=year)
    assert {row["run"]: row["status"] for row in told} == {row["run"]: row["status"] for row in ledger.rows(RUNS)}
    client = MlflowClient(load_settings(year).url("tracking"))
    place = client.get_experiment_by_name("flight_delays").experiment_id
    tracked = {run.info.run_id: run for run in client.search_runs([place], max_results=1000)}
    steps = ledger.rows(STEPS, usecase="flight_delays", status="done")
    assert len(steps) > 40
    for step in steps:
        run = tracked[step["tracked"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.source.name"].endswith(".ipynb")
        numbers = {name: value for name, value in step["outputs"].items() if type(value) in (int, float)}
        for name, value in numbers.items():
            assert run.data.metrics[name] == pytest.approx(value), (step["step"], name)


def test_the_chain_is_whole_and_the_runs_are_what_was_recorded(year, ledger):
    assert verify_chain(ledger).ok
    assert aiexec("verify", cwd=year).returncode == 0
    assert aiexec("doctor", cwd=year).returncode == 0


def test_living_through_it_again_runs_nothing(year, ledger, months, usecase):
    done_before = ledger.count(STEPS, "status", usecase="flight_delays")[("done",)]
    versions = len(ledger.rows(VERSIONS))
    again = aiexec("demo", "flights", cwd=year.parent)
    assert again.returncode == 0, again.stderr
    assert ledger.count(STEPS, "status", usecase="flight_delays")[("done",)] == done_before
    assert len(ledger.rows(VERSIONS)) == versions
    pd.testing.assert_frame_equal(monthly(usecase, ledger).set_index("window"), months)


@pytest.mark.parametrize("notebook", ["prepare", "ingest", "train", "gate", "score", "decide", "evaluate", "monitor"])
def test_a_workflow_notebook_runs_as_it_stands(year, notebook, tmp_path_factory):
    """As in JupyterLab: from top to bottom, with the defaults of its parameters, in a copy of the lived-in project."""
    copy = tmp_path_factory.getbasetemp() / "by-hand" / "flights"
    if not copy.exists():
        shutil.copytree(year, copy)
    path = copy / "usecases" / "flight_delays" / f"{notebook}.ipynb"
    saved = dict(os.environ)
    os.environ["PYTHONPATH"] = str(copy)
    try:
        NotebookClient(nbformat.read(path, 4), timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(saved)


def test_a_notebook_of_a_project_runs_by_its_path(year, tmp_path):
    told = answer("run", year / "usecases/flight_delays/ingest.ipynb", "-p", "month", "2013-05", "-o", tmp_path / "may.ipynb", cwd=tmp_path)
    assert (told["outputs"]["rows"], told["outputs"]["quarantined"]) == (28_796, 0)


def story(project: Path) -> pd.DataFrame:
    ledger = open_ledger(load_settings(project))
    return monthly(load_usecase("flight_delays", load_settings(project)), ledger)


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> pd.DataFrame:
    """A short year on a sample, never interrupted."""
    place = tmp_path_factory.mktemp("short")
    done = aiexec("demo", "flights", "--fast", "--until", "2013-06", cwd=place)
    assert done.returncode == 0, done.stderr
    return story(place / "flights")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_year_that_is_cut_off_goes_on_where_it_was(tmp_path, short, how):
    child = subprocess.Popen([AIEXEC, "demo", "flights", "--fast", "--until", "2013-06"], cwd=tmp_path, env=environment(),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    for line in child.stderr:
        seen += line
        if "2013-05" in line:
            child.send_signal(how)
            break
    child.communicate(timeout=60)
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL), seen
    project = tmp_path / "flights"
    before = {(row["partition"], row["step"]) for row in open_ledger(load_settings(project)).rows(STEPS, status="done")}
    assert before
    resumed = aiexec("resume", cwd=project)
    assert resumed.returncode == 0, resumed.stderr
    for (partition, step), times in open_ledger(load_settings(project)).count(STEPS, "partition", "step", status="done").items():
        assert times == 1 or (partition, step) not in before, f"{step} of {partition} was done twice"
    drop = ["worst_psi"]
    pd.testing.assert_frame_equal(story(project).drop(columns=drop), short.drop(columns=drop))


def test_two_demos_at_once_are_refused(tmp_path):
    first = subprocess.Popen([AIEXEC, "demo", "flights", "--fast", "--until", "2013-04"], cwd=tmp_path, env=environment(),
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in first.stderr:
        if "2013" in line:
            break
    second = aiexec("demo", "flights", "--fast", "--until", "2013-04", cwd=tmp_path)
    assert second.returncode == 1 and "the demo in flights (process" in second.stderr, second.stderr
    first.communicate(timeout=300)
    assert first.returncode == 0


def test_a_sample_and_the_whole_are_not_mixed(year):
    refused = aiexec("demo", "flights", "--fast", cwd=year.parent)
    assert refused.returncode == 1 and "was made on all flights" in refused.stderr


def test_a_month_with_no_data_is_refused(year, ledger):
    before = len(ledger.rows(STEPS, status="done"))
    refused = aiexec("run", "flight_delays", "--only", "ingest", "-p", "month", "2014-02", cwd=year)
    assert refused.returncode == 1 and "2014-02" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr
    assert len(ledger.rows(STEPS, status="done")) == before


def test_an_installed_wheel_lives_through_it_too(tmp_path):
    """The wheel in an environment of its own: templates come from the package, not from the checkout."""
    root = Path(__file__).parents[1]
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "own"], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", tmp_path / "own/bin/python", "--constraint",
                    root / "constraints.txt", f"{wheel}[examples]"], check=True, timeout=600)
    done = subprocess.run([tmp_path / "own/bin/aiexec", "demo", "flights", "--fast", "--until", "2013-04", "--json"], cwd=tmp_path,
                          env=environment(PYTHONPATH=""), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert [row["window"] for row in json.loads(done.stdout)["months"]] == ["2013-04"]
    where = subprocess.run([tmp_path / "own/bin/python", "-c", "import aiexec; print(aiexec.__file__)"], cwd=tmp_path,
                           capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) in where


def test_a_project_that_was_moved_still_scores(year, tmp_path):
    """On another machine the old folder is not there: nothing may depend on where the project stood."""
    program = ("from aiexec.serve.scorer import load_scorer; from aiexec.model.registry import versions; "
               "from aiexec.store import open_ledger; ledger = open_ledger(); "
               "print(load_scorer('flight_delays').version, {row['source'][0] for row in versions('flight_delays', ledger)})")
    shutil.copytree(year, tmp_path / "moved")
    aside = year.with_name("aside")
    year.rename(aside)
    try:
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "moved", env=environment(), capture_output=True, text=True)
    finally:
        aside.rename(year)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "{'a'}"]
