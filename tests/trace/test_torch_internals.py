"""What is private in torch is in one file, and each name of it has a probe: a new torch is told where it differs."""

import pkgutil
from pathlib import Path

from tests import house

ANNEX = Path(house.__file__).parents[1] / "compiler" / "trace" / "torch_internals.py"
NAMES = sorted({name for _, name in house.uses(ANNEX.read_text()) if house.is_private(name)})


def missing(names: list[str]) -> list[str]:
    def lacks(name: str) -> bool:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            return True
        return False

    return [name for name in names if lacks(name)]


def test_this_torch_has_every_name():
    assert missing(NAMES) == []
    assert missing(["torch._C.nothing", "torch._nowhere.nothing"]) == ["torch._C.nothing", "torch._nowhere.nothing"]


def test_every_probe_holds_and_every_name_has_one(monkeypatch):
    from shardc.compiler.trace import torch_probes as probes

    assert probes.broken() == []
    assert sorted(f"torch.{name}" for names in probes.PROBES.values() for name in names.split()) == NAMES
    monkeypatch.setattr(probes, "is_plain", lambda x: True)
    monkeypatch.setattr(probes, "registry", None)
    lost = [line for line in probes.broken() if "to_fun" in line or "registry" in line]
    assert [line.split(": ")[0] for line in lost] == ["AttributeError", "it does something else"]
