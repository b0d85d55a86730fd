"""A month in production on PostgreSQL is the month it is on SQLite: ledger and operations database both on a server."""

import json
from pathlib import Path

import pytest

from aiexec.decide.outbox import OUTBOX
from aiexec.decide.sql import SqlReceiver
from aiexec.govern.audit import verify_chain
from aiexec.run.records import STEPS
from aiexec.settings import Settings, load_settings
from aiexec.store import connect, open_ledger, sa

from .conftest import aiexec, answer, new_database

TABLE = SqlReceiver("sqlite://").table


@pytest.fixture(scope="module")
def urls(server) -> dict[str, str]:
    return {"AIEXEC_STORE": new_database(server, "year_ledger"), "AIEXEC_OPERATIONS": new_database(server, "year_operations")}


@pytest.fixture(scope="module")
def lived(urls, tmp_path_factory) -> Path:
    """The same project as `month`, with its records on the server."""
    place = tmp_path_factory.mktemp("postgres")
    done = aiexec("demo", "flights", "--fast", "--until", "2013-04", "--json", cwd=place, **urls)
    assert done.returncode == 0, done.stderr
    (place / "printed.json").write_text(done.stdout, encoding="utf-8")
    return place / "flights"


def received(engine: sa.Engine) -> list[dict]:
    with engine.connect() as connection:
        return sorted((dict(row) for row in connection.execute(sa.select(TABLE)).mappings()), key=lambda row: row["message"])


def at(project: Path, urls: dict[str, str]) -> Settings:
    return Settings(project, store=urls["AIEXEC_STORE"], operations=urls["AIEXEC_OPERATIONS"])


def test_the_month_is_the_same(lived, month):
    here, there = (json.loads((project.parent / "printed.json").read_text(encoding="utf-8"))["months"] for project in (lived, month))
    assert [row["window"] for row in here] == ["2013-04"] and here[0]["realised"] is not None
    assert here == there


def test_the_records_are_on_the_server_and_nowhere_else(lived, urls, month):
    assert not list(lived.rglob("ledger.db")) and not list(lived.rglob("operations.db"))
    ledger, other = open_ledger(at(lived, urls)), open_ledger(load_settings(month))
    assert verify_chain(ledger).ok
    assert [event.kind for event in ledger.events()] == [event.kind for event in other.events()]
    done = [[(row["step"], row["partition"]) for row in one.rows(STEPS, order="started", status="done")] for one in (ledger, other)]
    assert done[0] == done[1] and len(done[0]) > 8


def test_the_decisions_are_in_the_operations_database(lived, urls, month):
    here, there = received(connect(urls["AIEXEC_OPERATIONS"])), received(connect(load_settings(month).url("operations")))
    sent = open_ledger(at(lived, urls)).rows(OUTBOX, order="message", status="delivered")
    assert len(here) > 200 and [row["message"] for row in here] == [row["message"] for row in sent]
    assert [(row["prediction_id"], row["action"], row["score"]) for row in here] == [(row["prediction_id"], row["action"], row["score"]) for row in there]


def test_the_verbs_read_from_the_server(lived, urls, month):
    told = aiexec("roi", "--json", cwd=lived, **urls)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == answer("roi", cwd=month)
    assert aiexec("doctor", cwd=lived, **urls).returncode == 0
    again = aiexec("deliver", "--json", cwd=lived, **urls)
    assert again.returncode == 0 and json.loads(again.stdout)["delivered"] == 0
