"""Loading a task: by its name, from data of a user's own, from rows in memory, or as it is recorded with a run."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.demo import ROWS_PATH
from bayeslora.errors import DataError, TaskError, unknown
from bayeslora.tasks import sources
from bayeslora.tasks.completion import USUAL, usual
from bayeslora.tasks.spec import DEMO, TaskSpec, aliases, find_task, task_names
from bayeslora.tasks.task import Split, Splits, Task, build_task, complete

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["load_task", "reload_task", "rows_of", "with_room"]

#: What says what columns mean.
MEANINGS = frozenset({"text", "label", "labels", "kind", "choices", "completion", "messages"})
ADVICE = (
    "Say which columns to read: text=COLUMN and label=COLUMN (in a shell --set task.text=COLUMN and --set "
    "task.label=COLUMN). For multiple choice give choices=COLUMN, too, and choice_keys=COLUMN if the answer is a name "
    "(in a shell --set task.choices=COLUMN and --set task.choice_keys=COLUMN)."
)


def load_task(
    source: str | Path | Any,
    data_dir: str | Path | None = None,
    *,
    train_size: int | None = None,
    heldout_size: int = 0,
    test_size: int = 0,
    seed: int = 0,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    kind: str | None = None,
    choices: str | Sequence[str] | None = None,
    choice_keys: str | Sequence[str] | None = None,
    prompt: str | None = None,
    words: Sequence[str] | None = None,
    question: str | None = None,
    completion: str | None = None,
    messages: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    config: str | None = None,
    revision: str | None = None,
) -> Task:
    """Load a task: one that is known by name, or data of your own.

    Rows come from the hub, or from files if ``data_dir`` is given or ``source`` is a path. The order in which
    training rows are chosen depends on the seed alone, so subsets of growing size are nested. Of data of your own the
    columns called text and label are read unless others are named, or else those called prompt and completion,
    messages, instruction, input and output, or question, choices and answerKey (multiple choice in ARC's format); of
    files only the columns that are needed.

    Args:
        source: a known task (`task_names`); a .jsonl, .json, .csv, .tsv or .parquet file, a folder of such
            files named by split, or a data set on the hub; or rows in memory: a pandas DataFrame, a data set, a list
            of mappings from column to value, or several of them by the name of the split.
        data_dir: folder with the task's files, or one that has a folder of the task's name in it.
        train_size: number of training rows; all that are not held out by default.
        heldout_size: number of rows to cut off the training split, to choose settings on.
        test_size: number of rows to cut off the training split before all others, to report on, where there is no test
            split: the same ones for every seed.
        seed: of the choice of rows.
        text: one or two columns, or templates of columns such as "{title}: {body}"; "text" by default.
        label: column of the class, the value or the answer; "label" by default.
        labels: class names in the order of their numbers; by default those found in the training split,
            sorted.
        kind: "classification" (default), "regression", "multiple-choice" (implied by ``choices``) or "completion"
            (implied by ``completion`` and ``messages``).
        choices: column with the list of choices, or one column for each choice.
        choice_keys: column with the names of a row's choices, or the names themselves, if the answer is a
            name.
        prompt: template by which a causal language model is asked for a class or a letter; "{choices}" stands for
            lettered choices.
        words: what answers the prompt for each class; by default the labels, or letters of choices.
        question: template of the question with its cue, before the choices, for causal language models.
        completion: column of what follows the text, or a template of columns.
        messages: column with a chat that ends with what the assistant says.
        train: name of the training split.
        validation: name of the validation split; where there is none, the test split stands in for it.
        test: name of the test split.
        config: configuration of a data set on the hub.
        revision: of a data set on the hub.

    Raises:
        TaskError: the task or a split is unknown, or it is not said what the columns mean.
        DataError: the data cannot be found or read, lack a column, have labels out of range or too few rows.
    """
    given: dict[str, Any] = {
        "text": text,
        "label": label,
        "labels": labels,
        "kind": kind or ("multiple-choice" if choices else "completion" if completion or messages else None),
        "choices": choices,
        "choice_keys": choice_keys,
        "prompt": prompt,
        "words": words,
        "question": question,
        "completion": completion,
        "messages": messages,
        "train": train,
        "validation": validation,
        "test": test,
        "config": config,
        "revision": revision,
    }
    given = {key: value for key, value in given.items() if value is not None}
    sizes: dict[str, Any] = {"train_size": train_size, "heldout_size": heldout_size, "seed": seed}
    sizes |= {"test_size": test_size} if test_size else {}
    arguments: dict[str, Any] = {}
    try:
        if isinstance(source, str | Path):
            spec, notes = _resolve(str(source), data_dir, given)
            folder = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
            data = _read(spec, folder, str(source))
            arguments = {"source": str(source), "data_dir": folder, **sizes}
            arguments |= {key: value for key, value in spec.to_dict().items() if key in given}
        else:
            spec, notes = TaskSpec.from_dict({"name": "data", **given}), _of_columns(given)
            data = Splits(spec, source if isinstance(source, Mapping) else {spec.train: source})
        if notes and not MEANINGS & given.keys() and (found := usual(data.holding(USUAL))):
            spec, notes = TaskSpec.from_dict({**spec.to_dict(), **found}), (_said(found),)
            data = data.of(spec)
        return build_task(complete(spec, data, given), data, **sizes, arguments=arguments, notes=notes)
    except sources.ColumnError as error:
        raise DataError(f"{error} {ADVICE}") from error


def reload_task(record: Mapping[str, Any], data_dir: str | Path | None = None) -> Task:
    """Load the rows again that `Task.to_dict` describes, with the classes in their recorded order.

    Args:
        record: what `Task.to_dict` gave.
        data_dir: where the data are now, if they have moved.

    Raises:
        TaskError, DataError: as in `load_task`.
    """
    spec = TaskSpec.from_dict(record["spec"])
    arguments = dict(record["arguments"])
    if data_dir is not None:
        arguments["data_dir"] = str(Path(data_dir).expanduser().resolve())
    if spec.path is None and arguments.get("data_dir") is None:
        raise TaskError(f"The rows of task '{spec.name}' were given in memory: say where they are, data_dir=.")
    sizes = {key: arguments[key] for key in ("train_size", "heldout_size", "test_size", "seed") if key in arguments}
    data = _read(spec, arguments.get("data_dir"), arguments.get("source", spec.name))
    return build_task(spec, data, **sizes, arguments=arguments)


def rows_of(spec: TaskSpec, data: Any, name: str = "new rows", first: int = 0) -> Split:
    """Rows of a task, which need no labels.

    Args:
        spec: the task.
        data: one row or many: for a task of one text a text each, for a task of two a pair (a tuple) each, for any task
            a mapping from column to value each; or a DataFrame or a data set with the task's columns.
        name: of these rows, for messages.
        first: number of the first one, for messages.

    Raises:
        DataError: the data are something else, lack a column or a text, or have labels that are none of the task's.
    """
    if isinstance(data, str | Mapping) or (isinstance(data, tuple) and len(spec.text) == 2 and _are_texts(data)):
        data = [data]
    if isinstance(data, Iterable) and not hasattr(data, "columns") and not hasattr(data, "column_names"):
        data = [_row(spec, row, number, name) for number, row in enumerate(data)]
    table = sources.from_data(data, spec.columns, spec.answer_columns, f"the {name}")
    return Split(table, with_room(spec, table, name), name, first=first).check()


def with_room(spec: TaskSpec, rows: Dataset, name: str) -> TaskSpec:
    """The task with as many choices as the widest row has: those to predict may have more than those that were fitted.

    Args:
        spec: the task.
        rows: of it, with its choices.
        name: of these rows, for messages.
    """
    if not (spec.max_choices and len(rows)):
        return spec
    names = spec.rules.classes(replace(spec, labels=()), {name: rows})
    return max(spec, replace(spec, labels=names), key=lambda each: each.max_choices)


def _resolve(name: str, data_dir: str | Path | None, given: Mapping[str, Any]) -> tuple[TaskSpec, tuple[str, ...]]:
    """The task of a name, as far as it is known before the data are read, and what is to be said of it."""
    if not name.strip():
        raise TaskError("The task has no name: give a known task, a file, a folder ('.' for this one) or a hub name.")
    path = Path(name).expanduser()
    is_file = path.suffix.lower() in sources.SUFFIXES
    known = None if is_file else find_task(name)
    if known is not None:
        return replace(known, **given), ()
    here = is_file or path.exists()
    if is_file and not path.is_file():
        raise DataError(f"There is no file {path}.{_near(path)}")
    described = not {"text", "label", "completion", "messages"}.isdisjoint(given)
    if not here and not described and not (data_dir and (Path(data_dir) / name).exists()):
        raise TaskError(
            f"{unknown('task', name, task_names())} Nor is there a file or folder '{path.name}' in "
            f"{path.absolute().parent}.{_near(path)} For data on the hub, give text=COLUMN and label=COLUMN (in a "
            "shell --set task.text=COLUMN and --set task.label=COLUMN)."
        )
    source = str(path.resolve()) if here else None if data_dir is not None else name
    return TaskSpec.from_dict({"name": path.stem if here else name, "path": source, **given}), _of_columns(given)


def _near(path: Path) -> str:
    """The data nearby whose name is nearest to a path that is not there."""
    folder = path.absolute().parent
    found = folder.iterdir() if folder.is_dir() else ()
    names = [each.name for each in found if each.is_dir() or each.suffix.lower() in sources.SUFFIXES]
    return "".join(f" Did you mean '{path.with_name(near)}'?" for near in get_close_matches(path.name, names, n=1))


def _of_columns(given: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be said of columns that nobody named."""
    roles = () if "messages" in given else ("text",) if "completion" in given else ("text", "label")
    taken = [f"column '{role}' is read as the {role}" for role in roles if role not in given]
    return (f"Unasked, {' and '.join(taken)}.",) if taken else ()


def _said(found: Mapping[str, str]) -> str:
    """What is to be said of columns that were taken for those of another kind than classes."""
    if "messages" in found:
        return f"Unasked, column '{found['messages']}' is read as chats."
    if "choices" in found:
        return f"Unasked, columns '{found['text']}', 'choices' and '{found['label']}' are read as multiple choice."
    names = " and ".join(f"'{name}'" for role in ("text", "completion") for name in sources.fields_of(found[role]))
    return f"Unasked, columns {names} are read as prompts and completions."


def _read(spec: TaskSpec, data_dir: str | None, asked: str) -> Splits:
    """All splits of a task, asked for by this name: from ``data_dir``, the path of the data or the hub."""
    if spec.path == DEMO:
        if data_dir is not None:
            raise TaskError("The rows of the demo ship with the package: leave data_dir out.")
        return Splits(spec, sources.files_of(ROWS_PATH), sources.read_files)
    # Paths of a user's own data are kept absolute, so that a folder named like a hub data set is not taken for it.
    if data_dir is None and spec.path is not None and not Path(spec.path).is_absolute():
        return Splits(spec, sources.read_hub(spec.path, spec.config, spec.revision))
    root = Path(data_dir or spec.path or ".")
    if root.is_file() or root.suffix.lower() in sources.SUFFIXES:
        return Splits(spec, {spec.train: [root]}, sources.read_files)
    if not root.exists():
        raise DataError(f"There is no folder {root}.")
    own = [] if Path(asked).is_absolute() else [asked]
    for name in (*own, spec.name, spec.name.replace("/", "_"), *aliases(spec.name), "."):
        if (root / name).is_dir() and (files := sources.files_of(root / name)):
            return Splits(spec, files, sources.read_files)
    raise DataError(
        f"No data of task '{spec.name}' in {root}: expected files such as {spec.train}.jsonl there or in "
        f"a folder '{spec.name}', ending in {', '.join(sources.SUFFIXES)}."
    )


def _row(spec: TaskSpec, row: Any, number: int, name: str) -> Mapping[str, Any]:
    """A row as a mapping, from a text or a pair of texts where these are all that the task reads."""
    if isinstance(row, Mapping):
        return row
    texts = (row,) if isinstance(row, str) else row
    fields = [sources.fields_of(text) for text in spec.text]
    plain = not spec.choices and all(len(found) == 1 for found in fields)
    if plain and isinstance(texts, tuple | list) and _are_texts(texts) and len(texts) == len(fields):
        return {found[0]: text for found, text in zip(fields, texts, strict=True)}
    wanted = f"a mapping with {', '.join(spec.columns)}"
    if plain:
        wanted = f"{'a text' if len(fields) == 1 else 'a pair of texts'}, or {wanted}"
    raise DataError(f"Row {number} of the {name} is a {type(row).__name__}, {reprlib.repr(row)}, expected {wanted}.")


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
