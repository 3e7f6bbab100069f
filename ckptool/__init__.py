"""Inspect, diff, clean, convert and verify PyTorch checkpoints without running what they contain."""

from __future__ import annotations

__version__ = "0.1.0"
