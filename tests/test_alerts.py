"""Alerts reach people: a real mail server and a real receiver, down, slow and killed between, and no secret on the way."""

import email
import json
import os
import signal
import subprocess
import sys
import threading
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller

from aiexec.monitor.actions import acknowledge, assign, mute, resolve
from aiexec.monitor.alerts import NOTICES, alerts, close_alert, follow, open_alert
from aiexec.monitor.channels import channel, send
from aiexec.monitor.costs import WeeklyCost
from aiexec.monitor.telling import DELIVERIES, after_verb, deliver, waiting
from aiexec.monitor.watch import judge, record
from aiexec.define.usecase import load_usecase
from aiexec.errors import AiexecError, DeliveryError
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import aiexec, environment

NAME, CAUSE = "late_orders", "performance.roc_auc"
SECRET = "Tr0ub4dor-canary"
USECASE = """
name: late_orders
title: Warn of late orders
department: logistics
owner: ada@example.org
risk: minimal
success: [{metric: roc_auc, at_least: 0.6}]
value: {currency: EUR, true_positive: 5, false_positive: -1, false_negative: 0, true_negative: 0}
pipeline: {}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A project with one use case and no channel."""
    (tmp_path / "settings.ini").write_text("[aiexec]\nactor = ada@example.org\n", encoding="utf-8")
    (tmp_path / "usecases" / NAME).mkdir(parents=True)
    (tmp_path / "usecases" / NAME / "usecase.yaml").write_text(USECASE, encoding="utf-8")
    return tmp_path


def told_by(project: Path, *channels: str):
    """The ledger of the project, whose people are told by these channels."""
    lines = "".join(f"\n  {one}" for one in channels)
    (project / "settings.ini").write_text(f"[aiexec]\nactor = ada@example.org\nalert_channels ={lines}\n", encoding="utf-8")
    return open_ledger(load_settings(project))


def breach(ledger, window: str = "2024-05", sentence: str = "roc_auc ≥ 0.6: missed in 2 of 3 windows.", **facts) -> str:
    return open_alert(ledger, NAME, CAUSE, window, sentence, "ada@example.org", **facts)["alert"]


class Receiver:
    """A web server that takes messages, in several moods."""

    def __init__(self):
        self.came, self.mood, self.freed = [], "well", threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                text = self.rfile.read(int(self.headers["Content-Length"])).decode()
                receiver.came.append((self.path, json.loads(text)))
                if receiver.mood == "hangs":
                    receiver.freed.wait(60)
                self.send_response({"ill": 500, "elsewhere": 307}.get(receiver.mood, 200))
                self.send_header("Location", f"http://127.0.0.1:{receiver.port}/caught")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):  # whoever gave up is not there to be answered
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def url(self, path: str = SECRET) -> str:
        return f"json://127.0.0.1:{self.port}/{path}"

    def close(self):
        self.freed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    one = Receiver()
    yield one
    one.close()


class Mailbox:
    def __init__(self):
        self.came = []

    async def handle_DATA(self, server, session, envelope):
        self.came.append((envelope.rcpt_tos, email.message_from_bytes(envelope.content, policy=default)))
        return "250 OK"


class FreePort(Controller):
    """A mail server on whichever port is free."""

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()


@pytest.fixture
def post():
    box = Mailbox()
    controller = FreePort(box, hostname="127.0.0.1", port=0, ready_timeout=60)
    controller.start()
    box.port = controller.port
    yield box
    controller.stop()


def everything(project: Path) -> bytes:
    """All that is kept of a project, but for what a person wrote into settings.ini."""
    return b"".join(path.read_bytes() for path in project.rglob("*") if path.is_file() and path.name != "settings.ini")


