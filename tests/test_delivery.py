"""Decisions happen once: on SQLite and on PostgreSQL, however often the sender or the ledger's writer is killed."""

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from aiexec.decide import outbox
from aiexec.decide.decisions import DECISIONS, decide, log_decisions, record_outcomes, uplift
from aiexec.decide.outbox import OUTBOX, Receipt, deliver, enqueue, open_connector
from aiexec.decide.policies import Capacity, Policy
from aiexec.decide.sql import SqlReceiver
from aiexec.define.usecase import Value
from aiexec.define.value import benefit, expected_benefit
from aiexec.errors import DeliveryError, LockedError, StaleWrite
from aiexec.govern.audit import verify_chain
from aiexec.settings import Settings
from aiexec.store import declare, open_ledger, sa

from .conftest import new_database

FORK = multiprocessing.get_context("fork")
VALUE = Value(currency="USD", true_positive=38, false_positive=-9, false_negative=0, true_negative=0)
POLICY = Policy(action="warn", capacity=Capacity(share=0.05), hold_out=0.1, salt="test", rank_by="expected_value")
WARNINGS = SqlReceiver("sqlite://").table
NAME, MONTH = "flight_delays", "2013-04"


def scored(per_day: int = 1000, days: int = 30, seed: int = 1) -> pd.DataFrame:
    """A month of predictions, as a batch scorer gives them."""
    noise, rows = np.random.default_rng(seed), per_day * days
    return pd.DataFrame({
        "prediction_id": [f"{MONTH} UA{number}" for number in range(rows)], "score": noise.beta(2, 6, rows),
        "day": np.repeat([f"{MONTH}-{day + 1:02}" for day in range(days)], per_day), "model_version": 1, "carrier": "UA",
    })


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request, tmp_path) -> Settings:
    """A project whose ledger and operations database are both of one kind."""
    if request.param == "sqlite":
        return Settings(tmp_path, actor="test")
    server = request.getfixturevalue("server")
    made = f"t{time.time_ns()}"
    return Settings(tmp_path, actor="test", store=new_database(server, f"{made}_ledger"),
                    operations=new_database(server, f"{made}_operations"))


def received(settings: Settings) -> list[dict]:
    engine = SqlReceiver.from_settings(settings).engine
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sa.select(WARNINGS)).mappings()]


def queue_a_month(settings: Settings, days: int = 30) -> tuple:
    ledger = open_ledger(settings)
    chosen = decide(scored(days=days), POLICY, VALUE)
    return ledger, chosen, enqueue(ledger, NAME, MONTH, chosen, POLICY, "operations")


def child(work, *arguments) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def wait_for(path: Path, process) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert process.is_alive() and time.monotonic() < until, "the child did not come to the point where it is killed"
        time.sleep(0.005)


def kill(process) -> None:
    process.kill()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


def at_once(count: int, work) -> list:
    """What each of some processes answers that do the same work at the same moment; an error is a text."""
    answers, door = FORK.Queue(), FORK.Barrier(count)

    def one() -> None:
        door.wait(30)
        try:
            answers.put(work())
        except Exception as why:
            answers.put(f"{type(why).__name__}: {why}")

    processes = [child(one) for _ in range(count)]
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    return found


# --- a month ----------------------------------------------------------------------------------------------------------


def test_a_month_is_decided_queued_and_delivered_in_seconds(settings):
    chosen = decide(scored(), POLICY, VALUE)
    assert len(chosen) == 1500
    ledger = open_ledger(settings)
    started = time.monotonic()
    queued = enqueue(ledger, NAME, MONTH, chosen, POLICY, "operations", run="r1")
    sent = deliver(ledger, NAME, open_connector("operations", settings))
    seconds = time.monotonic() - started
    print(f"{seconds:.2f} s")
    treated = chosen[chosen.arm == "treated"]
    assert (queued.decisions, queued.messages) == (1500, len(treated))
    assert (sent.delivered, sent.failed, sent.waiting) == (len(treated), 0, 0)
    assert seconds < 8
    rows = received(settings)
    assert {row["prediction_id"] for row in rows} == set(treated.prediction_id)
    assert len(rows) == len(treated)
    assert rows[0]["payload"]["carrier"] == "UA"
    scores = dict(zip(chosen.prediction_id, chosen.score))
    assert all(row["score"] == scores[row["prediction_id"]] for row in rows)  # to the last bit
    assert ledger.count(OUTBOX, "receipt") == {("applied",): len(treated)}
    assert enqueue(ledger, NAME, MONTH, chosen, POLICY, "operations").decisions == 0
    assert deliver(ledger, NAME, open_connector("operations", settings)).delivered == 0
    assert verify_chain(ledger).ok


