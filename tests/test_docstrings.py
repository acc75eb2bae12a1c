"""The examples in docstrings run, in the package as it is imported."""

import doctest
import importlib
import pkgutil

import onstep
import onstep.callbacks
import pytest

MODULES = sorted(
    module.name
    for package in (onstep, onstep.callbacks)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    results = doctest.testmod(module, optionflags=flags, verbose=False)
    assert not results.failed
