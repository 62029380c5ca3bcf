"""`interact.mode: layers`: the decoder layers' own weights train, nothing beside them, and a kill loses nothing."""

import importlib
from typing import Any

import pytest


def stop_after(monkeypatch: pytest.MonkeyPatch, stage: str, num_steps: int) -> None:
    """Interrupt the stage before its next update."""
    module = importlib.import_module(f"vlsi_cache.train.{stage}")
    step = module.optimizer_step

    def stopping(optimizer: Any, schedule: Any, index: int, total: int) -> float:
        if index == num_steps:
            raise KeyboardInterrupt
        return step(optimizer, schedule, index, total)

    monkeypatch.setattr(module, "optimizer_step", stopping)
