"""What is answered is kept, and who answers changes without a lost request: under kill -9, promotions and canaries."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from aiexec.data.datasets import read
from aiexec.model.registry import find_version, promote, register
from aiexec.model.webhooks import add_webhook
from aiexec.serve.batch import score_batch
from aiexec.serve.canary import canary_moves, running_canary, start_canary
from aiexec.serve.archive import compact
from aiexec.serve.days import Answered
from aiexec.serve.live import Live
from aiexec.serve.models import open_served
from aiexec.serve.predictions import PredictionLog, monitored, open_log, prediction_ids, predictions_folder, read_predictions
from aiexec.serve.scorer import load_scorer
from aiexec.settings import Settings, load_settings
from aiexec.store import Ledger, now, open_ledger

from .conftest import answer
from .test_service import Served as Service
from .test_webhooks import receiver  # noqa: F401, a fixture

FORK = get_context("fork")  # a fresh interpreter each would take seconds to import what is already here
KILLS = int(os.environ.get("KILLS", "50"))  # KILLS=1000 python -m pytest tests/test_rollout.py -k killed
WAIT = 60.0  # seconds, where something has to come
INPUTS = (("hour", "double"), ("carrier", "string"))


def waited(condition, what: str) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def answered(first: int, rows: int) -> Answered:
    "Answers that can be recognised: everything in a row follows from its number."
    numbers = np.arange(first, first + rows)
    frame = pd.DataFrame({"hour": numbers / 7, "carrier": [f"C{number}" for number in numbers]})
    return Answered("flights", "1", INPUTS, "champion", [f"id {number}" for number in numbers], [None] * rows, frame, numbers * 0.5)


def are_right(frame: pd.DataFrame) -> bool:
    if frame.empty:
        return True
    number = frame["prediction_id"].str.removeprefix("id ").astype(int)
    return bool((frame["hour"] == number / 7).all() and (frame["carrier"] == "C" + number.astype(str)).all()
                and (frame["score"] == number * 0.5).all() and frame["prediction_id"].is_unique)


def append_until_killed(folder: Path, first: int, told: int) -> None:
    "Append batches of one to nine rows, and tell the number of each batch once it is on the disk."
    log, chance = PredictionLog(folder), random.Random(first)
    while True:
        rows = chance.randint(1, 9)
        log.append([answered(first, rows)])
        os.write(told, f"{first} {rows}\n".encode())
        first += rows


def killed_while(function, *words, after: float) -> str:
    "Run a function in a process of its own, kill it a while after it told something first, and give all that it told."
    reading, writing = os.pipe()
    child = FORK.Process(target=function, args=(*words, writing))
    child.start()
    os.close(writing)
    with os.fdopen(reading) as stream:
        first = stream.readline()
        time.sleep(after)
        os.kill(child.pid, signal.SIGKILL)
        told = first + stream.read()
    child.join(WAIT)
    return told


def test_no_answer_that_was_told_is_lost_when_workers_are_killed(tmp_path):
    chance, told = random.Random(4), set()
    for number in range(KILLS):
        lines = killed_while(append_until_killed, tmp_path, number * 1_000_000, after=chance.uniform(0.0, 0.02)).splitlines()
        told |= {f"id {first + row}" for first, rows in (map(int, line.split()) for line in lines) for row in range(rows)}
        if number % 10 == 0:
            compact(tmp_path, everything=True)
    frame = read_predictions(tmp_path)
    assert len(told) > KILLS and told <= set(frame["prediction_id"]) and are_right(frame)


def test_a_segment_cut_anywhere_gives_whole_answers_only(tmp_path):
    log = PredictionLog(tmp_path / "log")
    for first in (0, 3, 7):
        log.append([answered(first, 2)])
    log.close()
    [segment] = (tmp_path / "log").glob("day=*/_*.log")
    whole, ends = segment.read_bytes(), []
    for place in range(0, len(whole), 3):
        segment.write_bytes(whole[:place])
        frame = read_predictions(tmp_path / "log")
        assert are_right(frame) and len(frame) in (0, 2, 4, 6)
        ends.append(len(frame))
    assert ends == sorted(ends) and set(ends) == {0, 2, 4}


def compact_until_killed(folder: Path, told: int) -> None:
    os.write(told, b"now\n")
    compact(folder, everything=True)


def test_compacting_that_is_killed_loses_and_doubles_nothing(tmp_path):
    chance, first, rows = random.Random(5), 0, 40
    for _ in range(max(10, KILLS // 2)):
        for _ in range(3):
            log = PredictionLog(tmp_path)
            log.append([answered(first, rows)])
            log.close()
            first += rows
        killed_while(compact_until_killed, tmp_path, after=chance.uniform(0.0, 0.04))
        frame = read_predictions(tmp_path)
        assert len(frame) == first and are_right(frame)
    compact(tmp_path, everything=True)
    assert len(read_predictions(tmp_path)) == first and not list(tmp_path.glob("day=*/_*.log"))


def append_some(folder: Path, first: int, batches: int) -> None:
    for number in range(batches):
        log = PredictionLog(folder) if number % 10 == 0 else log
        log.append([answered(first + 3 * number, 3)])
        if number % 10 == 9:
            log.close()


def test_reading_while_others_append_and_compact_misses_nothing(tmp_path):
    workers = [FORK.Process(target=append_some, args=(tmp_path, number * 10_000, 100)) for number in range(3)]
    for worker in workers:
        worker.start()
    known: set[str] = set()
    while any(worker.is_alive() for worker in workers):
        compact(tmp_path, everything=True)
        frame = read_predictions(tmp_path)
        seen = set(frame["prediction_id"])
        assert known <= seen and are_right(frame)
        known = seen
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    compact(tmp_path, everything=True)
    assert len(read_predictions(tmp_path)) == 900


# --- who answers


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Path:
    "A project with four versions of a model, the first the champion. Copy it before changing it."
    root = tmp_path_factory.mktemp("versions").resolve()
    (root / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    ledger = open_ledger(Settings(root, actor="ada"))
    rows = pd.DataFrame({"hour": np.linspace(5, 23, 40), "distance": np.linspace(2000, 100, 40)})
    for number in range(4):
        model = LogisticRegression(C=1.0 + number, max_iter=500).fit(rows, rows["hour"] > 14)
        register("flights", model, rows, metrics={}, trained_on={"number": number}, ledger=ledger)
    promote("flights", 1, reason="the first", ledger=ledger)
    return root


@pytest.fixture
def ledger(versions, tmp_path) -> Ledger:
    shutil.copytree(versions, tmp_path / "project")
    return open_ledger(Settings(tmp_path / "project", actor="ada"))


def opened(ledger: Ledger, every: float = 0.05) -> tuple[Live, PredictionLog]:
    log = open_log("flights", ledger.settings)
    live = Live("flights", lambda version: open_served(f"flights/{version}", ledger=ledger), ledger, log=log, every=every)
    return live.start(), log


ROWS = np.column_stack([np.linspace(5, 23, 24), np.linspace(2000, 100, 24)])
KEYS = [f"customer {number}" for number in range(24)]


def test_promotions_under_load_lose_no_request_and_mix_no_versions(ledger):
    live, log = opened(ledger)
    expected = {str(version): open_served(f"flights/{version}", ledger=ledger).predict(ROWS) for version in (1, 2, 3)}
    asked, wrong, stop = [], [], threading.Event()

    def load() -> None:  # as the batching thread does it
        while not stop.is_set():
            ids = prediction_ids(len(ROWS))
            batch = live.predict(ROWS, KEYS, ids)
            log.append(batch.parts)
            asked.extend(zip(ids, batch.versions))
            if len(set(batch.versions)) > 1 or not np.array_equal(batch.outputs, expected[batch.versions[0]]):
                wrong.append(batch)

    thread = threading.Thread(target=load)
    thread.start()
    stored = ledger.settings.home / find_version("flights", 4, ledger)["source"] / "model.skops"
    whole = stored.read_bytes()
    try:
        for version in (2, 3, 1):
            promote("flights", version, reason="a trial", ledger=ledger)
            waited(lambda: live.champion.version == str(version), f"version {version} never answered: {live.why}")
        stored.write_bytes(b"damaged")
        promote("flights", 4, reason="damaged", ledger=ledger)
        waited(lambda: live.state == "degraded", "nobody noticed the damage")
        assert "not those that were registered" in live.why and live.champion.version == "1"
        stored.write_bytes(whole)
        promote("flights", 2, reason="on", ledger=ledger)
        waited(lambda: live.state == "ready" and live.champion.version == "2", "it did not move on")
    finally:
        stop.set()
        thread.join(WAIT)
        live.close()
        log.close()
    frame = read_predictions(log.folder)
    assert not wrong and {version for _, version in asked} == {"1", "2", "3"}
    assert dict(zip(frame["prediction_id"], frame["version"])) == dict(asked) and len(frame) == len(asked)


def answer_until_told(root: Path, failing: bool, begin, told: int) -> None:
    "One worker: answers, logs, and tells the ids of what it answered, until the canary has ended."
    ledger = open_ledger(Settings(root, actor="ada"))
    live, log = opened(ledger)
    if failing:
        def fail(rows):
            raise ValueError("a carrier that nobody knows")

        object.__setattr__(live.standing.canary.served, "scoring", fail)
    begin.wait(WAIT)
    expected, deadline = open_served("flights/1", ledger=ledger).predict(ROWS), time.monotonic() + WAIT
    while live.standing.canary and time.monotonic() < deadline:
        ids = prediction_ids(len(ROWS))
        batch = live.predict(ROWS, KEYS, ids)
        log.append(batch.parts)
        assert not failing or np.array_equal(batch.outputs, expected)
        os.write(told, "".join(f"{one}\n" for one in ids).encode())
    live.close()
    log.close()


def test_a_failing_canary_is_taken_back_once_by_all_workers_and_costs_no_answer(ledger):
    start_canary("flights", 2, percent=30, reason="a look", ledger=ledger)
    reading, writing = os.pipe()
    begin = FORK.Barrier(3)  # or the first would be done before the last has begun
    workers = [FORK.Process(target=answer_until_told, args=(ledger.settings.root, True, begin, writing)) for _ in range(3)]
    for worker in workers:
        worker.start()
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read().split()
    for worker in workers:
        worker.join(WAIT)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert running_canary("flights", ledger) is None
    [event] = ledger.events(kind="canary.rolled_back")
    assert event.actor == "aiexec serve" and event.body["figures"]["canary"]["errors"] >= 20
    assert "a carrier that nobody knows" in event.body["figures"]["last_error"]
    frame = read_predictions(predictions_folder("flights", ledger.settings))
    assert sorted(frame["prediction_id"]) == sorted(told) and set(frame["version"]) == {"1"}


def test_a_service_that_takes_a_canary_back_tells_webhooks_itself(ledger, receiver):
    add_webhook(ledger, receiver.url, ["canary.rolled_back"], private=True)
    receiver.statuses = [500]  # it is asked again when it said that it may be
    wider = pd.DataFrame(np.column_stack([ROWS, ROWS[:, 0]]), columns=["hour", "distance", "visib"])
    fitted = LogisticRegression().fit(wider, ROWS[:, 0] > 15)  # needs what nobody sends: it fails on every row
    version = register("flights", fitted, wider, metrics={}, trained_on={}, ledger=ledger)
    service = Service("flights", "--workers", "2", cwd=ledger.settings.root)
    try:
        start_canary("flights", version, percent=50, reason="a look", ledger=ledger)
        body = {"instances": ROWS.tolist()}
        waited(lambda: service.ask("/invocations", body)[0] != 200 or not running_canary("flights", ledger), "it was never taken back")
        assert service.ask("/invocations", body)[0] == 200
        waited(lambda: len(receiver.got) > 1, "the receiver was never told")
    finally:
        assert service.end() == 0, service.said()
    [first, second] = [json.loads(body) for _, body in receiver.got]
    assert first == second and first["type"] == "canary.rolled_back" and first["data"]["version"] == version
    assert len(set(receiver.ids())) == 1 and first["data"]["actor"] == "aiexec serve"


CASE = """
name: flights
title: Warn of late flights
department: operations
owner: ada@example.org
risk: limited
success: [{metric: roc_auc, at_least: 0.6}]
value: {currency: USD, true_positive: 30, false_positive: -10, false_negative: 0, true_negative: 0, cost_per_month: 100}
model: {name: flights}
serve: {keep_days: 30}
"""


def test_old_days_of_the_log_go_by_the_service_and_by_doctor_and_no_others(ledger):
    root = ledger.settings.root
    (root / "usecases" / "flights").mkdir(parents=True)
    (root / "usecases" / "flights" / "usecase.yaml").write_text(CASE)
    days = predictions_folder("flights", ledger.settings)
    recent = (pd.Timestamp(now()[:10]) - pd.Timedelta(days=40)).strftime("day=%Y-%m-%d")  # older than 30 days, its labels just due

    def older(day: str) -> Path:
        log = PredictionLog(days.with_name(day))
        log.append([answered(0, 3)])
        log.close()
        days.mkdir(exist_ok=True)
        return next(log.folder.glob("day=*")).rename(days / day)

    before, young = older("day=2013-01-31"), older(recent)
    service = Service("flights", "--workers", "2", cwd=root)
    try:
        assert service.ask("/invocations", {"instances": ROWS.tolist()})[0] == 200
        waited(lambda: not before.exists(), "the old day stayed")
    finally:
        assert service.end() == 0, service.said()
    older("day=2013-02-01")
    doctor = answer("doctor", cwd=root)
    assert "removed 2013-02-01" in next(one["says"] for one in doctor if one["what"] == "predictions")
    assert [event.body["days"] for event in ledger.events(kind="predictions.removed")] == [["2013-01-31"], ["2013-02-01"]]
    assert len(read_predictions(days)) == 3 + len(ROWS) and young.exists()


def test_a_sound_canary_goes_on_when_the_worker_that_looks_is_killed(ledger):
    start_canary("flights", 2, percent=30, reason="a look", ledger=ledger)
    lead = predictions_folder("flights", ledger.settings) / "_canary" / "1-1" / "lead"
    reading, writing = os.pipe()
    first, second = (FORK.Process(target=answer_until_told, args=(ledger.settings.root, False, FORK.Barrier(1), writing)) for _ in range(2))
    looks = lambda: int(lead.read_text().strip() or 0) if lead.is_file() else 0  # noqa: E731
    with os.fdopen(reading, "rb", buffering=0) as stream:
        reader = threading.Thread(target=lambda: all(iter(lambda: stream.read(65536), b"")), daemon=True)
        reader.start()
        first.start()
        waited(looks, "nobody looked")
        second.start()
        os.kill(first.pid, signal.SIGKILL)
        first.join(WAIT)
        before = looks()
        waited(lambda: looks() > before, "nobody looks any more")
        assert running_canary("flights", ledger)
        promote("flights", 2, reason="it did well", ledger=ledger)
        second.join(WAIT)
        os.close(writing)
        reader.join(WAIT)
    assert second.exitcode == 0
    assert [move.action for move in canary_moves("flights", ledger)] == ["started", "promoted"]


def test_a_key_meets_one_version_in_every_worker(ledger):
    start_canary("flights", 2, percent=50, reason="a look", ledger=ledger)
    met = []
    for _ in range(2):
        live, log = opened(ledger, every=60)
        met.append(live.predict(ROWS, KEYS, prediction_ids(len(ROWS))).versions)
        live.close()
        log.close()
    assert met[0] == met[1] and Counter(met[0]).keys() == {"1", "2"}


def test_what_is_masked_is_never_written(ledger):
    root = ledger.settings.root
    (root / "usecases" / "flights").mkdir(parents=True)
    (root / "usecases" / "flights" / "usecase.yaml").write_text(
        "name: flights\ntitle: Late arrivals\ndepartment: operations\nowner: operations@example.org\nrisk: minimal\n"
        "success: [{metric: roc_auc, at_least: 0.6}]\nmodel: {name: flights}\nserve: {mask: [key, hour], drop: [distance]}\n"
        "value: {currency: EUR, true_positive: 1, false_positive: -1, false_negative: 0, true_negative: 0}\n")
    live, log = opened(ledger)
    log.append(live.predict(ROWS, KEYS, prediction_ids(len(ROWS))).parts)
    log.append(live.predict(ROWS, KEYS, prediction_ids(len(ROWS))).parts)
    live.close()
    log.close()
    frame = read_predictions(log.folder)
    assert "distance" not in frame and frame["hour"].nunique() == frame["key"].nunique() == len(ROWS)
    assert not any(b"customer" in path.read_bytes() for path in log.folder.rglob("*") if path.is_file())


# --- the flights


@pytest.fixture(scope="module")
def flown(month, tmp_path_factory):
    "A copy of a month of flights, its library, and the features of that month."
    root = tmp_path_factory.mktemp("rollout") / "flights"
    shutil.copytree(month, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIEXEC_ROOT", str(root))
        patch.syspath_prepend(str(root))
        import flights.features as library

        yield load_settings(root), library
    for name in [name for name in sys.modules if name.split(".")[0] == "flights"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def served(flown):
    "The flights of April, their features, what was said of them in requests of one row and of many, and when that was done."
    settings, library = flown
    ledger = open_ledger(settings)
    april = read("ingest.flights@2013-04", usecase="flight_delays", ledger=ledger)
    features, ids, said = library.features(april), april.flight_id.tolist(), []
    log = open_log("flight_delays", settings)
    live = Live("flight_delays", lambda version: open_served(f"flight_delays/{version}", settings, ledger), ledger, log=log).start()
    for first, last in [(0, 1), (1, 2), (2, 9), *((begin, begin + 500) for begin in range(9, len(features), 500))]:
        some = features.iloc[first:last]
        batch = live.predict(some, [None] * len(some), ids[first:last])
        log.append(batch.parts)
        said.append(batch.outputs[:, 1])
    live.close()
    log.close()
    return april, features, np.concatenate(said), now()


def test_training_batch_and_service_give_equal_scores(flown, served):
    (settings, library), (april, features, said, _) = flown, served
    ledger = open_ledger(settings)
    taught = find_version("flight_delays", "champion", ledger)["trained_on"]
    past = read(list(taught["datasets"]), usecase="flight_delays", ledger=ledger)
    late = pd.concat([library.read_labels(settings.root / "data" / "flights", one) for one in taught["months"]])
    past["late"] = late.reindex(past.flight_id).to_numpy()
    past = past[past.late.notna()]
    training = library.classifier().fit(library.features(past)[library.MODEL], past.late)
    expected = training.predict_proba(features[library.MODEL])[:, 1]
    batch = score_batch(load_scorer("flight_delays", ledger=ledger), features, april.flight_id)
    np.testing.assert_array_equal(batch.score, expected)
    np.testing.assert_array_equal(said, expected)
    kept = monitored(predictions_folder("flight_delays", settings)).set_index("prediction_id").loc[april.flight_id]
    np.testing.assert_array_equal(kept.score, expected)
    np.testing.assert_array_equal(kept[library.SCHEDULE], features[library.SCHEDULE])


def test_the_service_gives_the_same_scores_and_their_reasons(flown, served):
    settings, library = flown
    _, features, said, _ = served
    rows = features[library.MODEL].head(2000)
    service = Service("flight_delays", cwd=settings.root)
    try:
        body = json.loads(rows.to_json(orient="split", index=False, double_precision=15))
        code, told = service.ask("/invocations", {"dataframe_split": body})
        assert code == 200, told
        np.testing.assert_array_equal(np.array(told["predictions"])[:, 1], said[:2000])
        code, told = service.ask("/invocations?reasons=true", {"dataframe_split": {**body, "data": body["data"][:2]}})
        assert code == 200, told
        for score, reason in zip(told["predictions"], told["reasons"], strict=True):
            assert reason["base"] + sum(reason["contributions"].values()) == pytest.approx(score[1], abs=1e-9)
            assert set(reason["contributions"]) == set(library.MODEL)
    finally:
        assert service.end() == 0, service.said()


def test_the_monitor_reads_what_was_served(flown, served, tmp_path):
    settings, library = flown
    folder = predictions_folder("flight_delays", settings)
    compact(folder, everything=True)
    monitored(folder, until=served[-1]).to_parquet(tmp_path / "served.parquet")
    labels = library.read_labels(settings.root / "data" / "flights", "2013-04").rename("late").rename_axis("prediction_id")
    labels.dropna().reset_index().to_parquet(tmp_path / "labels.parquet")
    told = answer("performance", tmp_path / "served.parquet", "--target", "late", "--score", "score", "--labels", tmp_path / "labels.parquet",
                  "--on", "prediction_id", "--time", "at", "--every", "1000", cwd=tmp_path)
    assert len(told["windows"]) > 2
    assert all(0.5 < window["metrics"]["roc_auc"]["value"] < 0.8 for window in told["windows"])
