"""What a person writes wrongly is refused in one sentence, with the next step, and nothing on disk is changed."""

from pathlib import Path

import pandas as pd
import pytest

from aiexec.data.contracts import check, load_contract
from aiexec.data.datasets import read
from aiexec.data.sources import read_frame
from aiexec.define.metrics import check_success
from aiexec.define.usecase import list_usecases, load_usecase
from aiexec.errors import AiexecError, DataError, SpecificationError
from aiexec.files import digest
from aiexec.settings import load_settings
from .conftest import aiexec

ROOT = Path(__file__).parents[1]
WORKED = ROOT / "templates" / "usecases" / "flight_delays" / "usecases" / "flight_delays"

USECASE = """\
name: flight_delays
title: Warn passengers and crews of late arrivals
department: operations
owner: ops-analytics@example.org
risk: limited
success:
  - {metric: roc_auc, at_least: 0.64}
  - {metric: value_per_1000, at_least: 400}
value: {currency: USD, true_positive: 38, false_positive: -9, false_negative: 0, true_negative: 0, cost_per_month: 2500}
pipeline:
  ingest: {notebook: ingest.ipynb}
  train:  {notebook: train.ipynb, with: {flights: ingest.flights}, trigger: train}
model:   {name: flight_delays, gate: {beats: champion, confidence: 0.95, segments: [carrier]}}
monitor: {window: month, label_delay: 1 month, psi: {watch: 0.1, act: 0.25}, breach: 2 of 3}
decide:  {policy: policy.yaml, hold_out: 0.1, deliver: operations}
schedule: "0 6 1 * *"
"""
CONTRACT = """\
columns:
  flight:  {type: int, minimum: 1}
  carrier: {type: text, allowed: [AA, UA]}
  day:     {type: date, minimum: 2013-01-01, maximum: 2013-12-31}
key: [carrier, flight, day]
forbidden: {dep_delay: known only after departure, arr_delay: known only after landing}
minimum_rows: 2
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.fixture
def project(tmp_path) -> Path:
    folder = tmp_path / "usecases" / "flight_delays"
    folder.mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    (folder / "usecase.yaml").write_text(USECASE)
    (folder / "contract.yaml").write_text(CONTRACT)
    return tmp_path


@pytest.fixture
def flights() -> pd.DataFrame:
    return pd.DataFrame({"flight": [1545, 1714, 1141], "carrier": ["UA", "UA", "AA"], "day": ["2013-01-01"] * 3})


def refused(project: Path, doing, kind: type[AiexecError], *words: str) -> None:
    """Doing it raises one sentence of the right kind with these words and a next step, and the project stays as it is."""
    before = digest(project)
    with pytest.raises(kind) as caught:
        doing()
    said = str(caught.value)
    for word in words:
        assert word in said, said
    assert caught.value.remedy, "no next step"
    assert "\n" not in said and len(said) < 600, said
    assert digest(project) == before, "something was written"


def test_what_is_right_is_accepted(project, flights):
    assert [usecase.name for usecase in list_usecases(load_settings(project))] == ["flight_delays"]
    contract = load_contract(project / "usecases" / "flight_delays" / "contract.yaml")
    assert len(check(flights, contract).clean) == 3


def test_the_worked_use_case_is_accepted():
    check_success(load_usecase(WORKED))
    assert "arr_delay" in load_contract(WORKED / "contract.yaml").forbidden


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        # unknown keys, at every depth
        ("department:", "departement:", ["unknown key 'departement'", "Did you mean 'department'?"]),
        ("true_positive:", "true_positve:", ["unknown key 'value.true_positve'", "Did you mean 'true_positive'?"]),
        ("at_least: 0.64", "at_leest: 0.64", ["unknown key 'success[0].at_leest'", "Did you mean 'at_least'?"]),
        ("with:", "wiht:", ["unknown key 'pipeline.train.wiht'", "Did you mean 'with'?"]),
        ("confidence:", "confidance:", ["unknown key 'model.gate.confidance'", "Did you mean 'confidence'?"]),
        ("watch: 0.1", "wach: 0.1", ["unknown key 'monitor.psi.wach'", "Did you mean 'watch'?"]),
        ("hold_out:", "holdout:", ["unknown key 'decide.holdout'", "Did you mean 'hold_out'?"]),
        ("department:", "on:", ["unknown key 'True'"]),  # YAML 1.1 reads on, off, yes and no as truths
        # repeated keys
        ("risk: limited", "risk: limited\nrisk: minimal", ["line 6", "key 'risk' stands twice"]),
        ("true_negative: 0", "true_positive: 0", ["line 9", "key 'true_positive' stands twice"]),
        # wrong types
        ("true_positive: 38", "true_positive: many", ["'value.true_positive' is 'many'", "It should be a number."]),
        ("true_positive: 38", "true_positive: '38'", ["'value.true_positive' is '38'", "It should be a number."]),
        ("true_positive: 38", "true_positive: .nan", ["'value.true_positive' is nan", "a finite number"]),
        ("hold_out: 0.1", "hold_out: yes", ["'decide.hold_out' is True", "It should be a number."]),
        ("hold_out: 0.1", "hold_out: 1.5", ["'decide.hold_out' is 1.5", "less than 1"]),
        ("title: Warn passengers and crews of late arrivals", "title: 3", ["'title' is 3", "It should be a string."]),
        ("risk: limited", "risk: medium", ["'risk' is 'medium'", "'minimal', 'limited' or 'high'"]),
        ("owner: ops-analytics@example.org", "owner: the team", ["'owner' is 'the team'", "an e-mail address"]),
        ("currency: USD", "currency: dollars", ["'value.currency' is 'dollars'", "such as USD"]),
        ("breach: 2 of 3", "breach: 3 of 2", ["A breach of '3 of 2' can never happen"]),
        ("label_delay: 1 month", "label_delay: soon", ["'monitor.label_delay' is 'soon'", "such as '1 month'"]),
        ('"0 6 1 * *"', "monthly", ["'schedule' is 'monthly'", "the five fields of cron"]),
        (", at_least: 0.64", "", ["needs at_least or at_most"]),
        # what is missing, or leads away
        ("owner: ops-analytics@example.org\n", "", ["'owner' is missing"]),
        ("name: flight_delays\ntitle", "name: flights\ntitle", ["the name is 'flights'", "the folder is 'flight_delays'"]),
        ("train.ipynb", "../../../etc/train.ipynb", ["Name a file in the folder of the use case."]),
        ("train.ipynb", "train.py", ["Name a notebook, ending in .ipynb."]),
        ("policy: policy.yaml", "policy: /etc/passwd", ["Name a file in the folder of the use case."]),
        ("ingest: {", "../ingest: {", ["'pipeline.../ingest'", "a plain name"]),
    ],
)
def test_a_slip_in_a_use_case(project, right, wrong, words):
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    assert right in USECASE
    path.write_text(USECASE.replace(right, wrong, 1))
    settings = load_settings(project)
    refused(project, lambda: load_usecase("flight_delays", settings), SpecificationError, "usecase.yaml", *words)
    refused(project, lambda: list_usecases(settings), SpecificationError, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (BOMB, ["line 2", "alias '*a' is not allowed"]),
        ("name: &n flight_delays\ntitle: *n\n", ["alias '*n' is not allowed"]),
        ("name: !!python/object/apply:os.system ['touch owned']\n", ["could not determine a constructor"]),
        ("name: !!python/name:os.system\n", ["could not determine a constructor"]),
        ("name: !include /etc/passwd\n", ["could not determine a constructor"]),
        ("? [a, b]\n: 1\n", ["line 1"]),
        ("- name\n- title\n", ["holds no mapping"]),
        ("", ["holds no mapping"]),
        ("just a sentence", ["holds no mapping"]),
        ("name: [unclosed\n", ["line 2"]),
        ("name:\n\ttitle: x\n", ["line 2"]),
        ("name: 2013-13-45\n", ["usecase.yaml"]),
        ("name: " + "[" * 5000 + "]" * 5000 + "\n", ["usecase.yaml"]),
        (b"name: \xff\xfe\n", ["usecase.yaml"]),
        (b"name: \x00\n", ["usecase.yaml"]),
        ("name: a\n---\nname: b\n", ["usecase.yaml"]),
    ],
    ids=["bomb", "alias", "object", "name", "include", "list as key", "list", "empty", "sentence", "unclosed", "tab", "date",
         "deep", "not text", "nul", "two documents"],
)
def test_a_file_that_is_no_plain_yaml(project, content, words):
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    settings = load_settings(project)
    refused(project, lambda: load_usecase("flight_delays", settings), SpecificationError, "usecase.yaml", *words)


@pytest.mark.parametrize(("name", "words"), [
    ("flight_delay", ["There is no use case 'flight_delay'", "Did you mean 'flight_delays'?"]),
    ("usecases/other", ["does not exist"]),
])
def test_a_use_case_that_is_not_there(project, name, words):
    settings = load_settings(project)
    refused(project, lambda: load_usecase(name, settings), SpecificationError, *words)


@pytest.mark.parametrize(("line", "words"), [
    ("{metric: roc_auk, at_least: 0.64}", ["names a metric 'roc_auk'", "Did you mean 'roc_auc'?"]),
    ("{metric: brier, at_least: 0.1}", ["brier is better when smaller", "Write at_most."]),
])
def test_a_line_that_could_never_be_missed(project, line, words):
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    path.write_text(USECASE.replace("{metric: roc_auc, at_least: 0.64}", line))
    usecase = load_usecase(path)
    refused(project, lambda: check_success(usecase), SpecificationError, *words)


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("minimum_rows:", "minimum_row:", ["unknown key 'minimum_row'", "Did you mean 'minimum_rows'?"]),
        ("allowed:", "alowed:", ["unknown key 'columns.carrier.alowed'", "Did you mean 'allowed'?"]),
        ("key:", "columns: {}\nkey:", ["key 'columns' stands twice"]),
        ("type: text", "type: string", ["'columns.carrier.type' is 'string'", "'text'"]),
        ("minimum: 1}", "minimum: one}", ["A bound of one does not fit a column of type int"]),
        ("[AA, UA]", "[AA, NO]", ["The allowed value False does not fit a column of type text", "put text in quotes"]),
        ("minimum: 2013-01-01", "minimum: 2014-01-01", ["The minimum 2014-01-01 lies above the maximum 2013-12-31"]),
        ("key: [carrier, flight, day]", "key: [carier]", ["The key names 'carier'", "Did you mean 'carrier'?"]),
        ("forbidden: {dep_delay:", "forbidden: {day:", ["'day' is both promised and forbidden"]),
        ("minimum_rows: 2", "minimum_rows: 0", ["'minimum_rows' is 0", "greater than or equal to 1"]),
    ],
)
def test_a_slip_in_a_contract(project, right, wrong, words):
    path = project / "usecases" / "flight_delays" / "contract.yaml"
    assert right in CONTRACT
    path.write_text(CONTRACT.replace(right, wrong, 1))
    refused(project, lambda: load_contract(path), SpecificationError, "contract.yaml", *words)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.assign(dep_delay=2), ["holds the column 'dep_delay'", "forbidden: known only after departure"]),
        (lambda f: f.assign(**{" Arr_Delay ": 2}), ["'arr_delay'", "known only after landing"]),
        (lambda f: f.assign(dep_delay=2).drop(columns="day"), ["'dep_delay'", "forbidden"]),  # the leak first
        (lambda f: f.head(0), ["has no rows"]),
        (lambda f: f.assign(carrier="XX"), ["has 0 good rows of 3, and 2 are needed", "carrier not allowed (3)"]),
        (lambda f: f.assign(flight=float("nan")), ["has 0 good rows of 3", "flight missing (3)"]),
        (lambda f: f.assign(flight=float("inf")), ["has 0 good rows of 3", "flight not of type int (3)"]),
        (lambda f: f.assign(flight=["x", 1.5, -1]), ["has 0 good rows of 3", "flight not of type int (2)", "flight below 1 (1)"]),
        (lambda f: f.assign(day=20130101), ["has 0 good rows of 3", "day not of type date (3)"]),
        (lambda f: f.loc[[0, 0, 0]], ["has 1 good rows of 3", "carrier flight day seen before (2)"]),
        (lambda f: f.drop(columns="carrier"), ["lacks the column 'carrier'", "Deliver it"]),
        (lambda f: f.rename(columns={"carrier": "carier"}), ["lacks the column 'carrier'", "Did you mean 'carier'?"]),
        (lambda f: f.assign(gate="B12"), ["holds the column 'gate'", "not in the contract", "extra: drop"]),
        (lambda f: pd.concat([f, f[["day"]]], axis=1), ["holds the column 'day' more than once"]),
    ],
    ids=["leak", "leak in disguise", "leak before all", "empty", "every row bad", "all missing", "all infinite", "mixed types",
         "numbers as dates", "twins", "missing column", "misspelt column", "extra column", "column twice"],
)
def test_data_that_is_refused_as_a_whole(project, flights, spoil, words):
    contract = load_contract(project / "usecases" / "flight_delays" / "contract.yaml")
    spoilt = spoil(flights)
    untouched = spoilt.copy(deep=True)
    refused(project, lambda: check(spoilt, contract, "flights.csv"), DataError, "flights.csv", *words)
    pd.testing.assert_frame_equal(spoilt, untouched)


@pytest.mark.parametrize(("content", "words"), [
    (None, ["does not exist"]),
    (b"", ["is empty"]),
    (b"flight,carrier\n", ["has no rows"]),
    (b"\x89PNG\r\n\xff\xfe", ["cannot be read"]),
    (b'flight,carrier\n1,"UA\n', ["cannot be read"]),
])
def test_a_data_file_that_is_not_whole(project, content, words):
    path = project / "flights.csv"
    if content is not None:
        path.write_bytes(content)
    refused(project, lambda: read_frame(path), DataError, "flights.csv", *words)


def test_a_month_with_no_data_says_how_to_make_it(project, monkeypatch):
    monkeypatch.chdir(project / "usecases" / "flight_delays")
    monkeypatch.delenv("AIEXEC_ROOT", raising=False)
    monkeypatch.delenv("AIEXEC_USECASE", raising=False)
    with pytest.raises(DataError, match="flight_delays has no ingest.flights of 2013-04.*aiexec run flight_delays --only ingest"):
        read("ingest.flights@2013-04")


@pytest.mark.parametrize("words", [["check"], ["run", "flight_delays"]], ids=["check", "run"])
def test_the_command_line_says_one_sentence(project, words):
    path = project / "usecases" / "flight_delays" / "usecase.yaml"
    path.write_text(USECASE.replace("true_positive:", "true_positve:"))
    before = digest(project / "usecases")
    done = aiexec(*words, cwd=project)
    assert done.returncode == 1, done.stdout + done.stderr
    told = done.stdout if words == ["check"] else done.stderr
    assert "unknown key 'value.true_positve'. Did you mean 'true_positive'?" in " ".join(told.split())
    assert "Traceback" not in done.stdout + done.stderr
    assert digest(project / "usecases") == before and not (project / ".aiexec" / "runs").exists()
