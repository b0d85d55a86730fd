"""All families of faults, in the order in which they are tried."""

from tests.faults import crash, disk, hangs, rubbish, starts

FAMILIES = {family.name: family for module in (crash, hangs, starts, disk, rubbish) for family in module.FAMILIES}
