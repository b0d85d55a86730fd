"""Retraining across its rooms: it is capped, never done twice for one breach, taken back when it was wrong, and judged in hindsight."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from aiexec.define.usecase import UseCase, load_usecase
from aiexec.govern.audit import verify_chain
from aiexec.govern.months import monthly
from aiexec.govern.production import Production, bring_back
from aiexec.model.gates import compare
from aiexec.model.registry import champion, history, versions
from aiexec.monitor.retrain import Proposal, proposals, propose, put_down, settle
from aiexec.monitor.shadow import propose_return, record_shadow, replaced, shadows
from aiexec.monitor.watch import judge, record, shift
from aiexec.run.records import STEPS
from aiexec.settings import Settings, load_settings
from aiexec.store import open_ledger

from .conftest import aiexec, answer, environment


def shop(**monitor) -> UseCase:
    return UseCase(
        name="late_orders", title="Warn of late orders", department="logistics", owner="ada@example.org", risk="minimal",
        success=[{"metric": "roc_auc", "at_least": 0.6}], model={"name": "late_orders"}, monitor=monitor,
        value={"currency": "EUR", "true_positive": 5.0, "false_positive": -1.0, "false_negative": 0.0, "true_negative": 0.0},
    )


def measure(ledger, window: str, auc: float) -> None:
    record(ledger, "late_orders", window, "performance", [{"name": "roc_auc", "value": auc}])


# --- the cap


@pytest.mark.parametrize("cap, expected", [
    ("0 in 12 months", []),
    ("1 in 12 months", ["2024-02", "2025-02"]),
    ("2 in 6 months", ["2024-02", "2024-03", "2024-08", "2024-09", "2025-02", "2025-03"]),
    ("1 in 1 month", [shift("2024-02", by) for by in range(14)]),
])
def test_no_more_is_retrained_than_the_cap_allows(tmp_path, cap, expected):
    ledger, case = open_ledger(Settings(tmp_path, actor="ada")), shop(retrain_cap=cap, cool_down=0, breach="1 of 3")
    for number in range(14):
        window = shift("2024-02", number)
        measure(ledger, shift(window, -1), 0.5)
        made, why = propose(case, ledger, judge(case, ledger, window))
        if made:
            settle(ledger, "late_orders", window, "refused", number)
        elif "cap" in why:
            assert f"at most {cap}" in why
        assert (made is None) == (window not in expected), (window, why)
    assert [one.window for one in proposals(ledger, "late_orders")] == expected


@pytest.mark.parametrize("cap", ["often", "3 of 12", "3 in 0 months", "-1 in 12 months", "3 in 12 years"])
def test_a_cap_that_means_nothing_is_refused(cap):
    with pytest.raises(ValueError, match="retrain_cap"):
        shop(retrain_cap=cap)


# --- the same breach never trains twice


def test_processes_that_judge_at_once_propose_once(tmp_path):
    ledger = open_ledger(Settings(tmp_path, actor="ada"))
    for window, auc in (("2024-01", 0.5), ("2024-02", 0.5), ("2024-03", 0.65)):
        measure(ledger, window, auc)
    program = """
