"""Four eyes: nobody promotes alone where the risk is high, whatever they try and whichever face they use."""

import json
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from aiexec.errors import ApprovalError
from aiexec.govern.approvals import APPROVALS, approvals, approve, go_live, revoke
from aiexec.govern.audit import verify_chain
from aiexec.model.gates import compare, record_gate
from aiexec.model.registry import VERSIONS, champion, find_version, history, promote, register, tree_digest
from aiexec.run.records import RUNS
from aiexec.settings import Settings
from aiexec.store import now, open_ledger

from .conftest import aiexec

USECASE = """
name: loans
title: Refuse a loan
department: credit
owner: credit@example.org
risk: high
success: [{metric: roc_auc, at_least: 0.6}]
value: {currency: EUR, true_positive: 1, false_positive: -1, false_negative: 0, true_negative: 0, cost_per_month: 1}
model: {name: loans, gate: {segments: [region], fairness: {waived: these are loans to firms}}}
"""


def at(root: Path, actor: str):
    return open_ledger(Settings(root, actor=actor))


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    "A project of high risk, with two versions that ada registered and whose gates passed."
    tmp_path = tmp_path_factory.mktemp("loans")
    (tmp_path / "settings.ini").write_text("[aiexec]\n")
    (tmp_path / "usecases" / "loans").mkdir(parents=True)
    (tmp_path / "usecases" / "loans" / "usecase.yaml").write_text(USECASE)
    chance, ledger = np.random.default_rng(0), at(tmp_path, "ada")
    rows = pd.DataFrame({"debt": chance.normal(0, 1, 1000)})
    lost = (chance.random(1000) < 0.5 + rows["debt"] / 6).astype(int)
    for strength in (0.1, 1.0):
        model = LogisticRegression(C=strength).fit(rows, lost)
        version = register("loans", model, rows, metrics={"roc_auc": 0.66}, trained_on={"window": "2026-10"}, ledger=ledger)
        record_gate(ledger, "loans", version, compare(lost, chance.random(1000), model.predict_proba(rows)[:, 1]), against=None)
    return tmp_path


@pytest.fixture
def loans(once, tmp_path) -> Path:
    "The same, to be changed."
    return shutil.copytree(once, tmp_path / "loans")


def refused(root: Path, words: str, version: int = 2, actor: str = "ada", **given) -> None:
    "A promotion is refused in a sentence, and nothing was moved."
    ledger = at(root, actor)
    before = history("loans", ledger)
    with pytest.raises(ApprovalError, match=words):
        go_live("loans", version, reason="better", ledger=ledger, **given)
    assert history("loans", ledger) == before


def test_no_approval_no_promotion_and_no_way_round(loans):
    refused(loans, "waits for another person's approval: nobody has approved it")
    refused(loans, "waits for another person's approval", override=True)
    with pytest.raises(ApprovalError, match="with another person's approval only"):
        promote("loans", 2, reason="the library itself", ledger=at(loans, "ada"))
    with pytest.raises(ApprovalError, match="with another person's approval only"):
        promote("loans", 2, reason="a share of the traffic", alias="canary", ledger=at(loans, "ada"))
    assert promote("loans", 2, reason="to be compared", alias="challenger", ledger=at(loans, "ada")).version == 2
    assert champion("loans", at(loans, "ada")) is None


@pytest.mark.parametrize("actor", ["ada", "Ada", " ada ", "ａｄａ"])
def test_nobody_approves_what_they_made(loans, actor):
    with pytest.raises(ApprovalError, match="somebody else has to approve it"):
        approve("loans", 2, reason="mine", ledger=at(loans, actor))
    assert approvals("loans", 2, at(loans, "ada")) == []


def test_who_started_the_run_that_trained_it_made_it_too(loans):
    ledger = at(loans, "ada")
    with ledger.change("test.run", "r1", tables=(RUNS, VERSIONS)) as change:
        change.insert(RUNS, {"run": "r1", "usecase": "loans", "status": "done", "started": now(), "actor": "grace"})
        change.update(VERSIONS, {"run": "r1"}, model="loans", version=2)
    with pytest.raises(ApprovalError, match="grace made loans version 2"):
        approve("loans", 2, reason="looked at", ledger=at(loans, "grace"))
    approve("loans", 2, reason="looked at", ledger=at(loans, "linus"))
    assert go_live("loans", 2, reason="better", ledger=ledger).evidence["approval"]["actor"] == "linus"