def test_no_day_exceeds_its_capacity_and_the_held_out_get_no_message(settings):
    ledger, chosen, _ = queue_a_month(settings)
    again = decide(scored(seed=2).assign(model_version=2), POLICY, VALUE)
    enqueue(ledger, NAME, MONTH, again, POLICY, "operations")
    rows = pd.DataFrame(ledger.rows(DECISIONS))
    assert (rows.groupby("day").size() == 50).all()
    assert set(rows.model_version) == {1}
    held_out = set(rows.prediction_id[rows.arm == "hold-out"])
    assert 100 < len(held_out) < 200
    assert not held_out & {row["payload"]["prediction_id"] for row in ledger.rows(OUTBOX)}


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_decision_and_its_message_stand_or_fall_together(settings, monkeypatch):
    ledger = open_ledger(settings)
    ledger.prepare(DECISIONS)
    ledger.prepare(OUTBOX)
    ledger.engine.dispose()  # no connection is shared with a child
    chosen = decide(scored(), POLICY, VALUE)
    made = []

    def deadly(decision, target):
        made.append(decision)
        if len(made) == 700:  # the decisions are inserted, the messages are not
            os.kill(os.getpid(), signal.SIGKILL)
        return message_of(decision, target)

    message_of = outbox.message_of
    monkeypatch.setattr(outbox, "message_of", deadly)
    victim = child(lambda: enqueue(open_ledger(settings), NAME, MONTH, chosen, POLICY, "operations"))
    victim.join(30)
    assert victim.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert (ledger.rows(DECISIONS), ledger.rows(OUTBOX)) == ([], [])
    assert enqueue(ledger, NAME, MONTH, chosen, POLICY, "operations").decisions == 1500
    assert verify_chain(ledger).ok


class Slow(SqlReceiver):
    """Has its effect, says so in a file, and is then too slow to answer."""

    calls, marker, slow_call = 0, Path(), 1

    def deliver(self, messages):
        receipts = super().deliver(messages)
        self.calls += 1
        if self.calls == self.slow_call:
            self.marker.touch()
            time.sleep(60)
        return receipts


def send_slowly(settings: Settings, marker: Path, slow_call: int, kind: type = Slow) -> None:
    receiver = kind(settings.url("operations"))
    receiver.marker, receiver.slow_call = marker, slow_call
    deliver(open_ledger(settings), NAME, receiver)


@pytest.mark.parametrize("slow_call", [1, 2])
def test_a_sender_killed_between_effect_and_mark_has_its_effect_once(settings, tmp_path, slow_call):
    ledger, _, queued = queue_a_month(settings)
    ledger.engine.dispose()
    victim = child(send_slowly, settings, tmp_path / "marker", slow_call)
    wait_for(tmp_path / "marker", victim)
    kill(victim)
    applied, marked = len(received(settings)), ledger.count(OUTBOX, status="delivered").get((), 0)
    assert applied - marked == outbox.BATCH  # it was killed where it hurts
    sent = deliver(ledger, NAME, SqlReceiver.from_settings(settings))
    assert (sent.delivered, sent.waiting) == (queued.messages - marked, 0)
    rows = received(settings)
    assert len(rows) == len({row["message"] for row in rows}) == queued.messages
    assert ledger.count(OUTBOX, receipt="already there") == {(): outbox.BATCH}
    assert verify_chain(ledger).ok


class Careless(Slow):
    """A receiver that keeps no key: what the test above would see if ours were wrong."""

    def __init__(self, url):
        super().__init__(url)
        columns = sa.Column("row", sa.Integer, primary_key=True), sa.Column("message", sa.Text)
        self.table = sa.Table("warnings", sa.MetaData(), *columns)

    def deliver(self, messages):
        with self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            connection.execute(sa.schema.CreateTable(self.table, if_not_exists=True))
            connection.execute(self.table.insert(), [{"message": one["message"]} for one in messages])
        self.calls += 1
        if self.calls == self.slow_call and self.marker.name:
            self.marker.touch()
            time.sleep(60)
        return {one["message"]: Receipt(True, "taken") for one in messages}