def test_mail_and_chat_bring_what_since_when_the_cost_the_owner_and_the_next_step(project, receiver, post):
    ledger = told_by(project, f"mailto://127.0.0.1:{post.port}?from=aiexec@example.org&to=ops@example.org", receiver.url())
    cost = WeeklyCost(1234.0, 900.0, 1600.0, "EUR", "measured on labels.")
    name = breach(ledger, cost=cost)
    assert [(one.delivered, one.waiting) for one in deliver(ledger)] == [(1, 0), (1, 0)]
    (receivers, mail), = post.came
    (_, chat), = receiver.came
    assert receivers == ["ops@example.org"]
    for title, text in [(mail["Subject"], mail.get_body(("plain", "html")).get_content()), (chat["title"], chat["message"])]:
        assert f"{NAME}: {CAUSE} needs action" in title
        for words in ("missed in 2 of 3 windows", "Since: 2024-05", "about EUR 1,234 a week (95 %: 900 to 1,600)",
                      "Owner: ada@example.org", f"aiexec alerts {NAME} --acknowledge {name}"):
            assert words in text, text


def test_a_change_is_told_once_and_a_window_is_not(project, receiver):
    ledger = told_by(project, receiver.url())
    for window, sentence, extent in [("2024-05", "Missed twice.", 2), ("2024-06", "Missed twice, elsewhere.", 2),
                                     ("2024-07", "Missed in all.", 3), ("2024-08", "Missed twice again.", 2), ("2024-09", "All again.", 3)]:
        name = breach(ledger, window, sentence, extent=extent)
        deliver(ledger)
    close_alert(ledger, NAME, name, "2024-11", "Held in all.")
    for _ in range(3):
        deliver(ledger)
    assert [chat["title"].split("roc_auc ")[1] for _, chat in receiver.came] == ["needs action", "got worse", "is over"]
    breach(ledger, "2025-01", "Missed once more.", extent=2)
    deliver(ledger)
    assert receiver.came[-1][1]["title"].endswith("is back") and len(alerts(ledger)) == 1


def test_the_whole_way_from_figures_to_a_price(project, receiver):
    ledger, case = told_by(project, receiver.url()), load_usecase(NAME, load_settings(project))
    for number, (auc, worth) in enumerate([(0.66, 500), (0.66, 500), (0.66, 500), (0.55, 200), (0.54, 200)], 1):
        window = f"2024-0{number}"
        record(ledger, NAME, window, "performance", [{"name": "roc_auc", "value": auc}, {"name": "value_per_1000", "value": worth}])
        record(ledger, NAME, window, "volume", [{"name": "rows", "value": 6100}])
        follow(case, ledger, judge(case, ledger, f"2024-0{number + 1}"))
    deliver(ledger)
    (_, chat), = receiver.came
    assert "Cost: about EUR 420 a week: a thousand decisions brought 500 EUR in 2024-01 to 2024-03 and 200 in 2024-04 to 2024-05" in chat["message"]


@pytest.mark.parametrize("mood, words", [("ill", "error=500"), ("elsewhere", "error=307"), ("hangs", "did not take the message")])
def test_a_sick_receiver_is_said_and_tried_again(project, receiver, mood, words):
    ledger = told_by(project, receiver.url())
    breach(ledger)
    receiver.mood = mood
    one, = deliver(ledger, each=1.0)
    assert (one.delivered, one.waiting, one.attempts) == (0, 1, 1) and words in one.error
    assert "/caught" not in [path for path, _ in receiver.came], "a redirect was followed"
    assert deliver(ledger, patient=False)[0].error.startswith("It is tried again after")
    receiver.mood, before = "well", len(receiver.came)
    receiver.freed.set()
    assert [str(one) for one in deliver(ledger)] == [f"{channel(receiver.url(), ledger).name}: 1 delivered, 0 waiting."]
    assert len(receiver.came) == before + 1 and deliver(ledger) == []
    row, = ledger.rows(DELIVERIES)
    assert (row["attempts"], row["error"]) == (2, "") and row["delivered"]


