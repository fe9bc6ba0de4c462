"""The public names of shardc, each imported when it is first used, so that `import shardc` is instant."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardc.compiler.driver.compile import CompiledModule, Program, compile
    from shardc.compiler.driver.search.search import search
    from shardc.compiler.driver.train_step import train_step
    from shardc.compiler.errors import CheckpointError, PlanError, RankFailure, RankMismatchError, ShardingError
    from shardc.compiler.ir.marks import constrain
    from shardc.compiler.plan.annotate import fully_shard, replicate
    from shardc.compiler.plan.entries import ContextParallel, FullyShard, Replicated
    from shardc.compiler.plan.layout import Layout, Precision
    from shardc.compiler.plan.plan import Plan
    from shardc.compiler.proof.check_rule import check_rule, discover_rule
    from shardc.compiler.rules.table import rule
    from shardc.compiler.spec.hardware import Hardware
    from shardc.compiler.spec.mesh import Mesh
    from shardc.runtime.checkpoint.checkpoint import load_checkpoint, save_checkpoint, save_safetensors
    from shardc.runtime.launch.launch import launch
    from shardc.runtime.replicas.replicas import data_parallel, replicas
    from shardc.runtime.values.deferred import deferred_init

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CompiledModule",
    "ContextParallel",
    "FullyShard",
    "Hardware",
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
    "search",
    "train_step",
]

_HOME = {
    "CheckpointError": "shardc.compiler.errors",
    "CompiledModule": "shardc.compiler.driver.compile",
    "ContextParallel": "shardc.compiler.plan.entries",
    "FullyShard": "shardc.compiler.plan.entries",
    "Hardware": "shardc.compiler.spec.hardware",
    "Layout": "shardc.compiler.plan.layout",
    "Mesh": "shardc.compiler.spec.mesh",
    "Plan": "shardc.compiler.plan.plan",
    "PlanError": "shardc.compiler.errors",
    "Precision": "shardc.compiler.plan.layout",
    "Program": "shardc.compiler.driver.compile",
    "RankFailure": "shardc.compiler.errors",
    "RankMismatchError": "shardc.compiler.errors",
    "Replicated": "shardc.compiler.plan.entries",
    "ShardingError": "shardc.compiler.errors",
    "check_rule": "shardc.compiler.proof.check_rule",
    "compile": "shardc.compiler.driver.compile",
    "constrain": "shardc.compiler.ir.marks",
    "data_parallel": "shardc.runtime.replicas.replicas",
    "deferred_init": "shardc.runtime.values.deferred",
    "discover_rule": "shardc.compiler.proof.check_rule",
    "fully_shard": "shardc.compiler.plan.annotate",
    "load_checkpoint": "shardc.runtime.checkpoint.checkpoint",
    "launch": "shardc.runtime.launch.launch",
    "replicas": "shardc.runtime.replicas.replicas",
    "replicate": "shardc.compiler.plan.annotate",
    "rule": "shardc.compiler.rules.table",
    "save_checkpoint": "shardc.runtime.checkpoint.checkpoint",
    "save_safetensors": "shardc.runtime.checkpoint.checkpoint",
    "search": "shardc.compiler.driver.search.search",
    "train_step": "shardc.compiler.driver.train_step",
}


def __getattr__(name: str) -> object:
    if name == "hf":  # a module of ours: `import shardc` is enough to say shardc.hf.plan
        return import_module("shardc.hf")
    if name not in _HOME:
        raise AttributeError(f"module 'shardc' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