def test_the_kill_is_real_a_careless_receiver_has_effects_twice(tmp_path):
    settings = Settings(tmp_path, actor="test")
    ledger, _, queued = queue_a_month(settings, days=2)
    victim = child(send_slowly, settings, tmp_path / "marker", 1, Careless)
    wait_for(tmp_path / "marker", victim)
    kill(victim)
    careless = Careless(settings.url("operations"))
    deliver(ledger, NAME, careless)
    with careless.engine.connect() as connection:
        assert len(connection.execute(sa.select(careless.table)).all()) == 2 * queued.messages


def test_senders_killed_at_random_lose_and_double_nothing(settings, monkeypatch):
    monkeypatch.setattr(outbox, "BATCH", 50)
    ledger, _, queued = queue_a_month(settings)
    lot, kills = random.Random(5), 0
    for _ in range(20):
        ledger.engine.dispose()
        victim = child(lambda: deliver(open_ledger(settings), NAME, SqlReceiver.from_settings(settings)))
        victim.join(lot.uniform(0.01, 0.12))
        victim.kill()
        victim.join(30)
        kills += victim.exitcode == -signal.SIGKILL
        done = {row["message"] for row in ledger.rows(OUTBOX, status="delivered")}
        assert not done or done <= {row["message"] for row in received(settings)}  # nothing is marked that has no effect
    assert kills >= 3
    deliver(ledger, NAME, SqlReceiver.from_settings(settings))
    rows = received(settings)
    assert len(rows) == len({row["message"] for row in rows}) == queued.messages
    assert ledger.count(OUTBOX, "status") == {("delivered",): queued.messages}
    assert verify_chain(ledger).ok


# --- down, refused, at once -------------------------------------------------------------------------------------------


