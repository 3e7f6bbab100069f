"""The torch side of verify: feed a model, judge what it answers, compare and time it."""

from __future__ import annotations

from ckptool.verification.verify import Answers, set_side_by_side, verify_and_keep, verify_model

__all__ = ["Answers", "set_side_by_side", "verify_and_keep", "verify_model"]
