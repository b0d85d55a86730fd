"""Bad input: torn and foreign notebooks, hostile names and values, flipped bits in what is kept."""

import json
import random
from pathlib import Path

from aiexec.run.proof import verify_run
from aiexec.run.records import RUNS
from tests.faults.project import RUN, Outcome, command, known, lay_out, ledger_of, rough, unsound, write_notebook
from tests.faults.trial import Family, unhurt

FOREIGN = (b"", b" ", b"null", b"[]", b"{}", b"[1, 2]", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\xff\xfe{\x00}\x00",
           b"print('hello')",
           b'{"cells": []}', b'{"cells": {}, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
           b'{"cells": [null], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
           b'{"cells": [{"cell_type": "code"}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
           b'{"cells": [{"cell_type": 1, "source": 2, "metadata": 3}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}',
           b'{"cells": [], "metadata": [], "nbformat": 4, "nbformat_minor": 5}', b'{"cells": [], "metadata": {}, "nbformat": "4"}',
           b'{"worksheets": [], "metadata": {}, "nbformat": 2, "nbformat_minor": 0}',
           b'{"cells": [], "metadata": {}, "nbformat": 99}',
           b'{"nbformat": 4' + b"[" * 100_000, b"{" * 100_000, b'{"a":' * 50_000, b"1e999", b'"\\ud800"')


