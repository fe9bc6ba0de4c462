"""Large programs made up as dumped JSON: layers of a transformer, forward and backward, with every pass recorded."""

from __future__ import annotations

from typing import Any

from shardc.tools.program_json import SCHEMA

WHOLE = "bf16[64@dp, 512, 4096]"
MODULES = ("attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down")


def synthetic(layers: int, nodes: int, names: tuple[str, str] = ("layers", "model.py")) -> dict[str, Any]:
    """A program of about so many values. names: of the list of layers, and of the source file."""
    made = _Maker(names[1])
    x = made.value("input", "input ids", [], "", "forward", "i64[64@dp, 512]")
    per_layer = nodes // layers
    for phase, share in (("forward", per_layer // 3), ("backward", per_layer - per_layer // 3)):
        order = range(layers) if phase == "forward" else reversed(range(layers))
        for i in order:
            x = made.layer(f"{names[0]}.{i}", x, phase, share)
    return made.program()


class _Maker:
    def __init__(self, file: str) -> None:
        self.file, self.count = file, 0
        self.nodes: list[dict[str, Any]] = []
        self.params: list[dict[str, Any]] = []
        self.moves: list[dict[str, Any]] = []
        self.reasons: dict[str, Any] = {}
        self.inputs: list[dict[str, Any]] = []

    def layer(self, path: str, x: str, phase: str, share: int) -> str:
        forward = phase == "forward"
        per_module = max(3, share // len(MODULES))
        residual = x
        for module in MODULES:
            fqn = f"{path}.{module}.weight"
            node = fqn.replace(".", "_")
            if forward:
                self.value("input", f"param {fqn}", [], f"{path}.{module}", phase, "bf16[4096@tp, 4096]", node, 2**24)
                self.params.append(_param(fqn, node, module))
            x = self.value("aten.mm", "%{}, %{}", [x, node], f"{path}.{module}", phase, "bf16[64@dp, 512, 4096@tp]")
            for k in range(per_module - 3):
                op = ("aten.view", "aten.mul.Tensor", "aten.add.Tensor")[k % 3]
                more = [residual] if k % 5 == 4 else []
                text = ", ".join(["%{}"] * (1 + len(more)))
                x = self.value(op, text, [x, *more], f"{path}.{module}", phase, "bf16[64@dp, 512, 4096@tp]")
            if module in ("attention.o", "mlp.down"):
                x = self.value("aten.mm", "%{}, %{}", [x, node], f"{path}.{module}", phase, "bf16[64@dp, 512, 4096]+tp")
                x = self.move(x, f"{path}.{module}", phase)
                x = self.value("aten.add.Tensor", "%{}, %{}", [x, residual], path, phase, "bf16[64@dp, 512, 4096]")
                residual = x
        return x

    def move(self, x: str, path: str, phase: str) -> str:
        name = self.value(
            "shardc.all_reduce", "%{}, tp", [x], path, phase, "bf16[64@dp, 512, 4096]", moves="all_reduce"
        )
        self.moves.append(
            {
                "kind": "all_reduce", "mesh_dim": "tp", "phase": phase, "dtype": "torch.bfloat16", "numel": 2**26,
                "bytes_on_wire": 2**27, "fqn": path, "where": f"{self.file}:7 in forward", "name": name, "why": "tp",
            }
        )  # fmt: skip
        return name

    def value(
        self, op: str, args: str, inputs: list[str], path: str, phase: str, kind: str, name: str = "",
        size: int = 2**20, moves: str = "",
    ) -> str:  # fmt: skip
        self.count += 1
        name = name or f"{op.split('.')[1] if '.' in op else 'x'}_{self.count}"
        split = {"dp": 0} if "@dp" in kind else {}
        split |= {"tp": 2} if "@tp" in kind else {}
        pending = {"tp": "sum"} if "+tp" in kind else {}
        dtype, _, layout = kind.partition("[")
        result = {"dtype": dtype, "layout": f"[{layout}", "shape": [64, 512], "local_shape": [8, 512]}
        line = 10 + len(path) % 40
        self.nodes.append(
            {
                "name": name, "op": op, "args": args.format(*inputs), "moves": moves, "type": kind,
                "results": [{**result, "split": split, "pending": pending}], "inputs": list(dict.fromkeys(inputs)),
                "path": path, "phase": phase, "where": f"{self.file}:{line} in forward", "file": self.file,
                "line": line, "made_by": "lower-reshards" if moves else "", "recompute": "", "origin": "",
                "view": op == "aten.view", "bytes": size, "flops": 2**36 if op == "aten.mm" else 0,
            }
        )  # fmt: skip
        if op == "input":
            kind = "parameter" if args.startswith("param ") else "batch"
            self.inputs.append({"node": name, "kind": kind, "name": args.split()[1], "is": args})
        axes = [*split, *pending]
        source = {axis: inputs[0] if inputs and not moves else None for axis in axes}
        self.reasons[name] = {"op": op, "layout": f"[{layout}", "rule": "m k, k n -> m n", "why": "", "from": source}
        return name

    def program(self) -> dict[str, Any]:
        moved = {c["name"] for c in self.moves}
        body = {n["name"]: n["args"] if n["op"] == "input" else f"{n['op']}({n['args']})" for n in self.nodes}
        traced = [[n["name"], "bf16[64, 512, 4096]", body[n["name"]]] for n in self.nodes if n["name"] not in moved]
        laid = [[n["name"], n["type"], body[n["name"]]] for n in self.nodes if n["name"] not in moved]
        added, last = [], ""
        for n in self.nodes:
            if n["name"] in moved:
                added.append([n["name"], n["type"], f"{body[n['name']]}  # lower-reshards", last])
            last = n["name"]
        local = [[name, kind, made.replace("(", "(rank ", 1)] for name, kind, made in laid[::4]]
        passes = [
            _step("propagate", "SHARDED", changed=laid),
            _step("lower-reshards", "RESHARDED", added=added),
            _step("localize", "LOCAL", changed=local),
            _step("overlap", "SCHEDULED"),
        ]
        halves = [self._half(phase) for phase in ("forward", "backward")]
        held = len(self.params) * 2**24
        return {
            "schema": SCHEMA, "torch": "2.13.0", "hash": "0" * 16,
            "mesh": [{"name": "dp", "size": 64}, {"name": "tp", "size": 8}],
            "nodes": self.nodes, "returned": f"(%{last},)", "reasons": self.reasons,
            "sources": {f"{self.file}:{n}": f"x = x + self.block(x)  # {n}" for n in range(10, 50)},
            "inputs": self.inputs, "parameters": self.params, "collectives": self.moves,
            "plan": {"text": "mesh dp=64 tp=8", "bytes": 8 * held, "bytes_per_rank": held, "unmatched": [],
                     "warnings": []},
            "memory": {"peak_bytes": max(max(h["alive"]) for h in halves), "saved": [], "halves": halves},
            "traced": traced, "passes": passes, "notes": [],
        }  # fmt: skip

    def _half(self, phase: str) -> dict[str, Any]:
        order = [n["name"] for n in self.nodes if n["phase"] == phase]
        values = [[name, 2**20, i, min(i + 20, len(order) - 1)] for i, name in enumerate(order)]
        alive = [2**30 + 2**20 * min(i + 1, 21) for i in range(len(order))]
        held = [["inputs", 2**30, -1, len(order) - 1]]
        return {"phase": phase, "order": order, "start": 2**30, "alive": alive, "values": held + values}


def _param(fqn: str, node: str, module: str) -> dict[str, Any]:
    key = f'tp["layers.*.{module}"] = ColwiseParallel()'
    return {
        "fqn": fqn, "shape": [4096, 4096], "dtype": "bf16", "keys": [key], "layout": "bf16[4096@tp, 4096]",
        "bytes": 2**27, "bytes_per_rank": 2**24, "aliases": [], "notes": [], "node": node,
    }  # fmt: skip


def _step(name: str, stage: str, changed: Any = (), added: Any = ()) -> dict[str, Any]:
    return {
        "name": name, "stage": stage, "seconds": 0.1, "counts": {}, "notes": [], "removed": [],
        "changed": list(changed), "added": list(added),
    }  # fmt: skip
