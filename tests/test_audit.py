"""The chain of events: whatever is changed behind the ledger's back is found, and honest crashes are not taken for fraud."""

import json
import multiprocessing
import random
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aiexec.errors import ParameterError
from aiexec.govern.audit import verify_chain
from aiexec.settings import Settings
from aiexec.store import EVENTS, Event, Ledger, canonical, declare, open_ledger

VISITS = declare("visits", key=("visit",), visit="text", guests="int")
MANY = 12


def visited(ledger: Ledger, number: int) -> None:
    with ledger.change("visit.made", f"v{number}", {"guests": number, "at": "Café ☕"}, (VISITS,)) as change:
        change.insert(VISITS, {"visit": f"v{number}", "guests": number})


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.delenv("AIEXEC_LEDGER_KEY", raising=False)
    ledger = open_ledger(Settings(tmp_path, actor="ada"))
    for number in range(1, MANY + 1):
        visited(ledger, number)
    assert verify_chain(ledger).ok
    return ledger


def rewrite(ledger: Ledger, rows: list[dict], head: str | None = None) -> None:
    """Put other events in the place of those that are there."""
    with ledger.engine.begin() as connection:
        connection.execute(EVENTS.delete())
        if rows:
            connection.execute(EVENTS.insert(), rows)
    if head is not None:
        head_file(ledger).write_text(head)


def head_file(ledger: Ledger) -> Path:
    return ledger.settings.home / "ledger.head"


def problems(ledger: Ledger, anchor: str = "") -> str:
    audit = verify_chain(ledger, anchor)
    assert audit.ok == (not audit.findings)
    return " ".join(map(str, audit.findings))


def test_every_edit_of_every_column_of_every_event_is_found(ledger):
    rows, lot = ledger.rows(EVENTS, order="seq"), random.Random(1)
    for place in range(MANY):
        for column in rows[0]:
            was = rows[place][column]
            if column == "seq":
                changed = was + MANY
            elif column == "body":
                changed = canonical(json.loads(was) | {"guests": 99})
            else:  # one character becomes another one
                spot = lot.randrange(len(was))
                changed = was[:spot] + chr(ord(was[spot]) ^ 1) + was[spot + 1 :]
            rewrite(ledger, [row | {column: changed} if row is rows[place] else row for row in rows])
            assert problems(ledger), f"{column} of event {place + 1}"
    rewrite(ledger, rows)
    assert verify_chain(ledger).ok


@pytest.mark.parametrize("body", ["", "no json", "[]", '{"guests":3,"guests":3}', '{"at": "Café ☕", "guests": 3}', "null"])
def test_a_body_that_reads_the_same_or_not_at_all_is_found_too(ledger, body):
    rows = ledger.rows(EVENTS, order="seq")
    rows[2]["body"] = body
    rewrite(ledger, rows)
    assert problems(ledger).startswith("Event 3 (visit.made v3, ")


@pytest.mark.parametrize("place", range(MANY - 1))
def test_a_deleted_event_is_found(ledger, place):
    rows = ledger.rows(EVENTS, order="seq")
    rewrite(ledger, rows[:place] + rows[place + 1 :])
    assert f"Event {place + 1} is missing before event {place + 2}." in problems(ledger)


def test_a_gap_that_was_closed_by_renumbering_is_found(ledger):
    rows = ledger.rows(EVENTS, order="seq")
    shorter = rows[:4] + rows[5:]
    rewrite(ledger, [row | {"seq": number} for number, row in enumerate(shorter, 1)])
    assert "Event 5 does not follow the one before it." in problems(ledger)


def test_two_events_that_changed_places_are_found(ledger):
    rows = ledger.rows(EVENTS, order="seq")
    rows[3]["seq"], rows[4]["seq"] = 5, 4
    rewrite(ledger, rows)
    assert "Event 4" in problems(ledger)


@pytest.mark.parametrize("left", range(MANY))
def test_a_tail_that_was_cut_off_is_found(ledger, left):
    rewrite(ledger, ledger.rows(EVENTS, order="seq")[:left])
    assert problems(ledger) == f"The tail is cut: ledger.head knows event {MANY}, but the chain ends at {left}."