def test_down_and_up_again_in_order_and_the_other_channel_is_not_told_twice(project, receiver, monkeypatch):
    gone = Receiver()
    gone.close()
    monkeypatch.setenv("OPS_HOOK", gone.url())
    ledger = told_by(project, receiver.url(), "env:OPS_HOOK")
    name = breach(ledger, extent=2)
    deliver(ledger)
    breach(ledger, "2024-06", "Missed in all.", extent=3)
    close_alert(ledger, NAME, name, "2024-08", "Held in all.")
    now = {one.channel: one for one in deliver(ledger)}
    down = now.pop("env:OPS_HOOK")
    assert ([one.delivered for one in now.values()], down.waiting, down.attempts) == ([2], 3, 2)
    monkeypatch.setenv("OPS_HOOK", receiver.url("second"))
    assert [one.delivered for one in deliver(ledger)] == [3]
    assert [chat["title"].split("roc_auc ")[1] for path, chat in receiver.came if path == "/second"] == ["needs action", "got worse", "is over"]
    assert len(receiver.came) == 6


def test_a_wrong_address_is_said_without_its_secret_and_when_mended_nothing_is_lost(project, receiver, capsys, caplog):
    caplog.set_level(1)
    ledger = told_by(project, f"nonsense://{SECRET}", SECRET, f"slack://{SECRET}")
    breach(ledger)
    told = deliver(ledger)
    assert [one.waiting for one in told] == [1, 1, 1] and all("no address that Apprise knows" in one.error for one in told)
    assert len({one.channel for one in told}) == 3
    out = aiexec("alerts", "--deliver", cwd=project)
    assert out.returncode == 1 and "no address that Apprise knows" in out.stdout
    assert SECRET not in out.stdout + out.stderr + str(told) + caplog.text + "".join(capsys.readouterr())
    assert SECRET.encode() not in everything(project)
    ledger = told_by(project, receiver.url())
    assert [one.delivered for one in deliver(ledger)] == [1] and waiting(ledger) == []


@pytest.mark.parametrize("form", ["env", "file", "within"])
def test_a_referenced_secret_shows_nowhere(project, receiver, form, monkeypatch, caplog, capsys):
    caplog.set_level(1)
    monkeypatch.setenv("OPS_SECRET", SECRET if form == "within" else receiver.url())
    (project / "hook.secret").write_text(receiver.url(), encoding="utf-8")
    (project / "hook.secret").chmod(0o600)
    written = {"env": "env:OPS_SECRET", "file": "file:hook.secret",
               "within": f"json://bot:{{env:OPS_SECRET}}@127.0.0.1:{receiver.port}/{{env:OPS_SECRET}}"}[form]
    ledger = told_by(project, written)
    name = breach(ledger)
    for mood in ("ill", "well"):
        receiver.mood = mood
        told = deliver(ledger)
    assert receiver.came[-1][0] == f"/{SECRET}" and told[0].delivered == 1
    close_alert(ledger, NAME, name, "2024-07", "Held.")
    receiver.mood = "ill"
    env = {} if form == "file" else {"OPS_SECRET": os.environ["OPS_SECRET"]}
    shown = aiexec("alerts", "--deliver", cwd=project, **env)
    assert shown.returncode == 1 and "error=500" in shown.stdout
    looked = aiexec("doctor", cwd=project, **env) if form == "within" else shown
    assert looked.returncode == 1 and (form != "within" or "aiexec alerts --deliver" in " ".join(looked.stdout.split()))
    everywhere = [shown.stdout, shown.stderr, looked.stdout, looked.stderr, str(told), caplog.text, *capsys.readouterr()]
    assert SECRET not in "".join(everywhere)
    (project / "hook.secret").unlink()
    assert SECRET.encode() not in everything(project)


def test_a_missing_reference_is_named(project):
    ledger = told_by(project, "env:NEVER_SET", "file:nowhere.txt")
    breach(ledger)
    assert [one.error for one in deliver(ledger)] == ["The secret env:NEVER_SET is missing.", "The secret file:nowhere.txt is missing."]


KILLED = """
import os, signal, sys
from aiexec.monitor import telling
from aiexec.settings import load_settings
from aiexec.store import open_ledger

before = telling.send
def send_and_die(*words):
    before(*words)
    os.kill(os.getpid(), signal.SIGKILL)
telling.send = send_and_die
telling.deliver(open_ledger(load_settings()))
"""


def test_killed_between_sending_and_marking_it_is_sent_again(project, receiver):
    ledger = told_by(project, receiver.url())
    breach(ledger)
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=project, env=environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL and len(receiver.came) == 1 and ledger.rows(DELIVERIES) == []
    assert [one.delivered for one in deliver(ledger)] == [1]
    assert len(receiver.came) == 2 and receiver.came[0] == receiver.came[1]


