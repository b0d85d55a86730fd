"""The folder of an image is complete, and an image built from it answers as the library does."""

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import orjson
import pandas as pd
import pytest
import yaml
from sklearn.ensemble import HistGradientBoostingClassifier

from aiexec.model.registry import promote, register
from aiexec.serve.image import requirements
from aiexec.serve.predictions import read_predictions
from aiexec.serve.scorer import load_scorer
from aiexec.settings import Settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, ROOT, aiexec, answer, environment

PROOF = ROOT / ".ci" / "image"
OFFLINE = re.compile(r"Max retries|Temporary failure|Network is unreachable|No matching distribution|timed out|SSLError|Connection"
                     r"(Error|Reset|Refused)|Could not find a version|No space left")
ROWS = pd.DataFrame({"hour": np.linspace(5, 23, 400), "visib": np.linspace(0, 10, 400) ** 2 % 7})


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with a champion of two versions."""
    place = tmp_path_factory.mktemp("image") / "project"
    place.mkdir()
    (place / "settings.ini").write_text("[aiexec]\nactor = ada\nkernels = cold\n")
    ledger = open_ledger(Settings(place, actor="ada"))
    for rounds in (5, 10):
        model = HistGradientBoostingClassifier(max_iter=rounds).fit(ROWS, ROWS["hour"] + ROWS["visib"] > 14)
        register("flight_delays", model, ROWS, metrics={"roc_auc": 0.7}, trained_on={"rounds": rounds}, ledger=ledger)
    promote("flight_delays", 2, reason="better", ledger=ledger)
    return place


@pytest.fixture(scope="module")
def folder(project) -> Path:
    """The folder that the command makes."""
    made = answer("image", "flight_delays", "--json", cwd=project)
    assert (made["tag"], made["version"]) == ("flight-delays:2", "2")
    return project / "flight_delays-image"


def documents(folder: Path) -> dict[str, dict]:
    """The manifests by kind."""
    read = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("k*/*.yaml"))]
    return {one["kind"]: one for one in read}


@pytest.mark.parametrize("gpu", [False, True])
def test_the_manifests_agree_with_each_other(project, folder, tmp_path, gpu):
    if gpu:
        answer("image", "flight_delays", "-o", tmp_path / "fast", "--gpu", cwd=project)
        folder = tmp_path / "fast"
    found = documents(folder)
    assert set(found) == {"Deployment", "Service", "HorizontalPodAutoscaler", "InferenceService"}
    deployment, service, scaler = (found[kind] for kind in ("Deployment", "Service", "HorizontalPodAutoscaler"))
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"] and "replicas" not in deployment["spec"]
    predictor = found["InferenceService"]["spec"]["predictor"]
    docker = (folder / "Dockerfile").read_text()
    port, user = int(re.search(r"^EXPOSE (\d+)", docker, re.M)[1]), int(re.search(r"^USER (\d+):", docker, re.M)[1])
    assert user > 0 and f'CMD ["--port", "{port}"]' in docker
    for spec in (pod["spec"], predictor):
        [container] = spec["containers"]
        [opened] = container["ports"]
        assert opened["containerPort"] == port and container["image"] == "flight-delays:2"
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == user
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        assert all(container[probe]["httpGet"]["port"] in (port, opened.get("name")) for probe in container if probe.endswith("Probe"))
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"]) and set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert (container["resources"]["limits"].get("nvidia.com/gpu") == "1") is gpu and ("tolerations" in spec) is gpu
    assert service["spec"]["ports"][0]["targetPort"] == pod["spec"]["containers"][0]["ports"][0]["name"]
    assert ("NVIDIA_VISIBLE_DEVICES" in docker) is gpu


def ask(url: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answered:
        text = answered.read()
        return json.loads(text) if text.startswith(b"{") else {"text": text.decode()}


def until_ready(process: subprocess.Popen, url: str) -> dict:
    until = time.monotonic() + 120
    while True:
        try:
            return ask(f"{url}/ready")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            assert process.poll() is None, f"it ended with {process.returncode}"
            assert time.monotonic() < until
            time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers_as_the_library(url: str, project: Path) -> None:
    known = load_scorer("flight_delays", 2, Settings(project)).score(ROWS)
    said = ask(f"{url}/invocations", {"dataframe_split": ROWS.to_dict("split", index=False)})
    assert said["model_version"] == "2"
    np.testing.assert_allclose(np.array(said["predictions"])[:, 1], known, rtol=0, atol=1e-12)
    inputs = [{"name": name, "datatype": "FP64", "shape": [len(ROWS)], "data": ROWS[name].tolist()} for name in ROWS]
    outputs = ask(f"{url}/v2/models/flight_delays/infer", {"inputs": inputs})["outputs"]
    flat = np.array(outputs[0]["data"], float).reshape(len(ROWS), -1)
    np.testing.assert_allclose(flat[:, -1], known, rtol=0, atol=1e-12)


ONLY = """
import sys
from importlib.abc import MetaPathFinder
from importlib.metadata import packages_distributions
names = {one.replace("_", "-").replace(".", "-").lower() for one in open(sys.argv[1]).read().replace("==", "\\n").split("\\n")} | {"aiexec"}
absent = {module for module, owners in packages_distributions().items()
          if not {owner.replace("_", "-").replace(".", "-").lower() for owner in owners} & names}
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r} in the image", name=name)
sys.meta_path.insert(0, Absent())
del sys.argv[1]
from aiexec.cli.commands import main
main()
"""


def test_serving_takes_no_more_than_what_is_installed_and_every_probe_is_answered(project, folder, tmp_path):
    model = shutil.copytree(folder / "model", tmp_path / "models" / "flight_delays")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", folder / "model.sha256"], cwd=model, check=True)
    (tmp_path / "only.py").write_text(ONLY)
    port = free_port()
    words = ["serve", model, "--host", "127.0.0.1", "--log", tmp_path / "predictions", "--port", port]
    process = subprocess.Popen([sys.executable, tmp_path / "only.py", folder / "requirements.txt", *map(str, words)], cwd=tmp_path,
                               env=environment())
    try:
        url = f"http://127.0.0.1:{port}"
        assert until_ready(process, url)["model"] == "flight_delays"
        answers_as_the_library(url, project)
        docker, found = (folder / "Dockerfile").read_text(), documents(folder)
        containers = [found["Deployment"]["spec"]["template"]["spec"]["containers"][0],
                      found["InferenceService"]["spec"]["predictor"]["containers"][0]]
        paths = {one[probe]["httpGet"]["path"] for one in containers for probe in one if probe.endswith("Probe")}
        paths |= {found["Deployment"]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/path"]}
        paths |= set(re.findall(r"127\.0\.0\.1:8080(/\w+)", docker + (folder / "README.md").read_text()))
        assert len(paths) > 5
        for path in paths:
            assert ask(url + path)
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert list((tmp_path / "predictions").glob("day=*/*")), "what was answered is logged"
    assert len(read_predictions(tmp_path / "predictions")) == 2 * len(ROWS)
    assert "pyarrow" not in (folder / "requirements.txt").read_text()


def test_pyarrow_comes_along_when_it_is_asked_for_or_the_model_keeps_rows_as_parquet(project, folder, tmp_path):
    answer("image", "flight_delays", "-o", tmp_path / "asked", "--parquet", cwd=project)
    assert "pyarrow==" in (tmp_path / "asked" / "requirements.txt").read_text()
    model = shutil.copytree(folder / "model", tmp_path / "model")
    ROWS.head().to_parquet(model / "background.parquet")
    assert "pyarrow" in requirements(model) and "pyarrow" not in requirements(folder / "model")


def test_what_builds_the_image_takes_out_what_serving_never_reads(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    for name in ("skops/io.py", "skops/tests/test_io.py", "skops/__pycache__/io.pyc", "numpy/core.pyx", "setuptools/__init__.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("x")
    extension = Path(orjson.__file__).with_name(next(path.name for path in Path(orjson.__file__).parent.glob("*.so")))
    shutil.copy(extension, site / extension.name)
    (site / "text.so").write_text("no program")
    subprocess.run([sys.executable, ROOT / "templates" / "image" / "make" / "slim.py", tmp_path], check=True)
    assert sorted(path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()) == \
        sorted(["skops/io.py", extension.name, "text.so"])
    ctypes.CDLL(str(site / extension.name))
    assert (site / extension.name).stat().st_size <= extension.stat().st_size


def test_a_model_that_cannot_answer_makes_no_image(folder, tmp_path):
    trial = ROOT / "templates" / "image" / "make" / "trial.py"
    broken = shutil.copytree(folder / "model", tmp_path / "broken")
    (broken / "model.skops").write_bytes(b"?")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    tried = [subprocess.run([sys.executable, trial, model], env=environment(PATH=path), capture_output=True, text=True, cwd=tmp_path)
             for model in (folder / "model", broken)]
    assert [one.returncode for one in tried] == [0, 1], tried
    assert "5 predictions" in tried[0].stdout and "no whole archive" in tried[1].stdout


def test_an_image_is_refused_in_a_sentence(project, folder, tmp_path):
    for words, problem in [(("flight_delays",), "exists and is not empty"), (("flight_delay",), "No model 'flight_delay'"),
                           (("flight_delays", "-o", tmp_path / "x", "--base", "a b"), "cannot be the name of an image")]:
        refused = answer("image", *words, cwd=project, code=1)
        assert problem in refused["problem"], refused
    outside = aiexec("image", folder / "model", "-o", "again", cwd=tmp_path)
    assert outside.returncode == 0, outside.stdout + outside.stderr
    assert (tmp_path / "again" / "model.sha256").read_text() == (folder / "model.sha256").read_text()


def proof(*words: object, timeout: float = 900) -> subprocess.CompletedProcess:
    return subprocess.run([PROOF, *map(str, words)], capture_output=True, text=True, timeout=timeout)


def unproven(what: str, done: subprocess.CompletedProcess) -> None:
    """This machine cannot do it: everything short of it was checked by the other tests."""
    said = (done.stdout + done.stderr).strip().splitlines()[-3:]
    warnings.warn(f"The image was not built and run here, since {what}: {' / '.join(said)}")


def test_an_image_is_built_run_and_asked(project, folder, tmp_path, capsys):
    probed = proof("probe")
    if probed.returncode and "is not installed" in probed.stdout:
        pytest.skip(f"{probed.stdout.strip()} (Debian: apt-get install buildah podman runc debootstrap)")
    if probed.returncode:
        return unproven("containers do not work", probed)
    if (base := proof("base")).returncode:
        return unproven("there is no base image", base)
    linted = proof("lint", folder)
    assert not linted.stdout, linted.stdout
    if linted.returncode:
        unproven("hadolint cannot be had", linted)
    tag = f"localhost/aiexec-proof:{os.getpid()}"
    built = proof("build", folder, tag)
    if built.returncode and OFFLINE.search(built.stderr):
        return unproven("packages cannot be had within the build", built)
    assert built.returncode == 0, built.stderr
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([PROOF, "run", tag, str(port)], stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        ready = until_ready(process, f"http://127.0.0.1:{port}")
        assert (ready["model"], ready["model_version"]) == ("flight_delays", "2")
        answers_as_the_library(f"http://127.0.0.1:{port}", project)
    finally:
        process.stdin.close()
        assert process.wait(120) == 0, (tmp_path / "log").read_text()
        proof("drop", tag)
    size = int(built.stdout.split()[-1]) / 1e6
    with capsys.disabled():
        print(f"\nimage: {size:,.0f} MB")
    assert size < 450, "of these the base has 128"