import sys
from pathlib import Path
from aiexec.define.usecase import UseCase
from aiexec.monitor.retrain import propose
from aiexec.monitor.watch import judge
from aiexec.settings import Settings
from aiexec.store import open_ledger
case, ledger = UseCase.model_validate_json(sys.argv[1]), open_ledger(Settings(Path(sys.argv[2]), actor="ada"))
judged = judge(case, ledger, sys.argv[3])
sys.stdin.readline()  # all begin together
print(propose(case, ledger, judged)[0] is not None)
"""
    case = shop(cool_down=0).model_dump_json(by_alias=True, exclude_defaults=True)
    several = [subprocess.Popen([sys.executable, "-c", program, case, tmp_path, window], stdin=subprocess.PIPE, env=environment(),
                                stdout=subprocess.PIPE, text=True) for window in ("2024-03", "2024-04") * 3]
    for one in several:
        one.stdin.write("\n")
        one.stdin.flush()
    answers = [one.communicate(timeout=120)[0].strip() for one in several]
    made = proposals(ledger, "late_orders")
    assert len(made) == 1, made
    same = answers[0::2] if made[0].window == "2024-03" else answers[1::2]  # those of its window are told of the one that is there
    assert same == ["True"] * 3 and answers.count("True") == 3
    assert len(ledger.events(kind="retraining.proposed")) == 1 and verify_chain(ledger).ok


def test_two_that_live_through_one_month_train_once(month, tmp_path):
    project = tmp_path / "flights"
    shutil.copytree(month, project)
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    path.write_text(path.read_text().replace("history: 4", "history: 3"))
    settings = load_settings(project)
    ledger = open_ledger(settings)
    asked = Proposal("flight_delays", "2013-05", "performance.roc_auc", "proposed", None, "A breach.", {"performance.roc_auc": ["2013-04"]}, "2026")
    assert put_down(ledger, asked, [])
    program = """
from aiexec.define.usecase import load_usecase
from aiexec.govern.production import open_production, retrain
from aiexec.settings import load_settings
from aiexec.store import open_ledger
settings = load_settings()
with open_production(load_usecase("flight_delays", settings), settings, open_ledger(settings), lambda *_: None) as production:
    print(retrain(production, "2013-05", 1))
