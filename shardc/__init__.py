"""The public names of shardc, each imported when it is first used, so that `import shardc` is instant."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardc.compiler.annotate import fully_shard, replicate
    from shardc.compiler.api import CompiledModule, Program, compile
    from shardc.compiler.check_rule import check_rule, discover_rule
    from shardc.compiler.errors import CheckpointError, PlanError, RankFailure, RankMismatchError, ShardingError
    from shardc.compiler.marks import constrain
    from shardc.compiler.mesh import Mesh
    from shardc.compiler.plan import FullyShard, Layout, Plan, Precision, Replicated
    from shardc.compiler.rules.table import rule
    from shardc.compiler.train_step import train_step
    from shardc.runtime.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
    from shardc.runtime.deferred import deferred_init
    from shardc.runtime.launch import launch
    from shardc.runtime.replicas import data_parallel, replicas

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompiledModule",
    "FullyShard",
    "Layout",
    "Mesh",
    "Plan",
    "PlanError",
    "Precision",
    "Program",
    "RankFailure",
    "RankMismatchError",
    "Replicated",
    "ShardingError",
    "check_rule",
    "compile",
    "constrain",
    "data_parallel",
    "deferred_init",
    "discover_rule",
    "fully_shard",
    "launch",
    "load_checkpoint",
    "replicas",
    "replicate",
    "rule",
    "save_checkpoint",
    "save_safetensors",
    "train_step",
]

_HOME = {
    "CheckpointError": "shardc.compiler.errors",
    "CompiledModule": "shardc.compiler.api",
    "FullyShard": "shardc.compiler.plan",
    "Layout": "shardc.compiler.plan",
    "Mesh": "shardc.compiler.mesh",
    "Plan": "shardc.compiler.plan",
    "PlanError": "shardc.compiler.errors",
    "Precision": "shardc.compiler.plan",
    "Program": "shardc.compiler.api",
    "RankFailure": "shardc.compiler.errors",
    "RankMismatchError": "shardc.compiler.errors",
    "Replicated": "shardc.compiler.plan",
    "ShardingError": "shardc.compiler.errors",
    "check_rule": "shardc.compiler.check_rule",
    "compile": "shardc.compiler.api",
    "constrain": "shardc.compiler.marks",
    "data_parallel": "shardc.runtime.replicas",
    "deferred_init": "shardc.runtime.deferred",
    "discover_rule": "shardc.compiler.check_rule",
    "fully_shard": "shardc.compiler.annotate",
    "load_checkpoint": "shardc.runtime.checkpoint",
    "launch": "shardc.runtime.launch",
    "replicas": "shardc.runtime.replicas",
    "replicate": "shardc.compiler.annotate",
    "rule": "shardc.compiler.rules.table",
    "save_checkpoint": "shardc.runtime.checkpoint",
    "save_safetensors": "shardc.runtime.checkpoint",
    "train_step": "shardc.compiler.train_step",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'shardc' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