def test_who_approved_does_not_promote(loans):
    approve("loans", 2, reason="looked at", ledger=at(loans, "grace"))
    refused(loans, "grace made or promotes it, and cannot be the other person", actor="grace")
    assert go_live("loans", 2, reason="better", ledger=at(loans, "ada")).version == 2


def test_an_approval_expires(loans):
    ledger = at(loans, "grace")
    approve("loans", 2, reason="looked at", expires="1m", ledger=ledger)
    past = (datetime.now(timezone.utc) - timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    with ledger.change("test.later", "loans", tables=(APPROVALS,)) as change:
        change.update(APPROVALS, {"expires": past}, model="loans", version=2)
    refused(loans, "the approval by grace expired on")


def test_a_revoked_approval_does_not_hold(loans):
    approve("loans", 2, reason="looked at", ledger=at(loans, "grace"))
    revoke("loans", 2, reason="May was a holiday", ledger=at(loans, "linus"))
    refused(loans, "was revoked by linus: May was a holiday")


def test_an_approval_is_for_one_version_its_files_and_one_promotion(loans):
    approve("loans", 1, reason="looked at", ledger=at(loans, "grace"))
    refused(loans, "nobody has approved it", version=2)
    ledger = at(loans, "ada")
    tree = ledger.settings.home / find_version("loans", 1, ledger)["source"]
    (tree / "more").write_text("other files, and a record that was forged to fit them")
    with ledger.change("test.forged", "loans", tables=(VERSIONS,)) as change:
        change.update(VERSIONS, {"digest": tree_digest(tree)}, model="loans", version=1)
    refused(loans, f"approved other files: .{{12}}, not {tree_digest(tree)[:12]}", version=1)
    approve("loans", 2, reason="looked at", ledger=at(loans, "grace"))
    go_live("loans", 2, reason="better", ledger=ledger)
    approve("loans", 1, reason="the new files", ledger=at(loans, "grace"))
    refused(loans, "asks for gate", version=1, expect=2)  # no gate has judged the forged files
    go_live("loans", 1, reason="an experiment", override=True, ledger=ledger)
    refused(loans, "the approval by grace was used already", version=2)


def test_one_rejection_outweighs_until_it_is_lifted_by_who_gave_it(loans):
    approve("loans", 2, reason="looked at", ledger=at(loans, "grace"))
    approve("loans", 2, reason="the north is missing", reject=True, ledger=at(loans, "linus"))
    refused(loans, "linus rejected it: the north is missing")
    approve("loans", 2, reason="once more", ledger=at(loans, "grace"))
    refused(loans, "linus rejected it")
    approve("loans", 2, reason="the north was added", ledger=at(loans, "linus"))
    assert go_live("loans", 2, reason="better", ledger=at(loans, "ada")).version == 2


def test_a_rejection_is_not_lifted_by_somebody_else(loans):
    approve("loans", 2, reason="the north is missing", reject=True, ledger=at(loans, "linus"))
    with pytest.raises(ApprovalError, match="Ask linus, who rejected it"):
        revoke("loans", 2, reason="it is fine", ledger=at(loans, "grace"))


def test_everything_stands_in_the_chain_and_is_told_by_the_command(loans):
    def typed(*words, actor="ada", code=0):
        done = aiexec(*words, cwd=loans, AIEXEC_ACTOR=actor)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    assert "waits for another person's approval" in typed("promote", "loans", 2, "--reason", "better", code=1)
    assert "somebody else has to approve it" in typed("approve", "loans", 2, "--reason", "mine", code=1)
    assert "No approval holds: nobody has approved it." in typed("approve", "loans", 2, actor="grace")
    assert "An approval by grace holds until" in typed("approve", "loans", 2, "--reason", "looked at every region", actor="grace")
    assert "Champion of loans: version 2" in typed("promote", "loans", 2, "--reason", "better")
    told = json.loads(typed("models", "loans", "--at", f"{datetime.now(timezone.utc):%Y-%m-%d}", "--json"))
    assert (told["champion"], told["move"]["actor"], told["approval"]["actor"], told["gate"]["outcome"]) == (2, "ada", "grace", "pass")
    shown = typed("models", "loans", "--at", "2999-01-01")
    assert "by ada: better" in shown and "looked at every region" in shown and told["digest"] in shown
    assert "had no champion" in typed("models", "loans", "--at", "2020-01-01")
    ledger = at(loans, "ada")
    assert [event.actor for event in ledger.events(kind="approval.given")] == ["grace"]
    assert verify_chain(ledger).ok