"""
    two = [subprocess.Popen([sys.executable, "-c", program], cwd=project, env=environment(PYTHONPATH=str(project)),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [one.communicate(timeout=300) for one in two]
    assert [one.returncode for one in two] == [0, 0], told
    assert len({out.strip() for out, _ in told}) == 1, "both know the same champion afterwards"
    assert len(versions("flight_delays", ledger)) == 2
    trained = [row for row in ledger.rows(STEPS, step="train", status="done") if row["run"] != versions("flight_delays", ledger)[0]["run"]]
    assert len(trained) == 1
    assert proposals(ledger, "flight_delays")[0].status in ("promoted", "refused")


# --- a replaced champion returns


def shown_better(usecase, ledger, window: str, version: int, against: int, noise: tuple[float, float] = (1.0, 3.0), seed: int = 1) -> None:
    """Let a version in the shadow be better than the champion in a month, by far."""
    chance = np.random.default_rng(seed)
    late = (chance.random(4000) < 0.3).astype(float)
    shadow, present = (late + chance.normal(0, size, 4000) for size in noise)
    money = compare(late, present > 1, shadow > 1, "value_per_1000", must="not be worse", value=usecase.value)
    record_shadow(ledger, "flight_delays", window, version, [compare(late, present, shadow, "roc_auc"), money], against=against)


@pytest.fixture
def lived(year, tmp_path) -> tuple[Production, Path]:
    """A copy of the year, after December: version 2 is the champion, version 1 scores in its shadow."""
    project = tmp_path / "flights"
    shutil.copytree(year, project)
    settings = load_settings(project)
    ledger = open_ledger(settings)
    return Production(load_usecase("flight_delays", settings), settings, ledger, None, None, None, lambda *_: None), project


def test_the_replaced_champion_scored_the_same_flights(lived):
    production, project = lived
    ledger = production.ledger
    beside = shadows(ledger, "flight_delays")
    assert set(beside.window) == {"2013-11", "2013-12"} and set(beside.version) == {1} and set(beside.against) == {2}
    from aiexec.data.datasets import read

    for window in ("2013-10", "2013-11", "2013-12"):
        said, quiet = (read(f"score.{name}@{window}", "flight_delays", ledger) for name in ("predictions", "shadows"))
        assert len(quiet) == (0 if window == "2013-10" else len(said))
        assert set(quiet.prediction_id) <= set(said.prediction_id)
        assert set(quiet.model_version) <= {1} and set(said.model_version) == {1 if window == "2013-10" else 2}
    assert replaced(production.usecase, ledger, "2013-05", 1) == 0, "a month lived through again knows nothing of what came later"


def test_a_replaced_champion_returns_when_it_proves_better_and_does_not_flap(lived):
    production, project = lived
    usecase, ledger = production.usecase, production.ledger
    assert bring_back(production, "2014-01", 2) == 2, "the real shadow was not better"
    for window in ("2013-12", "2014-01"):
        shown_better(usecase, ledger, window, 1, 2)
    assert bring_back(production, "2014-01", 2) == 2, "one of its two months is not known yet"
    assert bring_back(production, "2014-02", 2) == 1
    assert bring_back(production, "2014-02", 2) == 1, "asked again, it has returned once"
    move = history("flight_delays", ledger)[-1]
    assert (move.previous, move.version, move.evidence["window"]) == (2, 1, "2014-02")
    assert "Version 1, which version 2 replaced, was better in 2013-12 and 2014-01" in move.reason
    assert len(history("flight_delays", ledger)) == 3
    client = MlflowClient(production.settings.url("tracking"))
    assert int(client.get_model_version_by_alias("flight_delays", "champion").version) == 1
    # now version 2 is in the shadow; that it is better next month brings nothing back at once
    assert replaced(usecase, ledger, "2014-03", 1) == 2
    shown_better(usecase, ledger, "2014-02", 2, 1)
    assert bring_back(production, "2014-03", 1) == 1
    shown_better(usecase, ledger, "2014-03", 2, 1)
    assert bring_back(production, "2014-04", 1) == 1, "February was scored by version 2: one month is not two"
    shown_better(usecase, ledger, "2014-04", 2, 1)
    assert bring_back(production, "2014-05", 1) == 2
    told = answer("retraining", "flight_delays", cwd=project)
    assert [(one["month"], one["what"], one["version"], one["outcome"]) for one in told["proposals"]][2:] == [
        ("2014-02", "return", 1, "promoted"), ("2014-05", "return", 2, "promoted")]
    assert [move["version"] for move in answer("models", "flight_delays", cwd=project)["moves"]] == [1, 2, 1, 2]
    assert [event.kind for event in ledger.events() if event.kind.startswith("return.")] == [
        "return.proposed", "return.promoted"] * 2
    assert verify_chain(ledger).ok and aiexec("doctor", cwd=project).returncode == 0


def test_a_shadow_that_is_worse_or_alike_does_not_return(lived):
    production, _ = lived
    for seed, noise in ((1, (3.0, 1.0)), (2, (2.0, 2.0))):
        for window in ("2013-12", "2014-01"):
            shown_better(production.usecase, production.ledger, window, 1, 2, noise, seed)
        assert bring_back(production, "2014-02", 2) == 2
    assert "not shown to be better" in propose_return(production.usecase, production.ledger, "2014-02", 2)[1]
    assert champion("flight_delays", production.ledger) == 2


def test_where_the_risk_is_high_a_return_waits_for_people(lived):
    production, project = lived
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    path.write_text(path.read_text().replace("risk: limited", "risk: high"))
    production = Production(load_usecase("flight_delays", production.settings), *list(vars(production).values())[1:])
    for window in ("2013-12", "2014-01"):
        shown_better(production.usecase, production.ledger, window, 1, 2)
    assert bring_back(production, "2014-02", 2) == 2 == champion("flight_delays", production.ledger)
    waiting = proposals(production.ledger, "flight_delays")[-1]
    assert (waiting.cause, waiting.status, waiting.version) == ("return", "waiting", 1) and "aiexec rollback" in waiting.why
    assert bring_back(production, "2014-02", 2) == 2
    assert "v1 waiting" not in monthly(production.usecase, production.ledger).retraining.tolist()  # nothing was scored in that month


# --- hindsight


def hindsight(project: Path, place: Path, month: str) -> tuple[dict, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The page of hindsight, up to a month: its outputs, and its tables."""
    told = answer("run", project / "usecases/flight_delays/hindsight.ipynb", "-p", "month", month, "-p", "variations", "false",
                  "-o", place / "hindsight.ipynb", cwd=project)
    return told["outputs"], *(pd.read_parquet(place / f"{name}.parquet") for name in ("rules", "proposals", "lived"))