def test_two_deliveries_at_once_send_each_notice_once(project, receiver):
    ledger = told_by(project, receiver.url())
    for cause in ("a", "b", "c"):
        open_alert(ledger, NAME, cause, "2024-05", "Moved.", "ada@example.org")
    script = "from aiexec.monitor.telling import *; from aiexec.store import *; deliver(open_ledger())"
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=project, env=environment()) for _ in range(2)]
    assert [one.wait(120) for one in both] == [0, 0]
    assert sorted(chat["title"] for _, chat in receiver.came) == [f"{NAME}: {cause} needs action" for cause in "abc"]


def test_two_that_open_at_once_make_one_incident(project):
    script = "import sys; from aiexec.monitor.alerts import *; from aiexec.store import *; " \
             "open_alert(open_ledger(), 'late_orders', 'drift', '2024-05', 'Moved.', 'ada@example.org')"
    told_by(project, "env:NEVER_SET")
    both = [subprocess.Popen([sys.executable, "-c", script], cwd=project, env=environment()) for _ in range(4)]
    assert [one.wait(120) for one in both] == [0] * 4
    ledger = open_ledger(load_settings(project))
    assert len(alerts(ledger)) == len(ledger.rows(NOTICES)) == 1


def test_the_next_command_retries_and_the_exit_code_tells(project, receiver):
    ledger = told_by(project, receiver.url())
    receiver.mood = "ill"
    breach(ledger)
    first = aiexec("alerts", cwd=project)
    assert first.returncode == 0 and "was not told of 1" in first.stdout and "aiexec alerts --deliver" in first.stdout
    assert "It is tried again after" in after_verb(ledger)[0] and len(receiver.came) == 1, "the backoff was not kept"
    assert deliver(ledger)[0].attempts == 2
    receiver.mood = "well"
    ledger = open_ledger(load_settings(project))
    with ledger.change("test.clock", NAME, {}, (DELIVERIES,)) as change:
        change.update(DELIVERIES, {"next": "2020-01-01T00:00:00.000000Z"})
    assert "was not told" not in aiexec("alerts", cwd=project).stdout
    assert aiexec("alerts", "--deliver", cwd=project).returncode == 0 and len(receiver.came) == 3


def test_acting_is_for_those_who_may(project):
    path = project / "usecases" / NAME / "usecase.yaml"
    path.write_text(USECASE + "monitor: {people: [bo@example.org]}\n", encoding="utf-8")
    name = breach(open_ledger(load_settings(project)))
    done = aiexec("alerts", "--close", name, "--reason", "x", cwd=project, AIEXEC_ACTOR="eve@example.org")
    assert done.returncode == 1 and "eve@example.org may not close" in done.stderr, done.stdout
    ledger = open_ledger(load_settings(project))
    assert alerts(ledger)[0]["status"] == "open" and len(ledger.events(kind="alert.refused")) == 1
    path.write_text("name: [broken", encoding="utf-8")
    for action in (lambda: acknowledge(ledger, NAME, name), lambda: mute(ledger, NAME, name, "7d"),
                   lambda: resolve(ledger, NAME, name, "x"), lambda: assign(ledger, NAME, name, "bo@example.org")):
        with pytest.raises(AiexecError):
            action()
    assert alerts(ledger)[0]["history"][1:] == [], "who may act cannot be read, so nobody may"


def test_an_alert_closed_by_hand_stays_closed_for_its_windows(project):
    ledger, case = open_ledger(load_settings(project)), load_usecase(NAME, load_settings(project))
    for number, auc in enumerate([0.55, 0.55, 0.55, 0.55], 1):
        record(ledger, NAME, f"2024-0{number}", "performance", [{"name": "roc_auc", "value": auc}])
    alert, = follow(case, ledger, judge(case, ledger, "2024-04"))
    resolve(ledger, NAME, alert["alert"], "known: a strike")
    assert follow(case, ledger, judge(case, ledger, "2024-04"))[0]["status"] == "closed"
    again, = follow(case, ledger, judge(case, ledger, "2024-05"))
    assert (again["alert"], again["status"], again["closed"]) == (alert["alert"], "open", None)