def test_a_receiver_that_is_down_costs_nothing_but_time(settings):
    ledger, _, queued = queue_a_month(settings, days=2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        down = SqlReceiver(f"postgresql+psycopg://nobody:secret@127.0.0.1:{closed.getsockname()[1]}/operations?connect_timeout=3")
        for _ in range(outbox.TRIES + 1):
            with pytest.raises(DeliveryError, match=f"did not answer.*aiexec deliver {NAME}") as refusal:
                deliver(ledger, NAME, down)
    assert "secret" not in str(refusal.value) and "secret" not in str(ledger.events()[-1])
    rows = ledger.rows(OUTBOX)
    assert {(row["status"], row["attempts"]) for row in rows} == {("waiting", 0)}
    assert all(row["last_error"] for row in rows)
    assert deliver(ledger, NAME, SqlReceiver.from_settings(settings)).delivered == queued.messages


def test_a_second_sender_is_told_who_is_at_work(tmp_path):
    settings = Settings(tmp_path, actor="test")
    ledger, _, queued = queue_a_month(settings, days=2)
    first = child(send_slowly, settings, tmp_path / "marker", 1)
    wait_for(tmp_path / "marker", first)
    with pytest.raises(LockedError, match=f"the delivery of {NAME} .process {first.pid}"):
        deliver(ledger, NAME, SqlReceiver.from_settings(settings))
    kill(first)  # and a dead holder holds nothing
    assert deliver(ledger, NAME, SqlReceiver.from_settings(settings)).delivered == queued.messages


def test_two_receivers_at_once_apply_each_message_once(settings):
    messages = [{"message": f"m{number}", "usecase": NAME, "window": MONTH,
                 "payload": {"prediction_id": f"p{number}", "action": "warn", "score": 0.5}} for number in range(400)]
    open_ledger(settings)
    answers = at_once(4, lambda: list(SqlReceiver.from_settings(settings).deliver(messages).values()))
    said = [receipt.text for answer in answers for receipt in answer]
    assert len(received(settings)) == 400
    assert (said.count("applied"), said.count("already there")) == (400, 1200)


def test_a_month_queued_by_four_at_once_is_queued_once(settings):
    ledger = open_ledger(settings)
    ledger.engine.dispose()
    chosen = decide(scored(days=4), POLICY, VALUE)
    found = at_once(4, lambda: enqueue(open_ledger(settings), NAME, MONTH, chosen, POLICY, "operations").decisions)
    assert sorted(found, key=str) == [0, 0, 0, 200]
    assert len(ledger.rows(DECISIONS)) == 200
    assert verify_chain(ledger).ok


# --- the ledger on either database ------------------------------------------------------------------------------------

VISITS = declare("visits", key=("visit",), visit="text", guests="int", weight="float", notes="json", paid="bool")


def visit(name: str, **columns) -> dict:
    return {"visit": name, "guests": 2, "weight": 0.1, "notes": {"table": [1, None]}, "paid": True} | columns


def test_the_ledger_keeps_its_promises(settings):
    ledger = open_ledger(settings)
    with ledger.change("visit.made", "v1", {"café": "☕"}, (VISITS,)) as change:
        change.insert(VISITS, visit("v1"), visit("v2", weight=None, notes=None, paid=None))
        assert change.keep(VISITS, visit("v1", guests=9), visit("v3")) == 1
        change.put(VISITS, visit("v3", guests=2**40))
        assert len(change.rows(VISITS)) == 3
    assert ledger.rows(VISITS, visit="v1") == [visit("v1")]
    assert ledger.rows(VISITS, visit="v2") == [visit("v2", weight=None, notes=None, paid=None)]
    assert [row["guests"] for row in ledger.rows(VISITS, order="-visit")] == [2**40, 2, 2]
    assert ledger.count(VISITS, "guests") == {(2,): 2, (2**40,): 1}
    for wrong in (lambda change: change.insert(VISITS, visit("v4"), visit("v1")),
                  lambda change: (change.insert(VISITS, visit("v4")), change.update(VISITS, {"guests": 1}, visit="v9"))):
        with pytest.raises(StaleWrite), ledger.change("visit.spoilt", "v4", tables=(VISITS,)) as change:
            wrong(change)
    assert len(ledger.rows(VISITS)) == 3 and len(ledger.events()) == 1
    assert verify_chain(ledger).ok


def write_visits(settings: Settings) -> str:
    ledger = open_ledger(settings)
    for number in range(5):
        with ledger.change("visit.made", f"{os.getpid()}-{number}", tables=(VISITS,)) as change:
            change.insert(VISITS, visit(f"{os.getpid()}-{number}"))
    return "done"


def test_first_starts_and_writers_at_once_lose_nothing(settings):
    assert at_once(16, lambda: write_visits(settings)) == ["done"] * 16
    ledger = open_ledger(settings)
    assert len(ledger.rows(VISITS)) == len(ledger.events()) == 80
    assert verify_chain(ledger).ok


# --- uplift -----------------------------------------------------------------------------------------------------------


def test_a_planted_effect_is_recovered_from_the_ledger(tmp_path):
    ledger = open_ledger(Settings(tmp_path, actor="test"))
    noise = np.random.default_rng(3)
    for month in range(4, 13):
        window = f"2013-{month:02}"
        frame = scored(seed=month)
        frame["prediction_id"] = window + " " + frame.prediction_id
        chosen = decide(frame, POLICY, VALUE)
        log_decisions(ledger, NAME, window, chosen, POLICY)
        # each warning prevents one lateness in four, and one flight in fifty is cancelled
        late = (noise.random(len(chosen)) < chosen.score).astype(float)
        late[(chosen.arm == "treated") & (noise.random(len(chosen)) < 0.25)] = 0
        late[noise.random(len(chosen)) < 0.02] = np.nan
        known = record_outcomes(ledger, NAME, window, pd.Series(late.to_numpy(), index=chosen.prediction_id), VALUE)
        assert known == late.notna().sum()
    rows = pd.DataFrame(ledger.rows(DECISIONS))
    treated, held_out = (rows.outcome[rows.arm == arm] for arm in ("treated", "hold-out"))
    truth = -0.25 * rows.score.mean()
    found = uplift(treated, held_out)
    assert found.low <= truth <= found.high < 0, (found, truth)
    assert found.treated + found.held_out == rows.outcome.notna().sum() < len(rows)
    acted = rows.arm == "treated"
    assert rows.expected.sum() == pytest.approx(expected_benefit(rows.score, acted, VALUE))
    assert rows.value.sum() == pytest.approx(benefit(rows.outcome, acted, VALUE))


@pytest.mark.parametrize("effect", [0.0, -0.15])
def test_the_interval_covers_the_truth_as_often_as_it_says(effect):
    noise = np.random.default_rng(11)
    rate, treated, held_out, repeats = 0.5, 1200, 130, 300
    covered = excluded = 0
    for _ in range(repeats):
        found = uplift(noise.random(treated) < rate + effect, noise.random(held_out) < rate)
        covered += found.low <= effect <= found.high
        excluded += found.low > 0 or found.high < 0
    assert 0.92 <= covered / repeats <= 0.98, covered / repeats
    if effect:
        assert excluded / repeats > 0.8  # the power that these sizes have
    else:
        assert excluded / repeats < 0.08
