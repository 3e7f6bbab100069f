"""By what a trainer chose, where it wrote that into its settings."""

from __future__ import annotations

from ckptool.model.training import Fact, Training


def read_goal(said: Training) -> Training:
    """Give ``monitor`` and ``mode`` of a timm checkpoint; nothing for any other.

    Source: timm's train.py: ``decreasing_metric = eval_metric == 'loss'``; utils/checkpoint_saver.py keeps the score as
    ``metric``.
    """
    goal = said.hyper_parameters.get("eval_metric")
    if "metric" not in said.metrics or not isinstance(goal, str):
        return Training()
    evidence = f"{said.hyper_parameter_sources[0]}.eval_metric"
    return Training(monitor=Fact("metric", evidence), mode=Fact("min" if goal == "loss" else "max", evidence))
