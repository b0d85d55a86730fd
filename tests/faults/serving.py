"""Requests that nobody should send: mutated forms of both protocols, hostile values, torn HTTP. Never an error of the service."""

import copy
import http.client
import json
import random
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from aiexec.model.registry import promote, register
from aiexec.serve.predictions import predictions_folder, read_predictions
from aiexec.settings import Settings
from aiexec.store import open_ledger
from tests.faults.project import Outcome
from tests.faults.trial import Family

EACH = 1000  # requests of a case
ROW = {"hour": 7.5, "visib": 9.5, "seats": 150.0}
TENSOR = {"name": "rows", "shape": [1, 3], "datatype": "FP64", "data": list(ROW.values())}
COLUMN = [{"name": name, "shape": [1, 1], "datatype": "FP64", "data": [value]} for name, value in ROW.items()]
FORMS = [{"dataframe_split": {"columns": list(ROW), "data": [list(ROW.values())]}}, {"dataframe_records": [ROW]},
         {"instances": [list(ROW.values())]}, {"inputs": {name: [value] for name, value in ROW.items()}}, {"inputs": [ROW], "params": {}}]
INFER = [{"inputs": [TENSOR]}, {"inputs": COLUMN, "id": "a"}, {"inputs": [TENSOR], "outputs": [{"name": "output-0"}]},
         {"inputs": [TENSOR], "outputs": [{"name": "output-0", "parameters": {"binary_data": True}}]}]
HOSTILE = [None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**64, -2**63 - 1, 10**40, 1e308, -1e308, 5e-324, "", "x", "NaN", "1e999", "\0", "\x1b[31m",
           "x" * 10_000, "🛫", "\u202e", "__class__", "'; DROP TABLE events; --", "../../etc/passwd", "<script>", [], [[]], [[[[[]]]]], {}, {"": {}},
           {"hour": {"hour": {}}}, [None] * 1000, list(range(3)), ["7", "9", "1"]]
RAW = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b'"\\ud800"', b'"\\udfff\\ud800"', b"\xff\xfe", b"\0", b"[" * 3000, b"{" * 3000,
       b"9" * 5000, b"0x10", b"1_000", b"'x'", b"//", b"\xe2\x80\xa8", b"tru", b"nul", b'{"a":1,"a":2}']
PATHS = ["/invocations", "/v2/models/late/infer", "/v2/models/late/versions/1/infer", "/v2/models/late", "/v2", "/v2/", "/v2//", "/ping", "/ready",
         "/metrics", "/docs", "/openapi.json", "/version", "/%00", "/%ff", "/..%2f..", "/v2/models/%F0%9F%9B%AB/infer", "/invocations/", "//", "/" + "x" * 5000]
