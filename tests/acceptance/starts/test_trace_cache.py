"""A folder of traces makes a second start skip tracing; what is stale or damaged in it is refused and made anew."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc.compiler.driver.calls import program_cache as entries
from shardc.compiler.driver.saved import fingerprint
from shardc.compiler.driver.saved.trace_folder import FOLDER
from shardc.compiler.trace.trace import trace
from tests.agree import lowering_of

PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


class Net(nn.Sequential):
    def __init__(self, negative: float = 0.1) -> None:
        super().__init__(nn.Linear(6, 8), nn.LeakyReLU(negative), nn.Linear(8, 6))


class Counted:
    """Traces, and counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, *args, **options):
        self.made += 1
        return trace(*args, **options)


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setenv(FOLDER, str(tmp_path / "traces"))
    return Counted()


def started(traces: Counted, negative: float = 0.1, rows: int = 4):
    torch.manual_seed(0)
    net = shardc.compile(Net(negative), PLAN, mesh=shardc.Mesh(tp=2))
    lowering_of(net).tracing.trace = traces
    out = net(torch.ones(rows, 6))
    out.sum().backward()
    return net, out, [p.grad for p in net.parameters()]


def entry(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "traces").iterdir()
    return found


def test_a_second_start_does_not_trace(traces):
    first, second = started(traces), started(traces)
    assert traces.made == 1
    assert str(first[0].programs[0]) == str(second[0].programs[0])
    assert torch.equal(first[1], second[1])
    for have, want in zip(second[2], first[2], strict=True):
        assert torch.equal(have, want)


def test_another_call_has_an_entry_of_its_own(traces, tmp_path):
    started(traces)
    started(traces, rows=8)
    assert traces.made == 2 and len(list((tmp_path / "traces").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace("aten.mm", "aten.bmm").replace("leaky_relu", "relu"),
        lambda content: json.dumps({**json.loads(content), "format": "shardc programs 0"}),
    ],
)
def test_a_damaged_entry_is_refused_and_made_anew(damage, traces, tmp_path, caplog):
    started(traces)
    whole = entry(tmp_path).read_text()
    assert damage(whole) != whole
    entry(tmp_path).write_text(damage(whole))
    with caplog.at_level(logging.WARNING, "shardc.compiler.driver.saved.trace_folder"):
        started(traces)
    assert traces.made == 2 and "refused" in caplog.text
    started(traces)
    assert traces.made == 2 and entry(tmp_path).read_text() == whole


def test_an_entry_of_another_module_is_refused_and_made_anew(traces, caplog):
    started(traces)
    with caplog.at_level(logging.WARNING, "shardc.compiler.driver.saved.trace_folder"):
        _, out, _ = started(traces, 0.5)
    assert traces.made == 2 and "refused" in caplog.text and "module" in caplog.text
    torch.manual_seed(0)
    torch.testing.assert_close(out, Net(0.5)(torch.ones(4, 6)))


def test_an_entry_of_another_tracer_is_refused_and_made_anew(traces, caplog, monkeypatch, tmp_path):
    started(traces)
    rooms = tmp_path / "compiler"
    shutil.copytree(fingerprint.ROOMS, rooms)
    monkeypatch.setattr(fingerprint, "ROOMS", rooms)
    for file, again in (("plan/settle.py", 0), ("trace/capture.py", 1), ("rules/checks.py", 1)):
        (rooms / file).write_text((rooms / file).read_text() + "# a change\n")
        fingerprint.tracer.cache_clear()
        with caplog.at_level(logging.WARNING, "shardc.compiler.driver.saved.trace_folder"):
            before = traces.made
            started(traces)
        assert traces.made - before == again
    assert "the tracer" in caplog.text
    fingerprint.tracer.cache_clear()


def test_nothing_is_kept_where_no_folder_is_named(traces, monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, "")
    started(traces)
    started(traces)
    assert traces.made == 2 and not (tmp_path / "traces").exists()


def test_programs_are_kept_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(entries, "PROGRAMS", 2)
    net = shardc.compile(Net(), PLAN, mesh=shardc.Mesh(tp=2))
    for rows in (2, 4, 2, 6):  # the call of four rows is forgotten
        net(torch.ones(rows, 6))
    assert len(net.programs) == 2
    kept = list(net.programs)
    net(torch.ones(2, 6))
    assert net.programs == kept
    net(torch.ones(4, 6))
    assert len(net.programs) == 2 and net.programs != kept
