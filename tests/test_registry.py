"""The registry under people who race, slip, crash and tamper."""

import json
import os
import pickle
import random
import signal
import warnings
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier, Thread
from zipfile import ZipFile

import numpy as np
import pandas as pd
import pytest
import skops.io
from mlflow import MlflowClient
from mlflow.models import Model
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder

from aiexec import store
from aiexec.errors import AiexecError, RegistryError, StaleWrite
from aiexec.govern.audit import verify_chain
from aiexec.govern.doctor import look
from aiexec.govern.doctor import registry as examination
from aiexec.model import registry
from aiexec.model.loading import inspect, inspected, look_over
from aiexec.model.mending import Mended, mend
from aiexec.model.registry import ALIASES, VERSIONS, champion, find_version, history, promote, register, rollback, versions
from aiexec.model.tracking import sound, tracking_client, tracking_ready
from aiexec.run.records import STEPS
from aiexec.serve.scorer import load_scorer
from aiexec.settings import Settings
from aiexec.store import Change, open_ledger

from .conftest import aiexec, new_database

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
        process.join(240)
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


def start_race(settings: Settings) -> None:
    simple_models(settings, 3)
    promote(MODEL, 1, reason="first model", settings=settings)


def race(settings: Settings, number: int, threads: int, gate, answers) -> None:
    "Threads that share a ledger, and on SQLite threads with one of their own too, all at once with other processes."
    shared, start = open_ledger(settings), Barrier(threads)

    def one(place: int) -> None:
        ledger = shared if settings.store or place % 4 else open_ledger(settings)  # a server has so many connections only
        start.wait()
        try:
            promote(MODEL, 2 + place % 2, reason=f"process {number}, thread {place}", expect=1, ledger=ledger)
            answers.put("won")
        except StaleWrite:
            answers.put("told")
        except BaseException as why:
            answers.put(repr(why))

    gate.wait()
    running = [Thread(target=one, args=(place,)) for place in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def hold_race(settings: Settings, processes: int, threads: int) -> None:
    assert children(start_race, [(settings,)]) == [0]  # not here: an open SQLite connection must not cross a fork
    gate, answers = FORK.Barrier(processes), FORK.SimpleQueue()
    started = [FORK.Process(target=race, args=(settings, number, threads, gate, answers)) for number in range(processes)]
    for process in started:
        process.start()
    said = sorted(answers.get() for _ in range(processes * threads))
    for process in started:
        process.join()
    assert said == ["told"] * (processes * threads - 1) + ["won"]
    ledger = open_ledger(settings)
    moves = history(MODEL, ledger)
    assert [move.seq for move in moves] == [1, 2]
    assert len(ledger.events(kind="alias.moved")) == 2
    assert alias_in_mlflow(settings) == champion(MODEL, ledger) == moves[-1].version
    assert verify_chain(ledger).ok


def test_of_two_hundred_promotions_on_one_expectation_one_wins(tmp_path):
    hold_race(new_project(tmp_path), processes=10, threads=20)


def test_of_two_hundred_promotions_in_a_database_on_a_server_one_wins(tmp_path, server):
    url = new_database(server, "promotions")
    hold_race(replace(new_project(tmp_path), store=url), processes=2, threads=100)


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


def test_nobody_decides_about_a_version_whose_files_changed(project):
    settings, ledger = project
    newest = versions(MODEL, ledger)[-1]["version"]
    file = settings.home / find_version(MODEL, newest, ledger)["source"] / "model.skops"
    whole, before = file.read_bytes(), (champion(MODEL, ledger), len(ledger.rows(ALIASES)))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    words = [("promote", MODEL, newest, "--reason", "x", "--override"), ("approve", MODEL, newest, "--reason", "x"),
             ("canary", MODEL, newest, "--reason", "x")]
    for one in words:
        refused = aiexec(*one, cwd=settings.root)
        assert refused.returncode == 1 and f"files of {MODEL} version {newest} are not those" in refused.stderr, refused
    assert (champion(MODEL, ledger), len(ledger.rows(ALIASES))) == before
    found = look("registry", examination, settings)
    assert not found.ok and f"{MODEL} version {newest} are not those that were registered: restore" in found.says
    file.write_bytes(whole)
    assert look("registry", examination, settings).ok


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


def kill(*given, **named) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function):
    "The same function, which is killed when its work is done."
    def acted(*given, **named):
        function(*given, **named)
        kill()

    return acted


REGISTERING = {
    "before the files are written": (registry, "write_tree", False),
    "when they are written": (registry, "write_tree", True),
    "when they are uploaded": (MlflowClient, "log_model_artifacts", True),
    "before the version": (MlflowClient, "create_model_version", False),
    "when there is a version": (MlflowClient, "create_model_version", True),
    "within the ledger's transaction": (Change, "insert", True),
    "when the ledger has it": (store, "write_text", False),
}
PROMOTING = {
    "within the ledger's transaction": (Change, "insert", True),
    "when the ledger has it": (registry, "show_aliases", False),
    "before MLflow's alias": (MlflowClient, "set_registered_model_alias", False),
    "when MLflow has it": (MlflowClient, "set_registered_model_alias", True),
}


