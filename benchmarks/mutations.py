"""Mutations: whether a test notices when a protection is taken out of the code.

Each mutation in `mutation_list.py` removes one barrier, copy, lock, fsync, time limit or comparison from a copy of the
package, and runs the tests that should notice. If all of them pass, the mutation has survived: write a test, or delete
the code. First, the same tests have to pass with the unchanged package.

    python benchmarks/mutations.py                   # all, about half an hour
    python benchmarks/mutations.py --short           # three, as a check of this script
    python benchmarks/mutations.py --only storage/   # those of which the table shows this text

The exit status is the number of survivors.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutation_list import MUTATIONS

ROOT = Path(__file__).parent.parent
LIMIT = 200
"""Seconds for the tests of one mutation. A mutation that makes them hang is noticed."""
SHORT = ("exact means", "the best value from NaN and infinities", "a final stop from being lost")
"""What the mutations of the short form take the protection from."""


@dataclass(frozen=True)
class Mutation:
    """One change of the code.

    Attributes:
        file: below the project, such as `engine/loop.py`.
        protects: what the removed code protects.
        old: the code, which occurs exactly once in the file.
        new: what replaces it.
        tests: the tests that should fail, as for pytest in `tests/`.
    """

    file: str
    protects: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.file:<28} {self.protects}"

    @property
    def node_ids(self) -> list[str]:
        return [f"tests/{test}" for test in shlex.split(self.tests)]

    def apply(self, text: str) -> str:
        """Return the changed text of the file."""
        if text.count(self.old) != 1:
            raise SystemExit(f"{self.file} needs this exactly once, has it {text.count(self.old)} times:\n{self.old}")
        return text.replace(self.old, self.new)


class Package:
    """A copy of the package that can be changed without changing this project."""

    def __init__(self, folder: str):
        self._folder, package = folder, Path(folder, "onstep")
        shutil.copytree(ROOT / "engine", package)
        shutil.copytree(ROOT / "callbacks", package / "callbacks")

    def test(self, node_ids: list[str], limit: float | None = LIMIT) -> str:
        """Return the first test that fails with the package as it is, `""` if all pass within the limit."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *node_ids]
        # The folder comes before the installed package, also in the processes that tests start.
        environment = {**os.environ, "PYTHONPATH": self._folder, "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("ONSTEP_ROOT", None)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        running = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
        try:
            output = running.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.communicate()
            return f"no end after {limit} s"
        if running.returncode == 0:
            return ""
        failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return failures[0].split(" - ")[0].split(" ", 1)[1] if failures else f"exit status {running.returncode}"

    def test_with(self, mutation: Mutation) -> str:
        """Return the same as `test`, with one change."""
        first, *rest = Path(mutation.file).parts
        path = Path(self._folder, "onstep", *rest if first == "engine" else (first, *rest))
        original = path.read_text()
        path.write_text(mutation.apply(original))
        try:
            return self.test(mutation.node_ids)
        finally:
            path.write_text(original)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="three mutations, to test this script")
    parser.add_argument("--only", help="only mutations of which the table shows this text")
    options = parser.parse_args()
    mutations = [Mutation(file, *change) for file, changes in MUTATIONS.items() for change in changes]
    for mutation in mutations:
        mutation.apply((ROOT / mutation.file).read_text())  # so that the list keeps up with the code
    if options.short:
        mutations = [mutation for mutation in mutations if mutation.protects in SHORT]
    mutations = [mutation for mutation in mutations if (options.only or "") in str(mutation)]
    # A shell's background process ignores Ctrl-C, and so would the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        package, begun = Package(folder), time.monotonic()
        tests = sorted({test for mutation in mutations for test in mutation.node_ids})
        if failure := package.test(tests, limit=None):
            raise SystemExit(f"without a mutation: {failure}")
        for mutation in mutations:
            since = time.monotonic()
            failure = package.test_with(mutation)
            survivors += not failure
            noticed = f"noticed by {failure.removeprefix('tests/')}" if failure else "SURVIVED"
            print(f"{mutation!s:<110} {time.monotonic() - since:4.0f} s  {noticed}", flush=True)
        print(f"{survivors} of {len(mutations)} mutations survived; {time.monotonic() - begun:.0f} s")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
