"""Webhooks against receivers that redirect, hang, never end, fail and come back; and against a sender that is killed."""

import calendar
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from standardwebhooks.webhooks import Webhook

from aiexec.govern.audit import verify_chain
from aiexec.model.webhooks import add_webhook, deliver, webhooks
from aiexec.settings import Settings
from aiexec.store import open_ledger

from .conftest import aiexec


class Receiver:
    "A receiver on this machine that keeps what it was sent, and behaves as it is told to."

    def __init__(self):
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((dict(self.headers), body))
                receiver.behave(self)

            def log_message(self, *_):
                pass

        self.got, self.statuses, self.behave = [], [], self.answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, **headers) -> None:
        handler.send_response(self.statuses.pop(0) if self.statuses else 200)
        for name, value in {"Content-Length": "0", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.got]


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def ledger(tmp_path):
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    return open_ledger(Settings(tmp_path, actor="ada"))


def moved(ledger, version: int) -> None:
    with ledger.change("alias.moved", "flights champion", {"version": version}):
        pass


def test_what_arrives_is_signed_as_the_standard_says(ledger, receiver):
    hook, secret = add_webhook(ledger, receiver.url, ["alias.moved"], private=True)
    moved(ledger, 2)
    assert [one.delivered for one in deliver(ledger)] == [1]
    headers, body = receiver.got[0]
    told = Webhook(secret).verify(body, headers)
    assert told["type"] == "alias.moved" and told["data"]["version"] == 2
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(secret).verify(body.replace(b":2", b":3"), headers)
    assert secret not in (ledger.settings.home / "ledger.db").read_bytes().decode("latin-1")
    assert (ledger.settings.root / hook.secret.removeprefix("file:")).stat().st_mode & 0o777 == 0o600


def test_500_then_200_is_one_message_under_one_id(ledger, receiver):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    receiver.statuses = [500, 200]
    moved(ledger, 2)
    assert [(one.delivered, one.waiting) for one in deliver(ledger)] == [(1, 0)]
    assert len(receiver.got) == 2 and len(set(receiver.ids())) == 1


def test_a_redirect_is_not_followed_and_is_said(ledger, receiver):
    aside = Receiver()
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    receiver.statuses = [307] * 9
    receiver.behave = lambda handler: receiver.answer(handler, Location=aside.url)
    moved(ledger, 2)
    told = deliver(ledger)[0]
    assert (told.delivered, told.waiting, aside.got) == (0, 1, []) and "redirects, which is not followed" in told.error
    assert "redirects" in webhooks(ledger)[0].last_error
    receiver.statuses, receiver.behave = [], receiver.answer
    assert deliver(ledger)[0].delivered == 1 and len(set(receiver.ids())) == 1
    aside.server.shutdown()
    aside.server.server_close()


def hang(handler) -> None:
    handler.connection.recv(1)


def endless(handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with_patience(handler, lambda: handler.wfile.write(b"x" * 65536))


def dripping(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    with_patience(handler, lambda: (handler.wfile.write(b"x"), time.sleep(0.05)))


def continuing(handler) -> None:
    with_patience(handler, lambda: handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n"))


def with_patience(handler, act) -> None:
    try:
        while True:
            act()
    except OSError:
        pass


@pytest.mark.parametrize("behave, seconds, delivered", [(hang, 1, 0), (endless, 30, 1), (dripping, 1, 0), (continuing, 1, 0)])
def test_a_receiver_that_holds_us_up_is_cut(ledger, receiver, behave, seconds, delivered):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    receiver.behave = behave
    moved(ledger, 2)
    told = deliver(ledger, patient=False, seconds=seconds)[0]  # comes back at all: that is the test
    assert (told.delivered, told.waiting) == (delivered, 1 - delivered)
    assert bool(told.error) == (not delivered)


def test_the_order_is_kept_and_nothing_is_lost_in_a_long_outage(ledger, receiver):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    for version in range(45):
        moved(ledger, version)
    receiver.statuses = [200] * 30 + [503] * 3
    first = deliver(ledger, seconds=60)[0]
    assert (first.delivered, first.waiting) == (30, 15)
    assert deliver(ledger, patient=False)[0].delivered == 0  # it is left alone for a while
    assert deliver(ledger)[0].delivered == 15
    versions = [json.loads(body)["data"]["version"] for _, body in receiver.got]
    assert list(dict.fromkeys(versions)) == list(range(45))
    assert verify_chain(ledger).ok


def test_429_is_left_alone_as_long_as_it_asks(ledger, receiver):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    receiver.statuses = [429]
    receiver.behave = lambda handler: receiver.answer(handler, Retry_After="1800")
    moved(ledger, 2)
    before = time.time()
    deliver(ledger, patient=False)
    after = calendar.timegm(time.strptime(webhooks(ledger)[0].next[:19], "%Y-%m-%dT%H:%M:%S"))
    assert after - before > 1700


KILLED = """
import os, signal, sys
from aiexec.model import webhooks
from aiexec.settings import Settings
from aiexec.store import open_ledger
from pathlib import Path
webhooks.mark = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)
webhooks.deliver(open_ledger(Settings(Path(sys.argv[1]), actor="ada")))
"""


def test_a_sender_killed_between_sending_and_marking_sends_again_under_the_same_id(ledger, receiver):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    moved(ledger, 2)
    done = subprocess.run([sys.executable, "-c", KILLED, str(ledger.settings.root)], timeout=240)
    assert done.returncode == -signal.SIGKILL and len(receiver.got) == 1
    assert deliver(ledger)[0].delivered == 1
    assert len(receiver.got) == 2 and len(set(receiver.ids())) == 1
    assert deliver(ledger)[0].delivered == 0


def test_two_senders_at_once_lose_nothing(ledger, receiver):
    add_webhook(ledger, receiver.url, ["alias.*"], private=True)
    for version in range(10):
        moved(ledger, version)
    threads = [threading.Thread(target=deliver, args=(ledger,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    deliver(ledger)
    assert len(set(receiver.ids())) == 10 and webhooks(ledger)[0].tries == 0


def test_the_command_from_adding_to_removing(ledger, receiver):
    root = ledger.settings.root

    def typed(*words, code=0):
        done = aiexec("webhooks", *words, cwd=root)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "leads to 127.0.0.1, which is not sent to" in typed("add", receiver.url.replace("http", "https"), "--event", "alias.moved", code=1)
    assert "is not sent by http" in typed("add", receiver.url, "--event", "alias.moved", code=1)
    name = json.loads(typed("add", receiver.url, "--event", "alias.moved", "--allow-private", "--json"))["webhook"]
    assert "The receiver took it: 200." in typed("test", name)
    receiver.statuses = [500] * 3
    moved(ledger, 2)
    assert "The receiver answered 500." in typed("deliver", code=1)
    assert json.loads(typed("list", "--json"))[0]["waiting"] == 1
    assert "1 delivered, 0 waiting" in typed("deliver")
    typed("remove", name)
    assert "Webhooks: none yet." in typed("list")
