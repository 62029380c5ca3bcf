"""Offline teacher-logit caching and layer-wise distillation (VLsI). Importing this package imports no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlsi_cache.ablation.runner import ablate
    from vlsi_cache.config.sections import CacheSpec, DistillSpec
    from vlsi_cache.config.spec import load_spec
    from vlsi_cache.evaluation.scores import evaluate
    from vlsi_cache.evaluation.trace import trace
    from vlsi_cache.models.depth import init_student
    from vlsi_cache.report.matches import match
    from vlsi_cache.report.run_view import open_run
    from vlsi_cache.sparse.divergences import Divergence
    from vlsi_cache.sparse.head import Head
    from vlsi_cache.sparse.kl import sparse_kl
    from vlsi_cache.store.check import repair
    from vlsi_cache.store.dataset import CacheDataset, PartWindowSampler
    from vlsi_cache.store.derive.merge import merge
    from vlsi_cache.store.derive.prune import prune
    from vlsi_cache.store.diff import diff
    from vlsi_cache.store.reader import open
    from vlsi_cache.teacher.build import build_teacher
    from vlsi_cache.teacher.generate import generate
    from vlsi_cache.teacher.plan import plan
    from vlsi_cache.teacher.verbalize import train_verbalizers
    from vlsi_cache.train.distill import distill

    from .errors import VlsiCacheError

_HOME = {
    "CacheDataset": "store.dataset",
    "CacheSpec": "config.sections",
    "DistillSpec": "config.sections",
    "Divergence": "sparse.divergences",
    "Head": "sparse.head",
    "PartWindowSampler": "store.dataset",
    "VlsiCacheError": "errors",
    "ablate": "ablation.runner",
    "build_teacher": "teacher.build",
    "diff": "store.diff",
    "distill": "train.distill",
    "evaluate": "evaluation.scores",
    "generate": "teacher.generate",
    "init_student": "models.depth",
    "load_spec": "config.spec",
    "match": "report.matches",
    "merge": "store.derive.merge",
    "open": "store.reader",
    "open_run": "report.run_view",
    "plan": "teacher.plan",
    "prune": "store.derive.prune",
    "repair": "store.check",
    "sparse_kl": "sparse.kl",
    "trace": "evaluation.trace",
    "train_verbalizers": "teacher.verbalize",
}

__all__ = [
    "CacheDataset",
    "CacheSpec",
    "DistillSpec",
    "Divergence",
    "Head",
    "PartWindowSampler",
    "VlsiCacheError",
    "ablate",
    "build_teacher",
    "diff",
    "distill",
    "evaluate",
    "generate",
    "init_student",
    "load_spec",
    "match",
    "merge",
    "open",
    "open_run",
    "plan",
    "prune",
    "repair",
    "sparse_kl",
    "trace",
    "train_verbalizers",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `vlsi_cache` has no attribute `{name}`")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
