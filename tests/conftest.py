"""For every test.

Hypothesis looks for wrong answers, not for slow ones, since other work may run beside, and at the same cases each time: new ones
are looked for with `--hypothesis-profile=search`, where a find stops nobody's landing.

With pytest-xdist (`-n 2 --dist loadgroup`) whatever starts processes or waits for clocks is in one of two groups, each on one
worker, one after the other; every other file is a group of its own.
"""

import os
import sys
import types

import pytest
from hypothesis import settings

# Before NumPy is imported: threads of a matrix product wait for each other by spinning, which on a busy machine costs ten times
# the product, and the trainer has threads of its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# transformers imports torchvision where it is installed. Its wheels are built for torch's of a GPU: beside those of the CPU, this
# part, which nothing here uses, fails and takes all of transformers with it.
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

settings.register_profile("patient", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("patient")

_PROCESSES = {
    "servers": ("tests/docs/", "tests/plugin/", "tests/serve/"),
    "stages": (
        "tests/bench/",
        "tests/faults/",
        "tests/fetch/",
        "tests/runtime/",
        "tests/test_cli.py",
        "tests/test_link_cut.py",
        "tests/test_system.py",
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Name every test's group."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        group = next((name for name, files in _PROCESSES.items() if file.startswith(files)), file)
        item.add_marker(pytest.mark.xdist_group(group))
