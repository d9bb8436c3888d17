"""Help answers at once: nothing heavy is imported for it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "zarr", "numpy")
PROBE = f"""
import sys
sys.argv = ["embedcache", *sys.argv[1:]]
from embedcache_cli.app import main
try:
    main()
finally:
    print("heavy:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
COMMANDS = (
    [],
    ["extract"],
    ["train"],
    ["eval"],
    ["generate"],
    ["info"],
    ["inspect"],
    ["verify"],
    ["delete"],
    ["merge"],
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command) or "(none)")
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert done.stderr == "heavy: []\n"


@pytest.mark.parametrize("command", [[], ["extract"]], ids=["(none)", "extract"])
def test_help_takes_less_than_three_tenths_of_a_second(command: list[str]) -> None:
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(
            [sys.executable, "-m", "embedcache_cli", *command, "--help"],
            check=True,
            capture_output=True,
        )
        taken.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(taken) < 0.3, taken


def test_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedcache_cli", "--version"], capture_output=True, text=True
    )
    assert done.stdout.startswith("embedcache 0.")
