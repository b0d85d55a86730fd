"""The faces: help and plain data from every verb, months run by hand, champions moved, and JupyterLab on the project."""

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient
from mlflow import MlflowClient

from aiexec.cli.commands import main
from aiexec.decide.decisions import DECISIONS
from aiexec.decide.outbox import OUTBOX
from aiexec.govern.audit import verify_chain
from aiexec.model.registry import champion, history
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, answer, environment

NAME = "flight_delays"
ASKED = {"check": [], "runs": [], "models": [], "monitor": [], "alerts": [], "roi": [], "portfolio": [], "doctor": [], "verify": [],
         "audit": [], "deliver": ["--dry-run"]}


@pytest.fixture(scope="module")
def lived(year, tmp_path_factory) -> Path:
    """A copy of the year, to be worked in."""
    return shutil.copytree(year, tmp_path_factory.mktemp("faces") / "flights")


@pytest.fixture(scope="module")
def helps() -> dict[str, subprocess.CompletedProcess]:
    """The help of the command and of each verb."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(["", *main.commands], pool.map(lambda verb: aiexec(*verb.split(), "--help", cwd=Path.cwd()), ["", *main.commands])))


@pytest.mark.parametrize("verb", main.commands)
def test_every_verb_has_help(helps, verb):
    done = helps[verb]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: aiexec {verb} ") and "--json" in done.stdout and "--project" in done.stdout
    short = next(line.strip() for line in helps[""].stdout.splitlines() if line.startswith(f"  {verb} "))
    assert short.removeprefix(verb).strip() in " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def told(lived) -> dict[str, subprocess.CompletedProcess]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ASKED, pool.map(lambda verb: aiexec(verb, *ASKED[verb], "--json", cwd=lived), ASKED)))


@pytest.mark.parametrize("verb", ASKED)
def test_every_verb_tells_plain_data(told, verb):
    done = told[verb]
    data = json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert isinstance(data, (list, dict)) and "Traceback" not in done.stderr
    assert done.returncode == (1 if verb == "monitor" and data["alerts"] else 0), done.stderr


def test_plain_data_agrees_between_verbs(told):
    data = {verb: json.loads(done.stdout) for verb, done in told.items()}
    board = data["portfolio"][0]
    assert data["check"] == data["verify"] == [] and data["audit"]["ok"] and all(check["ok"] for check in data["doctor"])
    assert [row["version"] for row in data["models"]["versions"] if row["champion"]] == [board["champion"]]
    assert board["open_alerts"] == len(data["monitor"]["alerts"]) == len([row for row in data["alerts"] if row["status"] != "closed"])
    assert board["realised"] == pytest.approx(data["roi"]["realised"])
    assert len(data["runs"]) == 20 and data["runs"][0]["status"] == "done"
    assert data["deliver"]["would_send"] == [] and data["deliver"]["waiting"] == 0


def delivered(project: Path) -> dict:
    """Everything that was decided and sent, and what the receiver has."""
    ledger = open_ledger(load_settings(project))
    with sqlite3.connect(f"file:{project / '.aiexec' / 'operations.db'}?mode=ro", uri=True) as operations:
        received = operations.execute("SELECT * FROM warnings ORDER BY message").fetchall()
    decided = [{**row, "payload": None} for row in ledger.rows(DECISIONS, order="prediction_id")]
    return {"decided": decided, "sent": ledger.rows(OUTBOX, order="message"), "received": received}


def test_a_month_by_hand_changes_nothing_that_was_delivered(lived):
    before, month = delivered(lived), "2013-05"  # which an earlier champion scored
    assert len(before["received"]) > 9000
    for words in (["score", NAME, "--month", month], ["decide", "--month", month], ["run", NAME, "--only", "ingest", "-p", "month", month]):
        done = aiexec(*words, cwd=lived)
        assert done.returncode == 0 and "Run r" in done.stdout, done.stdout + done.stderr
    measured = aiexec("monitor", "--month", month, cwd=lived)
    assert measured.returncode == 1 and "Open alerts" in measured.stdout and "Traceback" not in measured.stderr, measured.stderr
    assert answer("deliver", cwd=lived)["delivered"] == 0
    assert delivered(lived) == before
    assert verify_chain(open_ledger(load_settings(lived))).ok


def test_the_champion_is_moved_back_and_forth(lived):
    settings = load_settings(lived)
    ledger, client = open_ledger(settings), MlflowClient(settings.url("tracking"))
    now = champion(NAME, ledger)
    earlier = history(NAME, ledger)[-1].previous
    assert earlier and earlier != now

    def agreed(version: int) -> bool:
        return champion(NAME, ledger) == version == int(client.get_model_version_by_alias(NAME, "champion").version)

    assert agreed(now)
    told = answer("rollback", NAME, "--reason", "the autumn is not the summer", cwd=lived)
    assert (told["champion"], told["previous"]) == (earlier, now) and agreed(earlier)
    assert answer("portfolio", cwd=lived)[0]["champion"] == earlier
    scored = answer("score", "--month", "2013-12", cwd=lived)["steps"]["score"]
    assert scored["status"] in ("done", "cached")
    told = answer("promote", NAME, now, "--reason", "it is the summer's after all", cwd=lived)
    assert (told["champion"], told["previous"]) == (now, earlier) and agreed(now)
    moves = history(NAME, ledger)[-2:]
    assert [move.reason for move in moves] == ["the autumn is not the summer", "it is the summer's after all"]
    assert all(move.actor for move in moves) and verify_chain(ledger).ok


@pytest.fixture(scope="module")
def lab(lived, tmp_path_factory):
    """JupyterLab as `aiexec lab` starts it: its address, its token, and where it keeps what kernels listen on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runtime = tmp_path_factory.mktemp("runtime")
    words = ["--no-browser", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=test"]
    words += ["--allow-root"] if os.geteuid() == 0 else []
    log = (runtime / "log").open("wb")
    serving = subprocess.Popen([AIEXEC, "lab", *words], cwd=lived / "usecases", stdout=log, stderr=log,
                               env=environment(JUPYTER_RUNTIME_DIR=str(runtime), PYTHONPATH=""))
    try:
        yield serving, f"http://127.0.0.1:{port}/api/", runtime
    finally:
        if serving.poll() is None:
            serving.kill()
        serving.wait(30)
        log.close()


def asked(address: str, data: dict | None = None, until: float = 60) -> dict:
    """What the server answers, once it is up."""
    end = time.monotonic() + until
    request = urllib.request.Request(address, json.dumps(data).encode() if data else None, {"Authorization": "token test"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert time.monotonic() < end, "JupyterLab does not answer"
            time.sleep(0.2)


def test_jupyterlab_opens_the_project(lab, lived):
    serving, address, runtime = lab
    book = asked(f"{address}contents/usecases/{NAME}/train.ipynb")
    assert book["type"] == "notebook" and book["writable"]
    assert "parameters" in [tag for cell in book["content"]["cells"] for tag in cell["metadata"].get("tags", [])]
    kernel = asked(f"{address}kernels", {"name": "python3", "path": f"usecases/{NAME}/train.ipynb"})
    client = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel['id']}.json"))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        seen = []
        code = "import os, flights.features as f; from aiexec.data.datasets import read\nprint(f.__file__, os.getcwd(), len(read('ingest.flights@2013-04')))"
        reply = client.execute_interactive(code, timeout=60, output_hook=lambda message: seen.append(message["content"].get("text", "")))
        assert reply["content"]["status"] == "ok", reply["content"]
        assert "".join(seen).split() == [str(lived / "flights" / "features.py"), str(lived / "usecases" / NAME), "28330"]
    finally:
        client.stop_channels()
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(30) == 0, (runtime / "log").read_text()
    assert not list(runtime.glob("kernel-*.json")) and not list(runtime.glob("jpserver-*.json"))
    assert "Traceback" not in (runtime / "log").read_text()
