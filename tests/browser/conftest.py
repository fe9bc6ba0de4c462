"""A browser for a module's tests; without one they are skipped, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, found


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    if not os.environ.get("SHARDC_BROWSER"):
        pytest.skip("these start a browser: run `make test-browser`")
    if found() is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or run `make test-browser`, which tries to")
    with Chromium() as running:
        yield running