def torn_notebook(number: int, chance: random.Random, place: Path) -> Outcome:
    """The notebook is foreign, cut at some byte, or has bytes changed: one sentence, or it runs as it stands."""
    root = lay_out(place / "p")
    path = root / "usecases" / "late" / "report.ipynb"
    whole = path.read_bytes()
    if number <= len(FOREIGN):
        content = FOREIGN[number - 1]
    elif number % 2:
        content = whole[: chance.randrange(len(whole))]
    else:
        changed = bytearray(whole)
        for _ in range(chance.choice([1, 1, 2, 20])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        content = bytes(changed)
    path.write_bytes(content)
    found = []
    step = ("run", "late", "--only", "report", *RUN[2:], "-p", "late", "1")
    for words in (("check", str(path)), ("run", str(path), "-o", str(root / "out.ipynb")), step):
        done = command(root, *words, AIEXEC_KERNELS="cold")
        findings = words[0] == "check" and done.returncode == 1 and "Traceback" not in done.stderr
        in_cell = any(word in done.stderr for word in ("Step report failed", "failed (error in cell)", "failed (output)"))
        found += [] if done.returncode == 0 or findings or in_cell else [f"{words[0]}: {one}" for one in rough(done)]
    return Outcome(not found, "; ".join([repr(content[:60]), *found]))


NAMES = ("__class__", "a b", "a;b", "x=1\nimport os", "late'", "import", "None", "mönth", "🛫", "a" * 10_000,
         "--help", "", "{}", "late\u202e", "month ")
VALUES = ("'; import os; os.system('touch hacked') #", '"""', "\\", "\\N{BELL}", "\n", "\r\n", "\t", "\x1b[31mred", "{{ x }}", "{x}",
          "%s", "$(touch hacked)", "`touch hacked`", "../../etc/passwd", "x" * 100_000, "🛫", "\u202eabc", "\ufeff", "NaN", "1e999",
          "true", "null", "2013-05-01", "-p", "", " ", "env:HOME", "file:/etc/passwd", "{'a': 1}", "[1, 2]", "\x7f", "\u2028", "'",
          '"', "#", "\\u0041", "{%% raw %%}", "<script>alert(1)</script>")
ECHO = [("parameters", "text: str = ''"), ("", "import json, pathlib\npathlib.Path('said.json').write_text(json.dumps(text))"),
        ("outputs", "text: str")]


def hostile(number: int, chance: random.Random, place: Path) -> Outcome:
    """A parameter has a hostile name: refused in a sentence; or a hostile value: it arrives as it is, and is not carried out."""
    root = lay_out(place / "p")
    write_notebook(root / "echo.ipynb", ECHO)
    if number <= len(NAMES):
        done, shown = command(root, "run", "echo.ipynb", "-p", NAMES[number - 1], "1", AIEXEC_KERNELS="cold"), NAMES[number - 1]
        found = [] if done.returncode == 2 and "Traceback" not in done.stderr else rough(done)
    else:
        shown = value = VALUES[(number - len(NAMES) - 1) % len(VALUES)]
        done = command(root, "run", "echo.ipynb", "-p", "text", value, AIEXEC_KERNELS="cold")
        said = json.loads((root / "said.json").read_text()) if (root / "said.json").exists() else None
        other = rough(done) if said is None else [f"it arrived as {said[:80]!r}"]
        found = [] if done.returncode == 0 and said == value else other
    found += ["it was carried out"] if any(path.name == "hacked" for path in root.rglob("*")) else []
    return Outcome(not found, "; ".join([repr(shown[:40]), *found]))


FLIPS = 100


def flipped(number: int, chance: random.Random, place: Path) -> Outcome:
    """Each byte in turn of what a run keeps, and some bits at random: verify finds it; a run again has the right result."""
    root = lay_out(place / "p")
    done = command(root, *RUN, AIEXEC_KERNELS="cold")
    found = [] if done.returncode == 0 else [done.stderr]
    ledger = ledger_of(root)
    run = ledger.rows(RUNS)[0]["run"]
    kept = sorted(path for path in (root / ".aiexec" / "runs").rglob("*") if path.is_file())
    unseen = 0
    for _ in range(FLIPS):
        path = chance.choice(kept)
        whole = path.read_bytes()
        at, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        if not verify_run(ledger, run):
            unseen += 1
            found.append(f"not seen: byte {at} of {path.relative_to(root)}, {whole[max(0, at - 20):at + 20]!r}")
        path.write_bytes(whole)
    frame = next(path for path in kept if path.suffix == ".parquet")
    torn = bytearray(frame.read_bytes())
    torn[chance.randrange(len(torn))] ^= 1 << chance.randrange(8)
    frame.write_bytes(torn)
    again = command(root, *RUN, AIEXEC_KERNELS="cold")
    found += [] if again.returncode == 0 else [again.stderr]
    frame.write_bytes(frame.read_bytes())
    newest = ledger.rows(RUNS, order="-started")[0]["run"]
    found += [f"again: {one}" for one in verify_run(ledger, newest)]
    found += [] if known(root)[newest, "make"] else ["the torn table was taken from the cache"]
    return Outcome(not found, "; ".join([f"{FLIPS - unseen} of {FLIPS} found", *found[:5]]), facts={"edits": FLIPS})


def flipped_ledger(number: int, chance: random.Random, place: Path) -> Outcome:
    """A bit of the ledger's own file flips: a command comes through or says one sentence; nothing else."""
    root = lay_out(place / "p")
    command(root, *RUN, AIEXEC_KERNELS="cold")
    path = root / ".aiexec" / ("ledger.db", "ledger.db", "ledger.db", "ledger.head", "ledger.key")[number % 5]
    whole, found, shown = path.read_bytes(), [], ""
    at = chance.randrange(len(whole))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1:])
    for words in (("runs",), ("verify",), ("audit",), RUN, ("doctor",)):
        done = command(root, *words, AIEXEC_KERNELS="cold")
        shown += f" {words[0]} {done.returncode}"
        told = words[0] in ("verify", "audit", "doctor") and done.returncode == 1
        odd = any(word in done.stderr + done.stdout for word in ("Traceback", "Unexpected"))
        found += [] if done.returncode == 0 or told and not odd else [f"{words[0]}: {one}" for one in rough(done)]
    path.write_bytes(whole)
    return Outcome(not found, "; ".join([f"byte {at} of {path.name}:{shown}", *found]), facts={"edits": 1})


FAMILIES = [
    Family("notebooks", "foreign, cut and changed notebooks are checked and run: one sentence, or they run as they stand",
           torn_notebook, lambda: range(1, 201), (20, 31)),
    Family("hostile", "parameters with hostile names are refused; hostile values arrive as they are and are not carried out",
           hostile, lambda: range(1, len(NAMES) + len(VALUES) + 1), (16,)),
    Family("bits", "one bit flips in a kept notebook, table or record: verify finds it; a torn table is made again",
           flipped, lambda: range(1, 101)),
    Family("ledger-bits", "one bit flips in the ledger, its head or its key: each command comes through or says one sentence",
           flipped_ledger, lambda: range(1, 101)),
]
