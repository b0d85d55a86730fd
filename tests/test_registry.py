"""The registry under people who race, slip, crash and tamper."""

import os
import random
import signal
import warnings
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from aiexec.errors import AiexecError, RegistryError, StaleWrite
from aiexec.model import registry
from aiexec.model.mending import Mended, mend
from aiexec.model.registry import champion, find_version, history, promote, register, rollback, versions
from aiexec.model.tracking import sound, tracking_client, tracking_ready
from aiexec.serve.scorer import load_scorer
from aiexec.settings import Settings
from aiexec.store import Ledger, open_ledger

MODEL = "flight_delays"
FORK = get_context("fork")  # a fresh interpreter each would take three seconds to import MLflow


def new_project(folder: Path) -> Settings:
    (folder / "settings.ini").write_text("[aiexec]\n")
    return Settings(folder, actor="ada")


def simple_models(settings: Settings, count: int) -> None:
    "Register quick models, each of its own."
    ledger = open_ledger(settings)
    rows = pd.DataFrame({"hour": np.arange(40.0)})
    for number in range(count):
        model = LogisticRegression(C=1.0 + number).fit(rows, rows["hour"] > 20)
        register(MODEL, model, rows, metrics={"roc_auc": 0.6}, trained_on={"window": f"2013-{number + 1:02}"}, ledger=ledger)


def alias_in_mlflow(settings: Settings, alias: str = "champion") -> int | None:
    shown = tracking_client(settings).get_registered_model(MODEL).aliases.get(alias)
    return None if shown is None else int(shown)