def killed(settings: Settings, point: tuple, work, *given) -> None:
    owner, name, late = point
    tracking_client(settings)  # its database is made before
    ledger = open_ledger(settings)
    for table in (VERSIONS, ALIASES, STEPS):
        ledger.prepare(table)
    with ledger.change("test.began", MODEL):  # so that there is a head
        pass
    setattr(owner, name, after(getattr(owner, name)) if late else kill)
    work(settings, *given)


def promote_second(settings: Settings) -> None:
    promote(MODEL, 2, reason="beats version 1", expect=1, settings=settings)


def all_is_well(settings: Settings) -> None:
    "Nothing is half done: MLflow and the ledger tell the same, and no files lie about that nobody knows."
    ledger, client = open_ledger(settings), tracking_client(settings)
    stored = [one for one in client.search_model_versions(f"name='{MODEL}'") if "aiexec.abandoned" not in one.tags]
    assert sorted(int(one.version) for one in stored) == [row["version"] for row in versions(MODEL, ledger)]
    places = [one.experiment_id for one in client.search_experiments()]
    assert {one.artifact_location for one in client.search_logged_models(places)} == {one.source for one in stored}
    if versions(MODEL, ledger):
        assert alias_in_mlflow(settings) == champion(MODEL, ledger)
    assert verify_chain(ledger).ok


@pytest.mark.parametrize("when", REGISTERING)
def test_a_registration_killed_at_any_point_is_mended_and_made_once(tmp_path, when):
    settings = new_project(tmp_path)
    assert children(killed, [(settings, REGISTERING[when], simple_models, 1)]) == [-signal.SIGKILL]
    ledger = open_ledger(settings)
    mend(MODEL, ledger=ledger)
    assert mend(MODEL, ledger=ledger) == Mended()
    all_is_well(settings)
    simple_models(settings, 1)
    row, = versions(MODEL, ledger)
    assert (row["actor"], row["metrics"], row["trained_on"]) == ("ada", {"roc_auc": 0.6}, {"window": "2013-01"})
    all_is_well(settings)
    assert load_scorer(MODEL, row["version"], ledger=ledger).columns == ("hour",)


@pytest.mark.parametrize("when", PROMOTING)
def test_a_promotion_killed_at_any_point_is_whole_or_not_at_all(tmp_path, when):
    settings = new_project(tmp_path)
    assert children(start_race, [(settings,)]) == [0]
    assert children(killed, [(settings, PROMOTING[when], promote_second)]) == [-signal.SIGKILL]
    ledger = open_ledger(settings)
    mend(MODEL, ledger=ledger)
    all_is_well(settings)
    assert champion(MODEL, ledger) == (1 if when == "within the ledger's transaction" else 2)


def test_doctor_mends_and_says_so_and_names_what_only_a_person_can_decide(tmp_path):
    settings = new_project(tmp_path)
    assert children(killed, [(settings, REGISTERING["when there is a version"], simple_models, 1)]) == [-signal.SIGKILL]
    told = look("registry", examination, settings)
    assert told.ok and "flight_delays version 1 was in MLflow, but not in the ledger, and is recorded now." in told.says
    tracking_client(settings).create_model_version(MODEL, str(tmp_path))
    told = look("registry", examination, settings)
    assert not told.ok and "flight_delays version 2 was registered past aiexec" in told.says


def test_versions_come_back_when_the_database_of_mlflow_is_gone(tmp_path):
    settings = new_project(tmp_path)
    assert children(start_race, [(settings,)]) == [0]
    (settings.home / "mlflow.db").unlink()
    assert len(mend(MODEL, settings).done) == 4
    assert alias_in_mlflow(settings) == 1
    assert load_scorer(MODEL, 2, settings).version == 2


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


class Harm:
    "A pickle that leaves a file when it is loaded."

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def stored(folder: Path, name: str) -> Path:
    "A sound model's folder, to be spoilt."
    rows = pd.DataFrame({"hour": np.arange(40.0)})
    model = LogisticRegression().fit(rows, rows["hour"] > 20)
    registry.write_tree(model, rows, folder / name, Model(), {})
    return folder / name


def edited(tree: Path, old: str, new: str) -> Path:
    text = (tree / "MLmodel").read_text()
    assert old in text
    (tree / "MLmodel").write_text(text.replace(old, new))
    return tree