def test_an_alert_that_hovers_about_its_line_stays_open_until_it_is_clear_of_it(project):
    ledger, case = open_ledger(load_settings(project)), load_usecase(NAME, load_settings(project))
    for number, auc in enumerate([0.55, 0.55, 0.55, 0.601, 0.602, 0.601, 0.61, 0.61, 0.61], 1):
        record(ledger, NAME, f"2024-{number:02d}", "performance", [{"name": "roc_auc", "value": auc}])
        follow(case, ledger, judge(case, ledger, f"2024-{number + 1:02d}"))
    alert, = alerts(ledger)
    assert (alert["opened"], alert["closed"]) == ("2024-03", "2024-10") or (alert["opened"], alert["closed"]) == ("2024-04", "2024-10")


def test_a_hanging_receiver_does_not_hold_a_command(project, receiver):
    receiver.mood = "hangs"
    ledger = told_by(project, receiver.url())
    breach(ledger)
    with pytest.raises(DeliveryError):
        send(channel(receiver.url(), ledger), "Title", "Text", ledger, seconds=0.5)
    done = aiexec("alerts", cwd=project, timeout=120)
    assert done.returncode == 0 and "was not told of 1" in done.stdout
    assert not receiver.freed.is_set(), "the command ended while the receiver still hung"


def test_monitor_is_an_assertion_over_what_is_kept(project):
    ledger = open_ledger(load_settings(project))
    for number, auc in enumerate([0.66, 0.55, 0.55], 1):
        record(ledger, NAME, f"2024-0{number}", "performance", [{"name": "roc_auc", "value": auc}])
    done = aiexec("monitor", "--json", cwd=project)
    data = json.loads(done.stdout)
    assert (done.returncode, data["verdict"], data["window"], data["alerts"]) == (1, "act", "2024-04", [])
    assert data["reasons"] == ["roc_auc ≥ 0.6: missed in 2 of 3 windows: 2024-02 (0.55), 2024-03 (0.55)."]
    open_alert(ledger, NAME, "drift", "2024-04", "Unused columns moved.", "ada@example.org", "watch")
    for month, auc in (("2024-04", 0.66), ("2024-05", 0.66), ("2024-06", 0.66)):
        record(ledger, NAME, month, "performance", [{"name": "roc_auc", "value": auc}])
    done = aiexec("monitor", "--json", cwd=project)
    assert (done.returncode, json.loads(done.stdout)["verdict"]) == (0, "watch"), "what is only watched does not fail a build"


def test_without_a_channel_nothing_waits(project):
    ledger = open_ledger(load_settings(project))
    breach(ledger)
    assert ledger.rows(NOTICES) == [] and deliver(ledger) == []


def test_a_use_case_may_have_channels_of_its_own(project, receiver):
    path = project / "usecases" / NAME / "usecase.yaml"
    path.write_text(USECASE + f'monitor: {{channels: ["{receiver.url("own")}"]}}\n', encoding="utf-8")
    ledger = told_by(project, receiver.url("project"))
    breach(ledger)
    open_alert(ledger, "another", "drift", "2024-05", "Moved.", "bo@example.org")
    deliver(ledger)
    assert sorted(path for path, _ in receiver.came) == ["/own", "/project"]


def test_hostile_words_stay_in_their_line(project, receiver, post):
    ledger = told_by(project, receiver.url(), f"mailto://127.0.0.1:{post.port}?from=a@example.org&to=ops@example.org")
    open_alert(ledger, NAME, "x\r\nBcc: eve@example.org", "2024-05", "a\r\nOwner: eve\x00 <b>&amp;{{7*7}}", "ada@example.org")
    assert [one.delivered for one in deliver(ledger)] == [1, 1]
    (receivers, mail), = post.came
    assert receivers == ["ops@example.org"] and mail["Bcc"] is None
    assert [line for line in receiver.came[0][1]["message"].splitlines() if line.startswith("Owner")] == ["Owner: ada@example.org"]
