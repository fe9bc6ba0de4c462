"""A dumped program as Google's Model Explorer reads it: `model-explorer graph.json`. Namespaces are modules."""

from __future__ import annotations

from typing import Any

SHOWN = ("type", "args", "where", "made_by", "recompute", "bytes", "flops")


def model_explorer(data: dict[str, Any], label: str) -> dict[str, Any]:
    """The graph collection of one program."""
    moves = {c["name"]: c for c in data["collectives"]}
    nodes = [_node(node, moves.get(node["name"])) for node in data["nodes"]]
    return {"label": label, "graphs": [{"id": data["hash"], "nodes": nodes}]}


def _node(node: dict[str, Any], move: dict[str, Any] | None) -> dict[str, Any]:
    shown = {"name": node["name"], **{key: node[key] for key in SHOWN}}
    if move is not None:
        shown |= {key: move[key] for key in ("kind", "mesh_dim", "numel", "bytes_on_wire", "why")}
    return {
        "id": node["name"],
        "label": f"{move['kind']} {move['mesh_dim']}" if move is not None else node["op"],
        "namespace": "/".join([node["phase"], *filter(None, node["path"].split("."))]),
        "attrs": [{"key": key, "value": str(value)} for key, value in shown.items() if value not in ("", 0)],
        "incomingEdges": [
            {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
            for i, name in enumerate(node["inputs"])
        ],
        "outputsMetadata": [_output(str(i), result) for i, result in enumerate(node["results"])],
    }


def _output(number: str, result: dict[str, Any]) -> dict[str, Any]:
    shape = f"{result['dtype']}{result['layout'] or result['local_shape']}"
    return {"id": number, "attrs": [{"key": "tensor_shape", "value": shape}]}
