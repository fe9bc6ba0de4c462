"""A folder of traced modules, so that a second start does not trace: `SHARDC_CACHE=folder`.

An entry is a file of saved programs (`saved.py`: JSON, never code or pickle) for one call. It is found by the call,
mesh, plan and options; what else it was made from (the module's source, versions) stands in it and is compared. A
stale or damaged entry is refused, which is logged, and written anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from shardc.compiler.driver.calls.call_keys import text_key
from shardc.compiler.driver.saved.saved_programs import Traces, found_by, load, save
from shardc.compiler.errors import PlanError, ShardingError
from shardc.compiler.ir.signature import Reads, Traced

log = logging.getLogger(__name__)
FOLDER = "SHARDC_CACHE"  # environment variable; unset or empty: nothing is kept


def find(key: str, about: Mapping[str, str], reads: Reads) -> Traced | None:
    """What tracing gave for this call in another process, if it is there and still holds."""
    held = Traces()
    try:
        load(_path(key, about), held, about, reads)
        return held.find(key)
    except FileNotFoundError:
        return None
    except (PlanError, OSError) as error:
        log.warning("a cached trace is refused, and the module traced again: %s", error)
        return None


def keep(key: str, traced: Traced, about: Mapping[str, str]) -> None:
    """Write an entry. What cannot be written (an operator without a name, a full disk) is traced at every start."""
    path, held = _path(key, about), Traces()
    held.keep(key, traced)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, held, {}, about)
    except (ShardingError, OSError) as error:
        log.warning("a trace is not cached: %s", error)


def on() -> bool:
    return bool(os.environ.get(FOLDER))


def _path(key: str, about: Mapping[str, str]) -> Path:
    return Path(os.environ[FOLDER]) / f"{text_key(key, sorted(found_by(about).items()))}.json"
