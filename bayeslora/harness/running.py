"""Tasks of the evaluation harness, by name or file, and a model's results on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import evaluator
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from bayeslora import files
from bayeslora.errors import SettingError

if TYPE_CHECKING:
    from bayeslora.harness.model import PosteriorLM

__all__ = ["evaluate", "tables", "write"]

#: The harness's own, so that results compare with those of others: its choice of examples.
EXAMPLES = 1234


def evaluate(
    model: PosteriorLM,
    tasks: Sequence[str],
    folder: str | Path | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """What the harness measures, and of what, under ``posterior``.

    In contrast to the harness's ``simple_evaluate`` no global generator of random numbers is seeded.

    Args:
        model: a posterior.
        tasks: names of tasks or groups, or YAML files of such.
        folder: with further tasks.
        limit: rows of each task; all by default.
        num_fewshot: examples before each question, where the task does not insist on none; the task's own by default.
        chat: put what is asked into the tokenizer's chat template.

    Raises:
        SettingError: there is no such task, or it runs programs that a model writes.
    """
    loaded = _loaded(tasks, folder)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise SettingError(
                f"The task {name} runs programs that a model writes, without limits: leave it out. What a posterior "
                "writes is run under limits by bayeslora generate --score humaneval --run-programs."
            )
        own = task.get_config("num_fewshot")
        if own is None or (own and num_fewshot is not None):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=EXAMPLES)
    found: dict[str, Any] = evaluator.evaluate(
        model, loaded, limit=limit, log_samples=False, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return found | {"posterior": model.described}


def tables(found: Mapping[str, Any]) -> str:
    """Results as the harness shows them: of tasks, and of groups if there are any."""
    columns = [column for column in ("results", "groups") if found.get(column)]
    return "\n".join(make_table(found, column) for column in columns)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write results into a JSON file, as the harness writes what JSON has no form for."""
    files.write_text(path, json.dumps(found, indent=2, ensure_ascii=False, default=handle_non_serializable) + "\n")


def _loaded(tasks: Sequence[str], folder: str | Path | None) -> Any:
    """Tasks as the harness takes them; its own, which are thousands of files, are read only if one of them is asked."""
    lacking = ""
    for own in (False, True):
        try:
            return TaskManager(include_path=folder, include_defaults=own).load(list(tasks))
        except KeyError as error:
            lacking = str(error.args[0])
    raise SettingError(
        f"The harness cannot load {', '.join(tasks)}: {lacking}. `lm-eval ls tasks` lists the names that it has; a "
        "file is given by its path, and a folder of them by --include-path."
    )
