"""Maps the folders compiler, passes, runtime and tools to shardc.* at build time."""

from setuptools import find_packages, setup

PARTS = ("compiler", "passes", "runtime", "tools")
setup(
    packages=[
        "shardc",
        *(f"shardc.{p}" for p in PARTS),
        *(f"shardc.{p}.{q}" for p in PARTS for q in find_packages(p)),
    ],
    package_dir={"shardc": "shardc", **{f"shardc.{p}": p for p in PARTS}},
)
