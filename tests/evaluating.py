"""Baselines and evaluations of dictionaries in one call, as two jobs of the workflow make them."""

from typing import Any

import numpy as np
from torch import Tensor

from saeflow.config import EvaluationConfig
from saeflow.dictionaries import Dictionary
from saeflow.evaluation.baseline import AblationSite, measure_baselines
from saeflow.evaluation.evaluate import Evaluation, EvaluationTask, evaluate


def evaluate_all(
    model: Any,
    dictionaries: list[Dictionary],
    mean: Tensor,
    rows: np.ndarray,
    batch_rows: int,
    prepend_bos: bool = True,
    resamples: int = 10,
    replace_first: bool = True,
) -> list[Evaluation]:
    """Evaluates `dictionaries`, each against mean ablation by `mean` where it writes."""
    places = [(d.spec.hook_name_out, d.spec.hook_head_index) for d in dictionaries]
    ablated = [AblationSite(hook, mean, head) for hook, head in dict.fromkeys(places)]
    measured = measure_baselines(model, ablated, rows, prepend_bos, batch_rows, replace_first)
    baselines = {(b.hook_name, b.head): b for b in measured}
    tasks = [EvaluationTask(d, baselines[place]) for d, place in zip(dictionaries, places, strict=True)]
    return evaluate(
        model, tasks, rows, prepend_bos, EvaluationConfig(batch_rows, resamples, replace_first=replace_first)
    )
