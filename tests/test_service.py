"""A model behind HTTP: clients of others get the library's scores, bad input a sentence, and nothing that was begun is lost."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import infer_signature
from mlflow.pyfunc.scoring_server import invocations as mlflow_invocations
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aiexec.model.registry import promote, register
from aiexec.serve.models import open_served
from aiexec.serve.predictions import predictions_folder, read_predictions
from aiexec.settings import Settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, answer, environment

FLIGHTS = pd.DataFrame({"hour": np.arange(5, 23.0), "visib": np.linspace(2, 10, 18), "seats": 150.0})
LATE = (FLIGHTS["hour"] > 15).astype(int)


class Served:
    """A service in a process of its own."""

    def __init__(self, *words: object, program: str | None = None, cwd: Path):
        command = [sys.executable, "-c", program] if program else [AIEXEC, "serve", *map(str, words), "--port", "0", "--json"]
        self.errors = (cwd / f"serve-{time.monotonic_ns()}.log").open("w+")
        # a warm server is for people who type; a service of the tests is a process that can be killed and measured
        self.process = subprocess.Popen(command, cwd=cwd, env=environment(AIEXEC_KERNELS="cold"), stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("{") and "url" in line, line + self.said()
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def ask(self, path: str, body: object = None, timeout: float = 60, **headers: str) -> tuple[int, object]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        request = urllib.request.Request(self.url + path, data, given)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as said:
                code, text = said.status, said.read()
        except urllib.error.HTTPError as said:
            code, text = said.code, said.read()
        return code, json.loads(text) if text[:1] == b"{" else text.decode()

    def workers(self) -> list[int]:
        """The processes that serve: the command itself, or its child, is their parent."""
        place = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(one) for one in place.read_text().split()]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.errors.close()
        return code


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with a champion of three columns."""
    place = tmp_path_factory.mktemp("served")
    (place / "settings.ini").write_text("[aiexec]\nactor = ada\n")
    ledger = open_ledger(Settings(place, actor="ada"))
    line = make_pipeline(StandardScaler(), LogisticRegression()).fit(FLIGHTS, LATE)
    register("late_flights", line, FLIGHTS, metrics={"roc_auc": 0.9}, trained_on={}, ledger=ledger)
    promote("late_flights", 1, reason="first", ledger=ledger)
    return place


@pytest.fixture(scope="module")
def served(project):
    """Its service, of two workers."""
    service = Served("late_flights", "--workers", "2", cwd=project)
    yield service
    assert service.end() == 0, service.said()


@pytest.fixture(scope="module")
def expected(project) -> np.ndarray:
    return open_served("late_flights", Settings(project)).predict(FLIGHTS)


def split(frame: pd.DataFrame) -> dict:
    return {"dataframe_split": frame.to_dict("split", index=False)}


def test_every_form_of_input_gives_the_scores_of_the_library(served, expected):
    forms = [split(FLIGHTS), split(FLIGHTS[["seats", "hour", "visib"]]), {"dataframe_records": FLIGHTS.to_dict("records")},
             {"instances": FLIGHTS.to_numpy().tolist()}, {"inputs": FLIGHTS.to_dict("list")}, {"inputs": FLIGHTS.to_dict("records")}]
    for form in forms:
        code, said = served.ask("/invocations", form)
        assert (code, said["predictions"]) == (200, expected.tolist()), form
        assert len(set(said["prediction_ids"])) == len(FLIGHTS) and said["model_version"] == "1"
    code, said = served.ask("/invocations", FLIGHTS.to_csv(index=False).encode(), content_type="text/csv")
    assert (code, said["predictions"]) == (200, expected.tolist())


