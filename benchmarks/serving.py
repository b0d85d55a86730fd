"""One row a request over HTTP: `aiexec serve` beside `mlflow models serve`, BentoML, MLServer and a bare ASGI loop.

    python benchmarks/serving.py [SECONDS] [ROUNDS] [PEER …]     4 seconds a measurement, 3 rounds, all peers; wrk makes the requests

`aiexec serve` checks each request and has its answer on disk before it leaves; the bare loop (uvicorn, uvloop, httptools, orjson,
one worker) does neither and shows what is possible. BentoML and MLServer are installed into environments of their own; name one
of them to leave the other out, or mlflow to leave out both. Medians; a round measures all servers in turn.
"""

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import joblib
import pandas as pd
from sklearn.datasets import make_classification
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aiexec.model.registry import promote, register
from aiexec.settings import Settings
from aiexec.store import open_ledger

BIN = Path(sys.executable).parent
MODELS = {"logistic": LogisticRegression(), "boosting": HistGradientBoostingClassifier(random_state=0)}
BARE = '''
import asyncio, sys, numpy, orjson, skops.io, uvicorn
from aiexec.model.registry import TRUSTED
model = skops.io.load(sys.argv[1] + "/model.skops", trusted=list(TRUSTED))
for step in model: step.__dict__.pop("feature_names_in_", None)
waiting = []
def flush():
    batch, waiting[:] = waiting[:], []
    for (_, future), said in zip(batch, model.predict_proba(numpy.array([row for row, _ in batch])).tolist()):
        future.set_result(said)
async def app(scope, receive, send):
    if scope["type"] != "http": return
    message = await receive()
    body = b"{}"
    if scope["method"] == "POST":
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not waiting: loop.call_soon(flush)
        waiting.append((orjson.loads(message["body"])["dataframe_split"]["data"][0], future))
        body = orjson.dumps({"predictions": [await future]})
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(app, port=int(sys.argv[2]), log_config=None, access_log=False, lifespan="off")
'''
BENTO = '''
import bentoml, joblib, numpy
MODEL = joblib.load("model.joblib")
@bentoml.service(workers=1)
class Scoring:
    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def predict(self, rows: numpy.ndarray) -> numpy.ndarray:
        return MODEL.predict_proba(rows)
'''
PEERS = {"bentoml": ["bentoml>=1.4"], "mlserver": ["mlserver", "mlserver-sklearn"]}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A server in a process group of its own, on a free port."""

    def __init__(self, words: list, port: int, health: str, path: str, body: dict, cwd: Path, **environment: str):
        begun = time.perf_counter()
        self.url, self.path, self.body = f"http://127.0.0.1:{port}", path, json.dumps(body)
        self.log = (cwd / f"{port}.log").open("w+")
        self.process = subprocess.Popen([*map(str, words)], cwd=cwd, stdout=self.log, stderr=self.log, start_new_session=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
        try:
            while not self.answers(health):
                if self.process.poll() is not None or time.perf_counter() - begun > 120:
                    self.log.seek(0)
                    raise RuntimeError(f"{words[0]} does not serve: {self.log.read()[-2000:]}")
                time.sleep(0.01)
        except BaseException:
            self.close()
            raise
        self.seconds = time.perf_counter() - begun
        request = urllib.request.Request(self.url + path, self.body.encode(), {"content-type": "application/json"})
        assert urllib.request.urlopen(request, timeout=60).status == 200

    def answers(self, health: str) -> bool:
        try:
            return urllib.request.urlopen(self.url + health, timeout=5).status == 200
        except OSError:
            return False

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


def measured(server: Server, connections: int, seconds: float, place: Path) -> tuple[float, float]:
    """Requests a second, and the median latency in ms."""
    script = place / "post.lua"
    script.write_text(f'wrk.method = "POST"\nwrk.headers["content-type"] = "application/json"\nwrk.body = [==[{server.body}]==]\n')
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency", "-s", script, server.url + server.path]
    told = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in told, told
    number, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", told).groups()
    return float(re.search(r"Requests/sec:\s+([\d.]+)", told)[1]), float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def make_project(place: Path) -> tuple[pd.DataFrame, dict[str, Path]]:
    """A project with a champion of each kind, and the folders in which MLflow keeps them."""
    (place / "settings.ini").write_text("[aiexec]\nactor = benchmark\n")
    ledger = open_ledger(Settings(place, actor="benchmark"))
    values, labels = make_classification(5000, 30, random_state=0)
    rows = pd.DataFrame(values, columns=[f"f{number}" for number in range(30)])
    for name, model in MODELS.items():
        fitted = make_pipeline(StandardScaler(), model).fit(rows, labels)
        register(name, fitted, rows, metrics={}, trained_on={}, ledger=ledger)
        promote(name, 1, reason="benchmark", ledger=ledger)
        (place / name).mkdir()
        joblib.dump(fitted, place / name / "model.joblib")
    found = {path.parent for path in (place / ".aiexec" / "artifacts").rglob("MLmodel")}
    return rows, {name: next(one for one in found if f"/{name}/" in str(one)) for name in MODELS}


def installed(peer: str) -> Path | None:
    """The commands of a peer in an environment of its own, or None and a sentence."""
    folder = Path(tempfile.gettempdir()) / f"aiexec-benchmark-{peer}"
    if not (folder / "bin" / peer).exists():
        import numpy
        import sklearn

        pins = [f"scikit-learn=={sklearn.__version__}", f"numpy=={numpy.__version__}"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        done = subprocess.run([folder / "bin" / "pip", "install", "-q", *PEERS[peer], *pins], capture_output=True, text=True)
        if done.returncode:
            print(f"{peer} is left out: it does not install beside our scikit-learn ({done.stderr.strip().splitlines()[-1][:150]}).")
            return None
    return folder / "bin"


def begin(kind: str, name: str, stored: Path, rows: pd.DataFrame, place: Path) -> Server:
    """Start a server."""
    port, row = free_port(), json.loads(rows.head(1).to_json(orient="split", index=False, double_precision=15))
    split = {"dataframe_split": row}
    if kind == "aiexec":
        return Server([BIN / "aiexec", "serve", name, "--port", port], port, "/ready", "/invocations", split, place)
    if kind == "bare":
        return Server([sys.executable, "-c", BARE, stored, port], port, "/", "/", split, place)
    if kind == "mlflow":
        words = [BIN / "mlflow", "models", "serve", "-m", stored, "-p", port, "--env-manager", "local", "--workers", "1"]
        return Server(words, port, "/ping", "/invocations", split, place, PATH=f"{BIN}:{os.environ['PATH']}")
    if kind == "bentoml":
        (place / name / "service.py").write_text(BENTO)
        words = [installed(kind) / "bentoml", "serve", "service:Scoring", "--port", port]
        return Server(words, port, "/readyz", "/predict", {"rows": row["data"]}, place / name)
    (place / name / "model-settings.json").write_text(json.dumps({"name": name, "implementation": "mlserver_sklearn.SKLearnModel",
                                                                 "parameters": {"uri": "./model.joblib"}}))
    (place / name / "settings.json").write_text(json.dumps({"http_port": port, "grpc_port": free_port(), "metrics_port": free_port(),
                                                           "host": "127.0.0.1", "parallel_workers": 0}))
    tensor = {"name": "rows", "shape": [1, 30], "datatype": "FP64", "data": row["data"][0]}
    asked = {"inputs": [tensor], "outputs": [{"name": "predict_proba"}]}
    return Server([installed(kind) / "mlserver", "start", "."], port, "/v2/health/ready", f"/v2/models/{name}/infer", asked, place / name)


def main(seconds: float = 4, rounds: int = 3, *peers: str) -> None:
    if shutil.which("wrk") is None:
        sys.exit("wrk is not installed (Debian: apt-get install wrk).")
    kinds = ["bare", "aiexec", "mlflow", *[peer for peer in PEERS if (not peers or peer in peers) and installed(peer)]]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows, stored = make_project(place)
        for name in MODELS:
            servers, seen = {}, {}
            try:
                for kind in kinds:
                    try:
                        servers[kind] = begin(kind, name, stored[name], rows, place)
                    except RuntimeError as why:
                        print(f"{kind} is left out: {str(why).strip().splitlines()[-1][:200]}")
                for _ in range(int(rounds)):
                    for kind, server in servers.items():
                        for connections in (8, 1):
                            seen.setdefault((kind, connections), []).append(measured(server, connections, float(seconds), place))
            finally:
                for server in servers.values():
                    server.close()
            told(name, servers, seen)


def told(name: str, servers: dict, seen: dict) -> None:
    """The table of one model."""
    print(f"\n{name}, 30 columns, one row a request\n")
    print(f"{'server':<10}{'ready (s)':>10}{'8 conn. req/s':>15}{'p50 (ms)':>10}{'ours is':>9}{'1 conn. p50 (ms)':>18}{'ours is':>9}")
    medians = {key: [statistics.median(one) for one in zip(*values)] for key, values in seen.items()}
    for kind, server in servers.items():
        many, one = medians[kind, 8], medians[kind, 1]
        times, share = medians["aiexec", 8][0] / many[0], medians["aiexec", 1][1] / one[1]
        print(f"{kind:<10}{server.seconds:>10.1f}{many[0]:>15,.0f}{many[1]:>10.2f}{times:>8.2f}×{one[1]:>18.2f}{share:>8.2f}×")


if __name__ == "__main__":
    main(*map(float, sys.argv[1:3]), *sys.argv[3:])
