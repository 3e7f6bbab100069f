"""The torch side of verify: feed a model, judge what it answers, compare and time it."""

from __future__ import annotations

from ckptool.verification.verify import verify_model

__all__ = ["verify_model"]
