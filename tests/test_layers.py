"""Who may know whom: ROOMS of tests/house.py, run over the imports as they are.

Imports inside functions and under TYPE_CHECKING count, and so does reaching a watched name through an
attribute (`torch.distributed.barrier()`).
"""

import pytest

from tests import house


def test_imports_follow_the_rooms():
    kinds = ("up", "circle", "watched", "not written")
    wrong = [fault for fault in house.over() if fault.startswith(kinds)]
    assert not wrong, "\n".join(["the table is ROOMS in tests/house.py", *wrong])


def test_the_walk_reaches_every_part():
    assert {name.split(".")[0] for name in house.sources(*house.PARTS)} == set(house.PARTS)
    assert {house.room_of(name) for name in house.sources(*house.PARTS)} - set(house.PARTS) <= set(house.ROOMS)


REFUSED = {
    "a pass imports the runtime": ("passes.local.fuse", "from shardc.runtime.wire.groups import bind"),
    "a pass imports another pass": ("passes.local.fuse", "from shardc.passes.local.localize import Localize"),
    "a pass imports the list of passes": ("passes.local.fuse", "from shardc.passes import pipeline"),
    "a pass imports rules": ("passes.local.fuse", "from shardc.compiler.rules.table import rule"),
    "a pass imports torch.distributed": ("passes.local.fuse", "import torch.distributed as dist"),
    "a pass reaches torch.distributed": ("passes.local.fuse", "import torch\ntorch.distributed.barrier()"),
    "a pass imports the facade": ("passes.local.fuse", "from shardc import Plan"),
    "a rule imports the mesh": ("compiler.rules.ops.matmul", "from shardc.compiler.spec.mesh import Mesh"),
    "a rule imports specs, for types only": (
        "compiler.rules.ops.matmul",
        "if TYPE_CHECKING:\n    from shardc.compiler.spec.spec import Spec",
    ),
    "the mesh uses fx": ("compiler.spec.mesh", "from torch import fx"),
    "the mesh uses process groups": ("compiler.spec.mesh", "from torch.distributed import new_group"),
    "a spec calls a collective": ("compiler.spec.spec", "from torch.distributed import all_reduce"),
    "the graph imports a pass, in a function": (
        "compiler.ir.graph",
        "def f():\n    import shardc.passes.local.localize",
    ),
    "the compiler imports its own api": (
        "compiler.pipeline.stages",
        "from shardc.compiler.driver.compile import compile",
    ),
    "the compiler imports the list of passes": ("compiler.pipeline.stages", "import shardc.passes.pipeline"),
    "the api imports a single pass": ("compiler.driver.compile", "from shardc.passes.local.localize import Localize"),
    "the runtime imports the plan": ("runtime.run.bind", "from shardc.compiler.plan.plan import Plan"),
    "the runtime imports a rule": ("runtime.run.bind", "from shardc.compiler.rules import table"),
    "tools import a pass": ("tools.opt", "from shardc.passes.local.localize import Localize"),
    "anyone imports tools": ("compiler.driver.compile", "from shardc.tools import cli"),
    "a program imports more of tools": ("compiler.analysis.program", "from shardc.tools import cli"),
    "the compiler imports the page maker": ("compiler.analysis.dump", "from shardc.tools.page import page"),
    "the page maker looks at a program": ("tools.page", "from shardc.compiler.analysis.dump import dump"),
    "anyone imports tests": ("tools.opt", "from tests.models import mlp"),
    "private torch, imported": ("passes.local.fuse", "from torch._inductor import config"),
    "private torch, deeper": ("compiler.ir.graph", "from torch.fx._symbolic_trace import Tracer"),
    "private torch, one name": ("compiler.ir.graph", "from torch.fx.proxy import _find_arg"),
    "private torch, reached": ("compiler.driver.compile", "import torch\ntorch._dynamo.reset()"),
    "private torch.distributed in the runtime": ("runtime.run.bind", "import torch.distributed._tensor"),
    "private torch.distributed in trace": ("compiler.trace", "import torch.distributed._tensor"),
    "a bare name": ("compiler.ir.graph", "from compiler.spec import Spec"),
    "a relative import": ("compiler.ir.graph", "from .spec import Spec"),
}
GRANTED = {
    "a program shows itself": ("compiler.analysis.program", "from shardc.tools.page import page"),
    "a pass uses the graph": ("passes.local.fuse", "from shardc.compiler.ir.graph import replace"),
    "the list imports every pass": ("passes.pipeline", "from shardc.passes.local.localize import Localize"),
    "the api sees both sides": (
        "compiler.driver.compile",
        "from shardc.passes import pipeline\nimport shardc.runtime.run.bind",
    ),
    "trace uses internals": ("compiler.trace.torch_internals", "from torch._functorch import aot_autograd"),
    "a part of trace too": ("compiler.trace.torch_internals", "import torch\ntorch._dynamo.reset()"),
    "a spec converts placements": (
        "compiler.spec.spec",
        "from torch.distributed.tensor.placement_types import Shard, _StridedShard",
    ),
    "the mesh converts a DeviceMesh": (
        "compiler.spec.mesh",
        "from torch.distributed.device_mesh import DeviceMesh",
    ),
    "operators may begin with an underscore": (
        "passes.local.fuse",
        "import torch\ntorch.ops.aten._softmax.default",
    ),
    "documented names may too": ("runtime.run.bind", "import torch\ntorch._foreach_norm([]), torch.__version__"),
    "names that only look like watched ones": ("passes.local.fuse", "import compilers, torch.distributions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str):
    assert len(house.offences(*REFUSED[case])) == 1


@pytest.mark.parametrize("case", GRANTED)
def test_granted(case: str):
    assert house.offences(*GRANTED[case]) == []