def test_answers_are_those_of_mlflows_own_server(served, project, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # MLflow's own loader takes skops for pickle
    model = mlflow.pyfunc.load_model(str(next((project / ".aiexec" / "artifacts").rglob("MLmodel")).parent))
    for form in (split(FLIGHTS), {"dataframe_records": FLIGHTS.to_dict("records")}, {"inputs": FLIGHTS.to_dict("list")}):
        theirs = mlflow_invocations(json.dumps(form), "application/json", model, model.metadata.get_input_schema())
        assert served.ask("/invocations", form)[1]["predictions"] == json.loads(theirs.response)["predictions"]


def test_mlflows_client_gets_its_answers(served, expected):
    client = ScoringServerClient("127.0.0.1", served.port)
    client.wait_server_ready(timeout=60)
    np.testing.assert_array_equal(client.invoke(FLIGHTS).get_predictions().to_numpy(), expected)


def test_tritons_client_gets_its_answers(served, expected):
    from tritonclient.http import InferenceServerClient, InferenceServerException, InferInput, InferRequestedOutput

    client = InferenceServerClient(f"127.0.0.1:{served.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("late_flights")
    assert client.get_model_metadata("late_flights")["inputs"][0] == {"name": "hour", "datatype": "FP64", "shape": [-1]}
    for binary in (True, False):
        whole = InferInput("rows", [len(FLIGHTS), 3], "FP64")
        whole.set_data_from_numpy(FLIGHTS.to_numpy(), binary_data=binary)
        columns = [InferInput(name, [len(FLIGHTS), 1], "FP64") for name in FLIGHTS]
        for column in columns:
            column.set_data_from_numpy(FLIGHTS[[column.name()]].to_numpy(), binary_data=binary)
        for inputs in ([whole], columns):
            said = client.infer("late_flights", inputs, request_id="a7")
            np.testing.assert_array_equal(said.as_numpy("output-0"), expected)
            assert said.get_response()["id"] == "a7" and said.get_response()["model_version"] == "1"
            asked = client.infer("late_flights", inputs, outputs=[InferRequestedOutput("output-0", binary_data=not binary)])
            np.testing.assert_array_equal(asked.as_numpy("output-0"), expected)
    with pytest.raises(InferenceServerException, match="needs the columns visib, seats, which are missing"):
        client.infer("late_flights", columns[:1])
    with pytest.raises(InferenceServerException, match="There is no model 'early_flights'"):
        client.infer("early_flights", columns)
    client.close()


def test_curl_gets_its_answers(served, expected):
    body = json.dumps({"instances": FLIGHTS.to_numpy()[:1].tolist()})
    done = subprocess.run(["curl", "-s", f"{served.url}/invocations", "-H", "content-type: application/json", "-d", body],
                          capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["predictions"] == expected[:1].tolist()


ROW = [7, 9.5, 150]
BAD = [
    b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{" * 5000, b"[" * 50_000, b'{"instances": [[NaN, 1, 1]]}',
    b'{"instances": [[Infinity, 1, 1]]}', b'{"instances": [[-1e999, 1, 1]]}', b'{"instances": [["\\ud800", 1, 1]]}',
    b'{"instances": [[' + b"9" * 5000 + b", 1, 1]]}", {"instances": "x"}, {"instances": [ROW, ROW[:2]]}, {"instances": [[ROW]]},
    {"instances": [[True, 1, 1]]}, {"instances": [["7", 1, 1]]}, {"instances": [[{}, 1, 1]]}, {"inputs": {"hour": 1}},
    {"inputs": {"hour": [1], "visib": [1, 2], "seats": [1]}}, {"dataframe_split": {"columns": ["hour"], "data": [[1]]}},
    {"dataframe_split": {"columns": ["hour", "hour", "seats"], "data": [ROW]}}, {"dataframe_split": {"columns": [[], {}, 1], "data": []}},
    {"dataframe_records": [{"hour": 1, "visib": 1, "seats": 1, "x" * 100_000: 1}]}, {"dataframe_records": {"hour": 1}},
    {"instances": [ROW], "params": []}, {"instances": [[None, None, None]]}, {"instances": [ROW], "inputs": [ROW]},
    {"instances": [["y" * 100_000, 1, 1]]}, {"data": {"ndarray": [ROW]}},
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_gets_one_short_sentence(served, number):
    code, said = served.ask("/invocations", BAD[number])
    assert 400 <= code < 500, said
    assert set(said) == {"error_code", "message"} and 10 < len(said["message"]) < 700


TENSOR = {"name": "rows", "shape": [1, 3], "datatype": "FP64", "data": ROW}


@pytest.mark.parametrize("change", [
    {"shape": [1]}, {"shape": [-1, 3]}, {"shape": [2**40, 3]}, {"shape": []}, {"shape": "x"}, {"datatype": "FP8"}, {"datatype": []}, {"data": [1]},
    {"data": "x"}, {"data": [[1], 2, 3]}, {"name": 1}, {"data": ["a", "b", "c"]}, {"parameters": {"binary_data_size": 24}},
    {"parameters": {"binary_data_size": -1}}, {"parameters": [], "data": None}, {"data": [None, None, None]}, {"shape": [1, 1, 3]},
], ids=str)
def test_bad_tensors_get_one_short_sentence(served, change):
    code, said = served.ask("/v2/models/late_flights/infer", {"inputs": [{**TENSOR, **change}]})
    assert code == 400 and set(said) == {"error"} and 10 < len(said["error"]) < 700, said


def test_other_paths_methods_and_kinds_are_refused(served):
    wrong = [served.ask("/nowhere"), served.ask("/invocations"), served.ask("/version", {}), served.ask("/v2/models/x"), served.ask("/v2x"),
             served.ask("/invocations", b"x", content_type="application/x-parquet"), served.ask("/invocations", b"x", content_encoding="gzip")]
    assert [code for code, _ in wrong] == [404, 405, 405, 404, 404, 415, 415]


def test_what_is_told_of_the_service_is_true(served, project):
    before = len(read_predictions(predictions_folder("late_flights", Settings(project))))
    text = served.ask("/metrics")[1]
    rows = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}
    answered = sum(value for name, value in rows.items() if name.startswith("aiexec_answers_total"))
    assert rows["aiexec_batch_rows_sum"] >= answered - 0.5 and before >= 0
    assert {name for name in rows if name.startswith("aiexec_up")} == {'aiexec_up{worker="0"}', 'aiexec_up{worker="1"}'}
    assert served.ask("/version")[1]["model_version"] == "1"
    code, page = served.ask("/docs")
    assert code == 200 and "late_flights" in page and "https://" not in page


@pytest.mark.filterwarnings("ignore")
def test_no_generated_request_makes_an_error_of_the_service(served):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    asked = []
    for operation in schema.get_all_operations():
        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
        @given(case=operation.ok().as_strategy())
        def ask(case):
            said = case.call(timeout=60)
            asked.append(said.status_code)
            case.validate_response(said, checks=[not_a_server_error])

        ask()
    assert len(asked) > 50 and max(asked) < 500 and 200 in asked


def test_a_killed_worker_is_replaced_and_the_other_goes_on(served):
    before = served.workers()
    os.kill(before[0], signal.SIGKILL)
    until = time.monotonic() + 60
    while (place := Path(f"/proc/{before[0]}/stat")).exists() and ") Z" not in place.read_text():
        assert time.monotonic() < until
    while len(now := served.workers()) < 2 or before[0] in now:
        assert served.ask("/invocations", {"instances": [ROW]})[0] == 200 and time.monotonic() < until
    assert before[1] in served.workers()
    assert f"Worker 0 (process {before[0]}) ended by signal 9; another takes its place." in served.said()


def test_a_service_takes_keys_and_notices_that_one_is_revoked(project, tmp_path):
    place = tmp_path / "closed"
    shutil.copytree(project, place)
    key = answer("keys", "add", "crm", cwd=place)["key"]
    watch = answer("keys", "add", "prometheus", "--scope", "metrics", cwd=place)["key"]
    assert key not in json.dumps(answer("keys", cwd=place))
    service = Served("late_flights", cwd=place)
    try:
        row = {"instances": [ROW]}
        assert service.ask("/invocations", row)[0] == 401 and service.ask("/health")[0] == 200
        assert service.ask("/invocations", row, authorization=f"Bearer {key}")[0] == 200
        assert service.ask("/invocations", row, x_api_key=watch)[0] == 403 and service.ask("/metrics", x_api_key=watch)[0] == 200
        assert service.ask("/v2/models/late_flights/infer", {"inputs": [TENSOR]})[0] == 401
        answer("keys", "revoke", "crm", cwd=place)
        until = time.monotonic() + 60
        while service.ask("/invocations", row, x_api_key=key)[0] != 401:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        assert service.end() == 0


class Slow(mlflow.pyfunc.PythonModel):
    """Takes a moment for each table."""

    def predict(self, context, model_input, params=None):
        time.sleep(1)
        return model_input["hour"] * (params or {}).get("times", 1)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A pyfunc model, as pickle; no project is near."""
    folder = tmp_path_factory.mktemp("slow") / "model"
    signature = infer_signature(FLIGHTS[["hour"]], FLIGHTS["hour"], params={"times": 1})
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # whoever loads it has no tests
    mlflow.pyfunc.save_model(folder, python_model=Slow(), signature=signature)
    return folder


def test_a_pickle_is_served_by_consent_only_and_what_was_begun_is_answered_at_the_end(slow):
    refused = subprocess.run([AIEXEC, "serve", slow, "--port", "0"], cwd=slow.parent, env=environment(), capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "It unpickles, which runs whatever the file says" in refused.stderr and refused.stderr.count("\n") <= 2
    service = Served(slow, "--allow-pickle", cwd=slow.parent)
    said: list = []
    asking = threading.Thread(target=lambda: said.append(service.ask("/invocations", {"inputs": {"hour": [2, 3]}, "params": {"times": 10}})))
    asking.start()
    until = time.monotonic() + 60
    while 'aiexec_waiting_rows{worker="0"} 2' not in service.ask("/metrics")[1]:
        assert time.monotonic() < until
    assert service.end() == 0
    asking.join()
    assert said[0][0] == 200 and said[0][1]["predictions"] == [20, 30]


LIMITED = """
import json, sys
from aiexec.serve.limits import Limits
from aiexec.serve.workers import Plan, serve
plan = Plan("model", limits=Limits(body=2**20, receive=2, rate=1000, connections=20))
sys.exit(serve(plan, lambda url, told: print(json.dumps({"url": url}), flush=True)))
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A service with narrow limits, of a model in a folder."""
    place = tmp_path_factory.mktemp("limited")
    line = LinearRegression().fit(FLIGHTS, LATE)
    mlflow.sklearn.save_model(line, place / "model", signature=infer_signature(FLIGHTS, LATE), serialization_format="skops")
    service = Served(program=LIMITED, cwd=place)
    yield service
    assert service.end() == 0, service.said()


def received(connection: socket.socket) -> bytes:
    """What was answered, until the connection ends or is quiet."""
    text = b""
    try:
        while part := connection.recv(1000):
            text += part
            if text.startswith(b"HTTP/1.1 413"):
                break
    except ConnectionError:
        pass
    return text


def memory(process: int) -> float:
    """The most that a process ever held, in MB."""
    return next(int(line.split()[1]) for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024


def test_a_body_of_100_mb_is_refused_before_it_is_held(limited):
    worker = limited.workers()[0]
    before = memory(worker)
    for head in (b"content-length: 104857600\r\n", b"transfer-encoding: chunked\r\n"):
        with socket.create_connection(("127.0.0.1", limited.port), timeout=60) as sending:
            sending.sendall(b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + head + b"\r\n")
            piece, sent = b"x" * 65_536, 0
            try:
                for sent in range(1600):
                    sending.sendall(b"10000\r\n" + piece + b"\r\n" if b"chunked" in head else piece)
            except OSError:
                pass
            assert received(sending).startswith(b"HTTP/1.1 413") or sent < 1600  # cut off while it was sending
    with socket.create_connection(("127.0.0.1", limited.port), timeout=60) as sending:  # it need not be sent to be refused
        sending.sendall(b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 104857600\r\n\r\n")
        assert received(sending).startswith(b"HTTP/1.1 413")
    assert memory(worker) - before < 50
    assert limited.ask("/health")[0] == 200


def test_slow_senders_are_cut_off_and_connections_are_bounded(limited):
    begun = [b"", b"POST /inv", b"POST /invocations HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\ncontent-type: application/json\r\n\r\n{"]
    slow = [socket.create_connection(("127.0.0.1", limited.port), timeout=60) for _ in range(15)]
    for number, one in enumerate(slow):
        one.sendall(begun[number % 3])
    for one in slow:
        text = received(one)
        assert text == b"" or text.startswith(b"HTTP/1.1 408")
        one.close()
    many = [socket.create_connection(("127.0.0.1", limited.port), timeout=60) for _ in range(40)]
    heads = [received(one) for one in many]
    assert any(head.startswith(b"HTTP/1.1 429") for head in heads)
    for one in many:
        one.close()
    until = time.monotonic() + 60
    while limited.ask("/health")[0] != 200:
        assert time.monotonic() < until


def test_headers_without_end_are_refused(limited):
    with socket.create_connection(("127.0.0.1", limited.port), timeout=60) as sending:
        try:
            sending.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: %s\r\n" % (one, b"y" * 1000) for one in range(200)))
            assert sending.recv(100).startswith(b"HTTP/1.1 400")
        except ConnectionError:
            pass
    assert limited.ask("/ready")[0] == 200


def test_a_service_can_be_mounted_in_an_application_of_fastapi(limited, tmp_path):
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from aiexec.serve.live import Live
    from aiexec.serve.service import Service

    folder = tmp_path / "model"
    line = LinearRegression().fit(FLIGHTS, LATE)
    mlflow.sklearn.save_model(line, folder, signature=infer_signature(FLIGHTS, LATE), serialization_format="skops")
    model = open_served(str(folder))
    service = Service(Live("model", lambda version: model, None).start())
    app = FastAPI()
    app.mount("/model", service)
    said = TestClient(app).post("/model/invocations", json={"instances": [ROW]}).json()
    assert said["predictions"] == line.predict(pd.DataFrame([ROW], columns=list(FLIGHTS))).tolist()
    service.close()


def test_the_flights_are_scored_by_service_batch_and_notebook_alike(month, tmp_path):
    project = tmp_path / "flights"
    shutil.copytree(month, project)
    served = open_served("flight_delays", Settings(project))
    service = Served("flight_delays", cwd=project)
    try:
        rows = served.example
        code, said = service.ask("/invocations", split(rows))
        assert (code, said["predictions"]) == (200, served.predict(rows).tolist())
        assert said["predictions"] == served.model.predict_proba(rows).tolist()
        kept = read_predictions(predictions_folder("flight_delays", Settings(project)))
        assert kept["prediction_id"].tolist() == said["prediction_ids"] and kept["carrier"].tolist() == rows["carrier"].tolist()
        reasons = service.ask("/invocations?reasons=true", split(rows.head(1)))[1]["reasons"]
        assert set(reasons[0]["contributions"]) == set(rows)
    finally:
        assert service.end() == 0


def test_a_model_that_is_not_there_is_said_in_a_sentence(project):
    done = subprocess.run([AIEXEC, "serve", "late_flight", "--port", "0"], cwd=project, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "No model 'late_flight' is registered. Did you mean 'late_flights'?" in done.stderr
