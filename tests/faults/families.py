"""All families of faults, in the order in which they are tried."""

from tests.faults import crash, disk, hangs, rubbish, serving, starts

FAMILIES = {family.name: family for module in (crash, hangs, starts, disk, rubbish, serving) for family in module.FAMILIES}
