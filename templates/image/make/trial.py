"""Serves the model for a moment and asks it, so that no image is made that cannot answer: python3 trial.py FOLDER [OPTION]

What Python compiles of the modules that are imported here stays in the image, and the service starts the faster.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path


def ask(url: str, body: bytes | None = None) -> bytes:
    """What is answered; anything but 200 is raised."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answered:
        return answered.read()


def trial(url: str, model: Path) -> str:
    """What the model says of its example, if it has one."""
    for path in ("/ready", "/health", "/metrics", "/docs", "/openapi.json", "/v2/health/ready"):
        ask(url + path)
    example = model / "example.json"
    if not example.is_file():
        return "it is ready"
    rows = json.loads(example.read_text(encoding="utf-8"))
    answered = ask(f"{url}/invocations", json.dumps({"dataframe_split": rows}).encode())
    return f"{len(json.loads(answered)['predictions'])} predictions"


def main(model: str, *options: str) -> None:
    with tempfile.TemporaryDirectory() as log:
        command = ["aiexec", "serve", model, "--port", "0", "--log", log, "--json", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
            try:
                told = json.loads(service.stdout.readline() or "{}")
                print(trial(told["url"], Path(model)) if "url" in told else told or "it did not start")
            finally:
                service.terminate()
                service.communicate(timeout=60)
    sys.exit(0 if "url" in told and service.returncode == 0 else 1)


main(*sys.argv[1:])
