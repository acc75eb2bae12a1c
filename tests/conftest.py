"""What all tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    parser.addoption("--steps-per-call", type=int, help="of every engine whose test does not say")


def pytest_configure(config):
    if config.option.steps_per_call is not None:
        from onstep import Engine

        Engine.__init__.__kwdefaults__["steps_per_call"] = config.option.steps_per_call