def test_what_a_hostile_model_would_do_is_said_and_not_done(tmp_path):
    harm = tmp_path / "harm"
    cases = {"It unpickles": stored(tmp_path, "extra"), "and imports": stored(tmp_path, "code"), "link": stored(tmp_path, "link"),
             "leads out of its folder": edited(stored(tmp_path, "out"), "pickled_model: model.skops", "pickled_model: ../../model.skops"),
             "It unpickles, which": edited(stored(tmp_path, "told"), "serialization_format: skops", "serialization_format: pickle"),
             "It imports code": edited(stored(tmp_path, "loader"), "loader_module: mlflow.sklearn", "loader_module: os"),
             "MLmodel cannot be read": edited(stored(tmp_path, "alias"), "flavors:", "a: &a [1]\nb: *a\nflavors:"),
             "neither a file nor a folder": stored(tmp_path, "pipe")}
    (cases["It unpickles"] / "weights.bin").write_bytes(pickle.dumps(Harm(harm)))
    (cases["and imports"] / "custom.py").write_text(f"open({str(harm)!r}, 'w')")
    (cases["link"] / "there").symlink_to("/etc/passwd")
    os.mkfifo(cases["neither a file nor a folder"] / "pipe")
    for words, tree in cases.items():
        found = look_over(tree)
        said = " ".join([*found["problems"], *(["It unpickles, which"] if found["pickles"] else []),
                         *(["It imports code", "and imports"] if found["code"] else [])])
        assert words in said, (words, found)
    assert not harm.exists()


def test_what_takes_too_much_memory_ends_in_the_child(tmp_path):
    tree = stored(tmp_path, "large")
    with ZipFile(tree / "model.skops") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    array = next(name for name in members if name.endswith(".npy"))
    members[array] = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000,), }".ljust(117) + b"\n"
    with ZipFile(tree / "model.skops", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    found = inspect(tree)
    assert found.problems and found.memory < 2 << 30, found
    with pytest.raises(RegistryError, match="large is not loaded"):
        found.check(consent=True)


def test_a_sound_model_is_looked_over_and_weights_that_were_swapped_are_told_by_the_digest(project, tmp_path):
    settings, ledger = project
    one, two = (settings.home / find_version(MODEL, version, ledger)["source"] for version in (1, 2))
    with inspected(one) as (copy, found):
        assert (found.problems, found.asks, found.digest) == ((), (), find_version(MODEL, 1, ledger)["digest"])
        assert found.memory > 0 and copy != one and "inputs" in found.signature
    (one / "model.skops").write_bytes((two / "model.skops").read_bytes())
    with pytest.raises(RegistryError, match="not those that were registered. Nothing was loaded"):
        load_scorer(MODEL, 1, ledger=ledger)


def test_a_version_knows_the_notebook_and_the_data_of_its_run(project, monkeypatch):
    settings, ledger = project
    parts = {"code": "c" * 64, "input flights": "d" * 64, "module flights.py": "e" * 64}
    with ledger.change("test.step", "r1/train", tables=(STEPS,)) as change:
        change.insert(STEPS, {"run": "r1", "step": "train", "attempt": 1, "parts": parts, "notebook": "runs/r1/train/1/notebook.ipynb"})
    monkeypatch.setenv("AIEXEC_RUN", "r1")
    monkeypatch.setenv("AIEXEC_STEP", "train")
    rows = pd.DataFrame({"hour": np.arange(40.0)})
    model = LogisticRegression(C=9.0).fit(rows, rows["hour"] > 20)
    made = register(MODEL, model, rows, metrics={}, trained_on={}, ledger=ledger)
    row = find_version(MODEL, made, ledger)
    assert (row["made_by"]["code"], row["made_by"]["inputs"]) == ("c" * 64, {"flights": "d" * 64})
    assert len(row["data"]) == 64 and registry.unsaid(row) == []
    assert row["signature"]["inputs"][0]["name"] == "hour"
    told = json.loads((settings.home / row["source"] / "aiexec.json").read_text())
    assert (told["run"], told["made_by"]) == ("r1", row["made_by"])
    assert "which notebook made it is not on record" in registry.unsaid(find_version(MODEL, 1, ledger))[0]


def test_a_project_leaves_alone_what_another_stored_in_the_same_mlflow(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    url = f"sqlite:///{tmp_path}/shared.db"
    one, two = (replace(new_project(tmp_path / name), tracking=url) for name in ("one", "two"))
    assert children(killed, [(one, REGISTERING["when there is a version"], simple_models, 1)]) == [-signal.SIGKILL]
    assert mend(MODEL, two) == Mended() and versions(MODEL, open_ledger(two)) == []
    assert look("registry", examination, two).ok
    simple_models(two, 1)
    assert [row["version"] for row in versions(MODEL, open_ledger(two))] == [2]
    assert len(mend(MODEL, one).done) == 1
    assert [row["version"] for row in versions(MODEL, open_ledger(one))] == [1]
