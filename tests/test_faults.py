"""A small seeded set of the faults that `make faults` tries in full; figures of the full set stand in tests/faults/REPORT.md."""

import shutil

import pytest

from tests.faults.families import FAMILIES
from tests.faults.trial import try_case

SMALL = [(family.name, number) for family in FAMILIES.values() for number in family.small]


@pytest.mark.parametrize(("name", "number"), SMALL)
def test_a_fault_loses_nothing(name, number):
    assert shutil.which("strace"), "strace is not installed (Debian: apt-get install strace)"
    outcome = try_case(FAMILIES[name], number)
    assert outcome.ok, outcome.says
