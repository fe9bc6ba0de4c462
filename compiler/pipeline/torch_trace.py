"""Each pass as an artefact of TORCH_TRACE, so that tlparse shows a program beside what torch itself compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shardc.compiler.trace.torch_internals import trace_structured  # pyright: ignore

if TYPE_CHECKING:
    from shardc.compiler.pipeline.runner import Record


def log_passes(records: Sequence[Record]) -> None:
    """The program's text as traced and after each pass that changed it. Costs nothing where TORCH_TRACE is unset."""
    if not records:
        return
    _log("shardc_0_traced", records[0].before)
    for i, record in enumerate(records, 1):
        if record.after != record.before:
            _log(f"shardc_{i}_{record.name}", record.after)


def _log(name: str, text: str) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,
    )