def test_hindsight_adds_up_agrees_with_the_record_and_cannot_see_the_future(year, tmp_path):
    project = tmp_path / "flights"
    shutil.copytree(year, project)
    for name in ("sound", "poisoned"):
        (tmp_path / name).mkdir()
    told, rules, seen, lived = hindsight(project, tmp_path / "sound", "2013-10")
    assert set(rules.rule) == {"never", "always", "gated"} and told["agrees"] is True
    for row in rules.itertuples():
        own = lived[lived.rule == row.rule]
        assert own.money.sum() == pytest.approx(row.money)
        assert (own.brier * own.rows).sum() / own.rows.sum() == pytest.approx(row.brier)
    assert lived.groupby("rule").rows.sum().nunique() == 1
    ledger = open_ledger(load_settings(project))
    months = monthly(load_usecase("flight_delays", load_settings(project)), ledger).set_index("window")
    assert lived[lived.rule == "gated"].set_index("window").money.to_dict() == pytest.approx(months.realised[:"2013-10"].to_dict())
    assert seen.query("rule == 'gated'")[["window", "outcome"]].values.tolist() == [["2013-10", "promoted"]]

    path = project / "data" / "flights" / "outcomes-2013-10.parquet"  # known at the end of November
    outcomes = pd.read_parquet(path)
    outcomes["arr_delay"] = (60 - outcomes.arr_delay).astype(outcomes.arr_delay.dtype)
    outcomes.to_parquet(path)
    _, others, again, relived = hindsight(project, tmp_path / "poisoned", "2013-10")
    columns = ["rule", "window", "version", "taught by"]
    pd.testing.assert_frame_equal(relived[columns], lived[columns])
    decided = ["rule", "window", "why", "version", "against", "gate", "outcome"]
    pd.testing.assert_frame_equal(again[decided], seen[decided])
    assert (others.set_index("rule").money != rules.set_index("rule").money).all(), "the poison was there to be seen"


def test_a_use_case_without_such_a_page_is_told_what_it_takes(month, tmp_path):
    project = tmp_path / "flights"
    shutil.copytree(month, project)
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    text = path.read_text()
    begin, end = text.index("  hindsight:"), text.index("\nmodel:")
    path.write_text(text[:begin] + text[end:])
    refused = aiexec("retraining", "flight_delays", "--compare", cwd=project)
    assert refused.returncode == 1 and "has no page that compares rules" in refused.stderr, refused.stderr
    assert json.loads(aiexec("retraining", "--json", cwd=project).stdout)["proposals"] == []


# --- months by plain commands


def test_a_newcomer_judges_the_year_by_month_with_plain_commands(year, tmp_path):
    told = answer("table", "evaluate.judged", "-o", tmp_path / "judged.parquet", cwd=year)
    assert told["rows"] == 255_986 and told["parts"] == [shift("2013-04", by) for by in range(9)]
    judged = pd.read_parquet(tmp_path / "judged.parquet")
    assert judged.prediction_id.is_unique and judged.late.notna().mean() > 0.95
    seen = answer("performance", tmp_path / "judged.parquet", "--target", "late", "--score", "score", "--time", "day", cwd=tmp_path)
    assert {"2013-09", "2013-12"} <= {one["window"] for one in seen["windows"]}
    answer("table", "ingest.flights", "-o", tmp_path / "flights.csv", "--from", "2013-01", "--to", "2013-04", cwd=year)
    drifted = answer("drift", tmp_path / "flights.csv", "--time", "partition", cwd=tmp_path)
    assert [one["window"] for one in drifted["windows"]][-1] == "2013-04"
    for words, said in ((["score.prediction"], "Did you mean 'score.predictions'?"),
                        (["score.predictions", "--from", "2014-01"], "It reaches from 2013-04 to 2013-12."),
                        (["score.predictions", "-o", tmp_path / "year.xlsx"], "is of no format that is written")):
        refused = aiexec("table", *words, cwd=year)
        assert refused.returncode == 1 and said in refused.stderr, refused.stderr
    assert not (tmp_path / "year.xlsx").exists()
