"""`shardc demo`: its curves agree to rounding, and it says so when they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardc
from shardc.tools.demo import demo


@pytest.mark.ranks
def test_demo_agrees_and_notices_when_it_does_not(tmp_path: Path, monkeypatch, capsys):
    ran: list[list[demo.Run]] = []  # the ranks run once; then the same answer, one loss altered

    def launch(fn, nproc, args):
        if not ran:
            ran.append(real(fn, nproc, args))
        return ran[0]

    real = shardc.launch
    monkeypatch.setattr(shardc, "launch", launch)
    picture, page = tmp_path / "demo.png", tmp_path / "demo.html"
    assert demo.demo(3, picture, page) == 0
    shown = capsys.readouterr().out
    assert "all_reduce" in shown and "4,544,512" in shown and "differ" not in shown.split("A sample:")[1]
    assert picture.stat().st_size > 5_000 and page.stat().st_size > 100_000
    ran[0][0].losses[1] += 1e-5
    assert demo.demo(3, picture, page) == 1
    assert "The curves differ by 1.0e-05" in capsys.readouterr().out