def children(function, arguments: list[tuple]) -> list[int]:
    "Run a function in processes of their own, all at once; their exit codes."
    started = [FORK.Process(target=function, args=one) for one in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(50)
    return [process.exitcode for process in started]


@pytest.fixture
def project(tmp_path):
    "A project with three versions, the first of which is champion."
    settings = new_project(tmp_path)
    simple_models(settings, 3)
    ledger = open_ledger(settings)
    promote(MODEL, 1, reason="first model", expect=None, ledger=ledger)
    return settings, ledger


def test_a_version_that_does_not_exist_is_refused_and_nothing_changes(project):
    settings, ledger = project
    before = ledger.events()
    with pytest.raises(RegistryError) as refused:
        promote(MODEL, 9, reason="a slip", ledger=ledger)
    assert str(refused.value) == "flight_delays has no version 9. Its versions: 1, 2, 3."
    with pytest.raises(RegistryError, match="Did you mean 'flight_delays'"):
        promote("flight_delay", 1, reason="a slip", ledger=ledger)
    with pytest.raises(RegistryError, match="needs a reason"):
        promote(MODEL, 2, reason="", ledger=ledger)
    assert ledger.events() == before
    assert champion(MODEL, ledger) == alias_in_mlflow(settings) == 1


def race(settings: Settings, number: int, gate, answers) -> None:
    ledger = open_ledger(settings)
    gate.wait()
    try:
        promote(MODEL, 2 + number % 2, reason=f"process {number}", expect=1, ledger=ledger)
        answers.put("won")
    except StaleWrite:
        answers.put("told")


def start_race(settings: Settings) -> None:
    simple_models(settings, 3)
    promote(MODEL, 1, reason="first model", settings=settings)


def test_of_twenty_promotions_on_one_expectation_one_wins(tmp_path):
    settings = new_project(tmp_path)
    assert children(start_race, [(settings,)]) == [0]  # not here: an open SQLite connection must not cross a fork
    gate, answers = FORK.Barrier(20), FORK.Queue()
    assert children(race, [(settings, number, gate, answers) for number in range(20)]) == [0] * 20
    assert sorted(answers.get(timeout=5) for _ in range(20)) == ["told"] * 19 + ["won"]
    ledger = open_ledger(settings)
    moves = history(MODEL, ledger)
    assert [move.seq for move in moves] == [1, 2]
    assert len(ledger.events(kind="alias.moved")) == 2
    assert alias_in_mlflow(settings) == champion(MODEL, ledger) == moves[-1].version


def first_start(settings: Settings, gate) -> None:
    gate.wait()
    tracking_client(settings).search_experiments()


def test_first_starts_at_once_make_one_sound_database(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = new_project(tmp_path)
    gate = FORK.Barrier(12)
    assert children(first_start, [(settings, gate)] * 12) == [0] * 12
    assert sound(settings.home / "mlflow.db")
    assert len(list((tmp_path / "cache" / "aiexec").glob("mlflow-*.db"))) == 1


def test_a_damaged_prepared_copy_is_made_anew(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy = tmp_path / "cache" / "aiexec" / f"mlflow-{mlflow.__version__}.db"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"SQLite format 3\0" + bytes(4000))
    settings = new_project(tmp_path)
    tracking_ready(settings)
    assert sound(copy) and sound(settings.home / "mlflow.db")
    assert tracking_client(settings).get_experiment("0").artifact_location == str(settings.home / "artifacts" / "0")


def test_a_changed_file_is_refused_before_anything_is_loaded(project, monkeypatch):
    settings, ledger = project
    loads = []
    load = skops.io.load
    monkeypatch.setattr(skops.io, "load", lambda *given, **named: loads.append(1) or load(*given, **named))
    good = load_scorer(MODEL, ledger=ledger).score(pd.DataFrame({"hour": [5.0, 30.0]}))
    assert len(loads) == 1
    chance = random.Random(0)
    files = sorted(path for path in (settings.home / find_version(MODEL, 1, ledger)["source"]).rglob("*") if path.is_file())
    for _ in range(40):
        path = chance.choice(files)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(RegistryError, match="not those that were registered. Nothing was loaded"):
            load_scorer(MODEL, ledger=ledger)
        path.write_bytes(whole)
    assert len(loads) == 1
    assert (load_scorer(MODEL, ledger=ledger).score(pd.DataFrame({"hour": [5.0, 30.0]})) == good).all()


def test_swapped_versions_and_files_that_are_gone_are_refused(project):
    settings, ledger = project
    one, two = (settings.home / find_version(MODEL, version, ledger)["source"] for version in (1, 2))
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    with pytest.raises(RegistryError, match="not those that were registered"):
        load_scorer(MODEL, 1, ledger=ledger)
    with pytest.raises(RegistryError, match="version 2 cannot be had"):
        load_scorer(MODEL, 2, ledger=ledger)
    one.rename(two)
    aside.rename(one)
    assert load_scorer(MODEL, 2, ledger=ledger).version == 2


def test_the_champion_at_a_time_and_rollback_with_its_reason(project):
    settings, ledger = project
    second = promote(MODEL, 2, reason="beats version 1", evidence={"gate": "4f2a"}, expect=1, ledger=ledger)
    third = promote(MODEL, 3, reason="beats version 2", expect=2, ledger=ledger)
    back = rollback(MODEL, "missed the storm of April", ledger=ledger)
    first = history(MODEL, ledger)[0]
    assert champion(MODEL, ledger, at="2013-04-01") is None
    assert [champion(MODEL, ledger, at=move.at) for move in (first, second, third, back)] == [1, 2, 3, 2]
    assert (back.version, back.previous, back.reason, back.actor) == (2, 3, "missed the storm of April", "ada")
    assert ledger.events(kind="alias.moved")[-1].body["reason"] == "missed the storm of April"
    assert rollback(MODEL, "further", ledger=ledger).version == 1
    with pytest.raises(RegistryError, match="no earlier champion"):
        rollback(MODEL, "further still", ledger=ledger)
    assert alias_in_mlflow(settings) == champion(MODEL, ledger) == 1


def test_ledger_and_mlflow_tell_the_same(project):
    settings, ledger = project
    promote(MODEL, 2, reason="beats version 1", ledger=ledger)
    promote(MODEL, 3, reason="to be compared", alias="challenger", ledger=ledger)
    client = tracking_client(settings)
    shown = {int(one.version): one for one in client.search_model_versions(f"name='{MODEL}'")}
    for row in versions(MODEL, ledger):
        other = shown.pop(row["version"])
        assert (other.source, other.run_id, other.tags["aiexec.digest"]) == (str(settings.home / row["source"]), row["tracked"], row["digest"])
        assert client.get_run(row["tracked"]).data.metrics == row["metrics"]
    assert not shown
    assert (alias_in_mlflow(settings), alias_in_mlflow(settings, "challenger")) == (2, 3)
    assert mend(MODEL, ledger=ledger) == Mended()


def crash_after_ledger(settings: Settings) -> None:
    registry.show_aliases = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
    promote(MODEL, 2, reason="beats version 1", expect=1, settings=settings)


def test_a_crash_between_ledger_and_mlflow_is_mended(tmp_path):
    settings = new_project(tmp_path)
    assert children(start_race, [(settings,)]) == [0]
    assert children(crash_after_ledger, [(settings,)]) == [-signal.SIGKILL]
    ledger = open_ledger(settings)
    assert (champion(MODEL, ledger), alias_in_mlflow(settings)) == (2, 1)
    assert mend(MODEL, ledger=ledger).done == ("MLflow's champion of flight_delays was 1 and is now 2, as in the ledger.",)
    assert alias_in_mlflow(settings) == 2
    assert mend(MODEL, ledger=ledger) == Mended()


def crash_before_ledger(settings: Settings) -> None:
    Ledger.change = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
    simple_models(settings, 1)


def test_a_crash_between_mlflow_and_ledger_registers_once(tmp_path):
    settings = new_project(tmp_path)
    assert children(crash_before_ledger, [(settings,)]) == [-signal.SIGKILL]
    ledger = open_ledger(settings)
    assert versions(MODEL, ledger) == []
    simple_models(settings, 1)
    assert [row["version"] for row in versions(MODEL, ledger)] == [1]
    assert len(tracking_client(settings).search_model_versions()) == 1
    assert mend(MODEL, ledger=ledger) == Mended()
    assert load_scorer(MODEL, 1, ledger=ledger).columns == ("hour",)


def test_a_promotion_stands_when_mlflow_cannot_be_reached(project, monkeypatch):
    settings, ledger = project

    def unreachable(settings):
        raise RegistryError("MLflow does not answer.")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr(registry, "tracking_client", unreachable)
        promote(MODEL, 2, reason="beats version 1", expect=1, ledger=ledger)
    assert "MLflow does not answer" in str(warned[-1].message)
    assert (champion(MODEL, ledger), alias_in_mlflow(settings)) == (2, 1)
    assert len(mend(MODEL, ledger=ledger).done) == 1
    assert alias_in_mlflow(settings) == 2


def test_a_step_that_is_resumed_finds_its_own_promotion(project, monkeypatch):
    settings, ledger = project
    monkeypatch.setenv("AIEXEC_RUN", "r20261123-101500-4f2a")
    monkeypatch.setenv("AIEXEC_STEP", "gate")
    move = promote(MODEL, 2, reason="beats version 1", expect=1, ledger=ledger)
    assert promote(MODEL, 2, reason="beats version 1", expect=1, ledger=ledger) == move
    assert len(history(MODEL, ledger)) == 2
    monkeypatch.setenv("AIEXEC_RUN", "r20261124-101500-90cd")
    with pytest.raises(StaleWrite, match="is version 2, not 1; nothing was moved"):
        promote(MODEL, 2, reason="beats version 1", expect=1, ledger=ledger)


def test_boosting_scores_the_same_after_a_trip_through_the_registry(tmp_path):
    ledger = open_ledger(new_project(tmp_path))
    chance = np.random.default_rng(0)
    rows = pd.DataFrame({"carrier": chance.choice(["UA", "B6", None], 3000), "hour": chance.integers(5, 23, 3000)})
    late = (chance.random(3000) < rows["hour"] / 40).astype(int)
    codes = make_column_transformer((OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["carrier"]),
                                    remainder="passthrough")
    model = make_pipeline(codes, HistGradientBoostingClassifier(max_iter=30)).fit(rows, late)
    register(MODEL, model, rows, metrics={}, trained_on={}, ledger=ledger)
    scorer = load_scorer(MODEL, 1, ledger=ledger)
    np.testing.assert_array_equal(scorer.score(rows[["hour", "carrier"]]), model.predict_proba(rows)[:, 1])
    with pytest.raises(AiexecError, match="needs the columns carrier"):
        scorer.score(rows[["hour"]])
