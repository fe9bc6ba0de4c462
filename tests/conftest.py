"""What holds for every test: one thread, one seed, loopback only, and no second copy of the package."""

import os
import random
import sys

# Ranks started by a test inherit these.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# Without SHARDC_FUZZ the draws are the same on every run, so a red build is about the change at hand.
FUZZ = int(os.environ.get("SHARDC_FUZZ", "0"))
settings.register_profile(
    "shardc", max_examples=FUZZ or 50, derandomize=not FUZZ, database=None, deadline=None, print_blob=True
)
settings.load_profile("shardc")

PARTS = {"compiler", "passes", "runtime", "tools"}


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """The longest test goes first: where tests run side by side, it would go on alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_property.py")


def pytest_sessionfinish(session: pytest.Session):
    doubled = sorted(PARTS & set(sys.modules))
    if doubled:
        pytest.exit(f"imported beside shardc.*, a second copy: {', '.join(doubled)}", returncode=1)