TYPES = ["application/json", "application/json; charset=utf-8", "text/csv", "text/csv; header=absent", "application/octet-stream", "x", "", "*/*",
         "multipart/form-data; boundary=x", "application/json; charset=utf-16"]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Where every part of plain data stands."""
    found = [path]
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(part, (*path, key))
    return found


def changed(form: dict, chance: random.Random) -> object:
    """Plain data with some parts replaced, left out, doubled or renamed."""
    made = copy.deepcopy(form)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        path = chance.choice(places(made))
        if not path:
            return chance.choice(HOSTILE)
        holder = made
        for key in path[:-1]:
            holder = holder[key]
        what = chance.randrange(4)
        if what == 0:
            del holder[path[-1]]
        elif what == 1 and isinstance(holder, list):
            holder.insert(path[-1], copy.deepcopy(holder[path[-1]]))
        elif what == 2 and isinstance(holder, dict):
            holder[chance.choice([name for name in HOSTILE if isinstance(name, str)])] = holder.pop(path[-1])
        else:
            holder[path[-1]] = copy.deepcopy(chance.choice(HOSTILE))
    return made


def torn(body: bytes, chance: random.Random) -> bytes:
    """Bytes with some changed, cut out, or something put between them."""
    made = bytearray(body)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = chance.randrange(len(made) + 1)
        what = chance.randrange(3)
        if what == 0 and at < len(made):
            made[at] = chance.randrange(256)
        elif what == 1:
            del made[at : at + chance.randrange(1, 20)]
        else:
            made[at:at] = chance.choice(RAW)
    return bytes(made)


def request(chance: random.Random) -> tuple[str, str, bytes, dict]:
    """Method, path, body and headers."""
    form = chance.choice(FORMS + INFER)
    path = "/v2/models/late/infer" if form in INFER else "/invocations"
    headers = {"content-type": "application/json"}
    body = json.dumps(changed(form, chance) if chance.random() < 0.6 else form).encode()
    if chance.random() < 0.15:
        body, path, headers = b",".join(name.encode() for name in ROW) + b"\n7.5,9.5,150\n", "/invocations", {"content-type": "text/csv"}
    elif path != "/invocations" and chance.random() < 0.3:
        raw = np.array(TENSOR["data"], "<f8").tobytes()
        told = {**TENSOR, "parameters": {"binary_data_size": chance.choice([24, 24, 23, -1, 2**40, "24"])}}
        told.pop("data")
        head = json.dumps({"inputs": [told]}).encode()
        body, headers = head + raw, {"inference-header-content-length": str(chance.choice([len(head)] * 3 + [0, -1, 10**30, "x"]))}
    body = torn(body, chance) if chance.random() < 0.4 else body
    if chance.random() < 0.1:
        headers["content-type"] = chance.choice(TYPES)
    if chance.random() < 0.1:
        headers |= chance.choice([{"content-encoding": "gzip"}, {"authorization": "Bearer \xff"}, {"x-prediction-key": "\xff" * 500},
                                  {"x-api-key": "aix_"}, {"expect": "100-continue"}, {"x-reasons": "true"}])
    path = chance.choice(PATHS) if chance.random() < 0.1 else path
    path += chance.choice(["?reasons=true", "?reasons=%ff", "?" + "a=b&" * 500, "?%"]) if chance.random() < 0.05 else ""
    return chance.choice(["GET", "PUT", "HEAD", "OPTIONS", "DELETE", "POST"]) if chance.random() < 0.08 else "POST", path, body, headers


def served(root: Path) -> tuple[subprocess.Popen, int]:
    """A project with a champion, and its service."""
    (root / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    ledger = open_ledger(Settings(root, actor="ada"))
    rows = pd.DataFrame({"hour": np.arange(5, 23.0), "visib": np.linspace(2, 10, 18), "seats": 150.0})
    register("late", LogisticRegression().fit(rows, rows["hour"] > 15), rows, metrics={}, trained_on={}, ledger=ledger)
    promote("late", 1, reason="first", ledger=ledger)
    words = [Path(sys.executable).with_name("aiexec"), "serve", "late", "--port", "0", "--json", "--project", root]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=(root / "log").open("w"), text=True)
    return process, int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])


def asked(port: int, chance: random.Random) -> tuple[int, int, str]:
    """Send one request: the code, how many rows were answered, and what is wrong with the answer."""
    method, path, body, headers = request(chance)
    if chance.random() < 0.03:  # no HTTP at all, or half of it
        return lines_torn(port, chance, body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, headers)
        said = connection.getresponse()
        text = said.read()
    finally:
        connection.close()
    told = json.loads(text[:10**6]) if said.getheader("content-type") == "application/json" and text else {}
    ids = told.get("prediction_ids") or (told.get("parameters") or {}).get("prediction_ids") or []
    if said.getheader("inference-header-content-length"):
        ids = json.loads(text[: int(said.getheader("inference-header-content-length"))])["parameters"]["prediction_ids"]
    sentence = told.get("message") or told.get("error") or ""
    wrong = f"{said.status} to {method} {path[:80]} {body[:200]!r}: {sentence[:200]}"
    odd = said.status >= 500 or said.status >= 400 and method != "HEAD" and not 5 < len(sentence) < 1500
    return said.status, len(ids), wrong if odd else ""


def lines_torn(port: int, chance: random.Random, body: bytes) -> tuple[int, int, str]:
    """Send bytes that are no request: whatever is answered is a 4xx, and what is not is closed."""
    text = torn(b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n" + body, chance)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sending:
        sending.sendall(text)
        sending.shutdown(socket.SHUT_WR)
        ready = select.select([sending], [], [], 15)[0]
        try:
            said = sending.recv(100) if ready else b""
        except ConnectionError:
            said = b""
    return 400, 0, f"{said!r} to {text[:200]!r}" if said.startswith(b"HTTP/1.1 5") else ""


def unasked(number: int, chance: random.Random, place: Path) -> Outcome:
    """A thousand such requests: no 5xx, the service goes on, and its log holds what was answered, no more and no less."""
    place.mkdir(parents=True, exist_ok=True)
    process, port = served(place)
    try:
        answers = [asked(port, chance) for _ in range(EACH)]
        found = [wrong for _, _, wrong in answers if wrong]
        code, rows, wrong = 0, sum(count for _, count, _ in answers), ""
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    kept = read_predictions(predictions_folder("late", Settings(place)))
    found += [] if code == 0 else [f"it ended with {code}"]
    found += [] if len(kept) == rows and kept["prediction_id"].is_unique else [f"{rows} rows answered, {len(kept)} in the log"]
    text = (place / "log").read_text()
    found += [f"its log: {text[-500:]}"] if "Traceback" in text or "another takes its place" in text else []
    return Outcome(not found, "; ".join(found[:5]), facts={"requests": EACH, "rows": rows})


FAMILIES = [Family("service", "a thousand mutated requests a case: no 5xx, the log holds exactly what was answered", unasked,
                   lambda: range(1, 101), of="serve")]