def resealed(rows: list[dict], key: bytes) -> list[dict]:
    """A chain that is whole in itself under a key."""
    previous, made = "0" * 64, []
    for number, row in enumerate(rows, 1):
        event = Event(**row | {"seq": number, "previous": previous, "body": json.loads(row["body"])})
        event = replace(event, hash=event.sealed(key))
        made.append(asdict(event) | {"body": canonical(event.body)})
        previous = event.hash
    return made


def test_a_chain_rewritten_without_the_key_is_found(ledger):
    rows = ledger.rows(EVENTS, order="seq")
    assert resealed(rows, ledger.key) == rows  # the attack would be perfect with the key
    forged = resealed(rows[:5] + rows[6:], b"not the key")
    rewrite(ledger, forged, head=f"{len(forged)} {forged[-1]['hash']}\n")
    assert len(verify_chain(ledger).findings) >= len(forged)


def test_an_event_added_without_the_key_is_found(ledger):
    rows = ledger.rows(EVENTS, order="seq")
    added = resealed([*rows, rows[0]], b"not the key")[-1] | {"previous": rows[-1]["hash"]}
    rewrite(ledger, [*rows, added], head=f"{added['seq']} {added['hash']}\n")
    assert problems(ledger).startswith(f"Event {MANY + 1} (visit.made")


@pytest.mark.parametrize("head, words", [
    ("", "missing or empty"), ("garbage", "is no head"), ("-1 " + "a" * 64, "is no head"), ("\x00\x01", "is no head"),
    (f"{MANY} {'a' * 64}", f"Event {MANY} is not the one that ledger.head knows"),
    (f"{MANY + 5} {'a' * 64}", "The tail is cut"), (f"0 {'0' * 64}", "Event 0 is not the one"), ("² " + "a" * 64, "is no head"),
])
def test_a_forged_head_is_found(ledger, head, words):
    head_file(ledger).write_text(head)
    assert words in problems(ledger)


def test_a_head_that_is_gone_is_found(ledger):
    head_file(ledger).unlink()
    assert "ledger.head is missing" in problems(ledger)


def test_a_head_kept_elsewhere_finds_what_was_set_back_as_a_whole(ledger):
    kept, early = verify_chain(ledger).head, head_file(ledger).read_text()
    for number in range(MANY + 1, MANY + 4):
        visited(ledger, number)
    assert verify_chain(ledger, kept).ok  # a chain may go on from an anchor
    late = verify_chain(ledger).head
    rewrite(ledger, ledger.rows(EVENTS, order="seq")[:MANY], head=early)
    assert f"the anchor knows event {MANY + 3}" in problems(ledger, late)
    rewrite(ledger, [], head="")
    assert "the chain ends at 0" in problems(ledger, late)
    with pytest.raises(ParameterError, match="is no head"):
        verify_chain(ledger, "12")


def test_a_key_that_was_swapped_is_found(ledger):
    (ledger.settings.home / "ledger.key").write_text("a" * 64)
    assert len(verify_chain(open_ledger(ledger.settings)).findings) == MANY


def test_a_crash_before_the_head_was_written_is_no_fraud(ledger):
    before = head_file(ledger).read_text()
    visited(ledger, 99)
    head_file(ledger).write_text(before)
    assert verify_chain(ledger).ok


def test_an_audit_changes_nothing_and_an_empty_chain_is_sound(ledger, tmp_path):
    before = {path: path.read_bytes() for path in ledger.settings.home.rglob("*") if path.is_file()}
    verify_chain(ledger)
    assert {path: path.read_bytes() for path in ledger.settings.home.rglob("*") if path.is_file()} == before
    assert verify_chain(open_ledger(Settings(tmp_path / "young", actor="ada"))).ok


def test_writers_killed_at_random_leave_a_sound_chain(ledger):
    lot, fork, killed, next_visit = random.Random(3), multiprocessing.get_context("fork"), 0, 1000

    def write(first: int) -> None:
        mine = open_ledger(ledger.settings)
        for number in range(first, first + 1_000_000):
            visited(mine, number)

    for _ in range(12):
        victim = fork.Process(target=write, args=(next_visit,))
        victim.start()
        victim.join(lot.uniform(0.05, 0.2))
        victim.kill()
        victim.join(30)
        killed += victim.exitcode == -signal.SIGKILL
        assert verify_chain(ledger).ok
        next_visit += 1_000_000
    assert killed == 12
    events = ledger.events()
    assert len(events) == len(ledger.rows(VISITS)) > MANY  # each row has its event and each event its row
