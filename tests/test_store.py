"""Folders of runs and posteriors: whole at every moment, written by one process, never written by who reads."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from scenarios import tiny_program, tiny_rows

from bayeslora import files, store
from bayeslora.errors import PosteriorError, SettingError
from bayeslora.inference import fit
from bayeslora.record import whole_record

QUICK = {"epochs": 2, "batch_size": 5, "progress": False}
#: What changes names: renaming and replacing, removing a file or a folder.
CHANGES = ("os.rename", "os.remove", "os.rmdir")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs with other seeds, each with a file that the other lacks."""
    folders = tmp_path_factory.mktemp("old") / "run", tmp_path_factory.mktemp("new") / "run"
    for seed, folder in enumerate(folders):
        fit(tiny_program(), tiny_rows(5), "mle", seed=seed, output_dir=folder, **QUICK)
    (folders[0] / "config.yaml").write_text("{}")
    shutil.copytree(folders[1] / "posterior", folders[1] / "chain-0" / "posterior")
    return folders


@pytest.fixture
def run(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(runs[0], tmp_path / "run"))
    (folder / "notes.txt").write_text("mine")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, by its path: hidden ones and the targets of links included."""
    found = [(Path(top) / name) for top, _, names in os.walk(folder) for name in names]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("inner", ["", "chain-0", "chain-3/chain-1"])
@pytest.mark.parametrize("kept", ["posterior/posterior.json", "checkpoints/checkpoint-5/trainer_state.json"])
def test_a_run_holds_the_fits_that_it_is_of(inner: str, kept: str, tmp_path: Path) -> None:
    """As a temperature is of an ensemble, of whose members some had ended when it was stopped."""
    path = tmp_path / inner / kept
    path.parent.mkdir(parents=True)
    (tmp_path / "config.yaml").touch()
    assert not store.holds_fit(tmp_path)
    path.touch()
    assert store.holds_fit(tmp_path)


def save(source: Path, target: Path) -> None:
    """What `Posterior.save` does, without the time of a network."""
    with store.written(target) as new:
        shutil.copytree(source, new, dirs_exist_ok=True)


def overwrite(source: Path, target: Path) -> None:
    """What `fit --overwrite` does, likewise."""
    with store.opened(target), store.place(target, anew=True) as place:
        shutil.copytree(source, place, ignore=shutil.ignore_patterns("posterior"), dirs_exist_ok=True)
        for posterior in (source / "chain-0" / "posterior", source / "posterior"):  # which shows that all is there
            save(posterior, place / posterior.relative_to(source))


def killed(step: int, action: Callable[[], object]) -> bool:
    """Whether a process was killed before its change of this number."""
    child = os.fork()
    if child == 0:
        left = iter(range(step))

        def hook(event: str, _: object) -> None:
            if event in CHANGES and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def seed_of(path: Path) -> int:
    """Seed of the posterior that a reader finds, whose files are whole; reading changes nothing."""
    before = tree(path.parent)
    found = store.steady(path, whole_record).record.seed
    assert tree(path.parent) == before
    return found


@pytest.mark.parametrize("old", ["a posterior", "an empty folder", "nothing"])
def test_a_save_that_is_killed_leaves_the_old_posterior_or_the_new_one(
    runs: tuple[Path, Path], tmp_path: Path, old: str
) -> None:
    found, step = [], 0
    while True:
        path = tmp_path / str(step) / "posterior"
        path.parent.mkdir()
        if old == "a posterior":
            shutil.copytree(runs[0] / "posterior", path)
        elif old == "an empty folder":
            path.mkdir()
        dead = killed(step, lambda path=path: save(runs[1] / "posterior", path))
        if old == "a posterior" or not dead:
            found.append(seed_of(path))
            with store.opened(path.parent):  # brings to an end what was begun, either way
                assert path.is_dir()
            assert old != "a posterior" or seed_of(path) == found[-1]
        elif (path / "posterior.json").exists():
            assert seed_of(path) == 1
        save(runs[1] / "posterior", path)
        assert tree(path.parent) == {f"posterior/{name}": data for name, data in tree(runs[1] / "posterior").items()}
        if not dead:
            break
        step += 1
    assert step > 3 and found == sorted(found)
    if old == "a posterior":
        assert found[0] == 0 and found[-2:] == [1, 1]  # killed after the new one was in its place, and not killed


def test_an_overwrite_that_is_killed_leaves_the_old_run_or_the_new(runs: tuple[Path, Path], tmp_path: Path) -> None:
    own, new = tree(runs[0]) | {"notes.txt": b"mine"}, tree(runs[1]) | {"notes.txt": b"mine"}
    seeds, step, dead = [], 0, True
    while dead:
        path = Path(shutil.copytree(runs[0], tmp_path / str(step) / "run"))
        (path / "notes.txt").write_text("mine")
        dead = killed(step, lambda path=path: overwrite(runs[1], path))
        stopped = pytest.warns(UserWarning, match="is to replace the one in .* was stopped")
        with stopped if store.current(path) != path else nullcontext():
            seeds.append(seed_of(path))
        with store.opened(path):
            left = {name: data for name, data in tree(path).items() if "bayeslora-" not in name}
            stands = store.current(path) != path
        expected = own if seeds[-1] == 0 else new
        assert left == expected or (left == new and not stands)  # complete, but its turn had not come
        assert not list(path.glob(".bayeslora-lock")) and not (path / ".bayeslora-complete").exists()
        overwrite(runs[1], path)
        assert tree(path) == new
        step += 1
    assert step > 20 and seeds == sorted(seeds) and seeds[0] == 0 and seeds[-2:] == [1, 1]


def test_a_reader_finds_a_whole_posterior_while_it_is_replaced_again_and_again(
    runs: tuple[Path, Path], run: Path
) -> None:
    child = os.fork()
    if child == 0:
        try:
            for number in range(10_000):
                save(runs[number % 2] / "posterior", run / "posterior")
        finally:
            os._exit(0)
    try:
        assert {store.steady(run, whole_record).record.seed for _ in range(60)} <= {0, 1}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_posterior_that_is_replaced_while_it_is_read_is_read_again(runs: tuple[Path, Path], run: Path) -> None:
    """Its old folder is on its way out: half of its files are gone, and its record is still there."""
    own, old = run / "posterior", files.hidden(run / "posterior", "old")
    own.rename(old)
    places = []

    def reader(where: Path) -> int:
        places.append(where)
        if where == old:
            (old / "posterior.safetensors").unlink()
            shutil.copytree(runs[1] / "posterior", own)
        return whole_record(where).record.seed

    assert store.steady(run, reader) == 1 and places == [old, own]


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Another process that has a run's folder open; its number."""
    ready, child = os.pipe(), os.fork()
    if child == 0:
        os.environ["RANK"] = "0"
        with store.opened(folder):
            os.write(ready[1], b"1")
            signal.pause()
    os.read(ready[0], 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_process_in_a_run_is_told_who_holds_it(run: Path) -> None:
    before = tree(run)
    settings = {"output_dir": run, "resume": True, **QUICK}
    with held(run) as child, pytest.raises(SettingError, match=rf"'{run}' is being written by process {child} on "):
        fit(tiny_program(), tiny_rows(5), "mle", **settings)
    fit(tiny_program(), tiny_rows(5), "mle", **settings)  # the lock has ended with its process
    assert tree(run) == before


def test_other_processes_of_one_launcher_leave_the_lock_to_the_main_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    before = tree(run)
    with held(run), store.opened(run), store.place(run, anew=True) as place:
        assert place == run / ".bayeslora-next"
    assert {name: data for name, data in tree(run).items() if "lock" not in name} == before


def test_a_successor_that_fails_leaves_the_run_as_it_was(run: Path) -> None:
    before = tree(run)
    with pytest.raises(RuntimeError), store.opened(run), store.place(run, anew=True) as place:
        files.write_text(place / "config.yaml", "of the new one")
        assert {name: data for name, data in tree(run).items() if name in before} == before
        raise RuntimeError
    assert tree(run) == before


def test_a_run_that_begins_again_keeps_nothing_of_the_one_that_was_stopped(runs: tuple[Path, Path], run: Path) -> None:
    shutil.copytree(runs[1], run / ".bayeslora-next")
    with store.place(run) as place:
        assert place == run / ".bayeslora-next" and tree(place) == tree(runs[1])
    shutil.copytree(runs[1] / "checkpoints", run / ".bayeslora-next" / "checkpoints")
    with pytest.raises(RuntimeError), store.place(run, anew=True) as place:
        assert place == run / ".bayeslora-next" and not place.exists()
        raise RuntimeError


def test_what_is_complete_takes_its_place_before_what_comes_after_it(runs: tuple[Path, Path], run: Path) -> None:
    for name in (".bayeslora-complete", ".bayeslora-next"):
        shutil.copytree(runs[1], run / name)
    with store.opened(run):
        assert not (run / ".bayeslora-complete").exists() and (run / ".bayeslora-next").exists()
    assert tree(run / ".bayeslora-next") == tree(runs[1]) and tree(run).items() >= tree(runs[1]).items()


def test_a_reader_is_told_once_of_a_run_that_is_to_replace_what_it_reads(runs: tuple[Path, Path], run: Path) -> None:
    shutil.copytree(runs[1] / "checkpoints", run / ".bayeslora-next" / "checkpoints")
    for read in (lambda: store.steady(run, lambda found: found), lambda: store.adapter_at(run)):
        with pytest.warns(UserWarning, match="is to replace the one in") as told:
            assert read() == run / "posterior"
        assert len(told) == 1


def test_a_folder_that_nothing_was_written_into_goes(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), store.opened(tmp_path / "new"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter_config.json", "notes.txt", ".hidden", "deep/notes.txt"])
def test_what_is_no_posteriors_is_not_replaced(runs: tuple[Path, Path], run: Path, tmp_path: Path, name: str) -> None:
    mine, own = tmp_path / "mine", run / "posterior"
    acts = {mine: lambda: save(runs[1] / "posterior", mine), own: lambda: overwrite(runs[1], run)}
    for path, act in acts.items():
        if (path / name).exists():
            continue  # that is its own
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(PosteriorError, match=f"holds '{Path(name).parts[0]}', which no posterior"):
            act()
        assert tree(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_a_link_or_a_file_is_no_place_for_a_posterior(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("mine")
    for name, message in (("link", "is a symbolic link"), ("file", "is a file")):
        with pytest.raises(PosteriorError, match=message):
            save(run / "posterior", tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "link").is_symlink()


LINKS = ["posterior", "chain-0", "checkpoints", "config.yaml", ".bayeslora-next", ".bayeslora-complete"]


@pytest.mark.filterwarnings("ignore:A run that is to replace")
@pytest.mark.parametrize("name", [*LINKS, "checkpoints/checkpoint-9", ".bayeslora-lock"])
def test_nothing_is_read_or_written_through_a_strangers_links(
    runs: tuple[Path, Path], run: Path, tmp_path: Path, name: str
) -> None:
    home = Path(shutil.copytree(runs[1], tmp_path / "home"))
    files.remove(run / name)
    (run / name).symlink_to(home / "posterior" if name == "posterior" else home)
    before = tree(home)
    if name in ("posterior", ".bayeslora-complete"):
        with pytest.raises(PosteriorError, match="is a symbolic link, which is not followed"):
            store.steady(run, whole_record)
    else:
        store.steady(run, whole_record)
    with pytest.raises((SettingError, OSError), match="symbolic link"):
        overwrite(runs[1], run)
    assert tree(home) == before and (run / name).is_symlink()


def test_reading_follows_no_staged_folder_out_of_the_run(run: Path, tmp_path: Path) -> None:
    """Folders named as earlier or later writers name theirs, with links on the way."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    (run / "docs").symlink_to(home)
    for stage in (".saved-y", ".posterior.bayeslora-new", ".posterior.bayeslora-old", ".docs.bayeslora-new"):
        (run / stage / "docs").mkdir(parents=True)
        (run / stage / "docs" / "letter.txt").write_text("forged")
    assert seed_of(run) == 0
    with store.opened(run):
        pass
    assert tree(home) == {"letter.txt": b"dear"} and (run / "docs").is_symlink()


def unfinished(run: Path) -> None:
    """As a fit that was stopped leaves it."""
    path = run / "posterior" / "posterior.json"
    path.write_text(path.read_text().replace('"finished": true', '"finished": false'))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("half", [True, False])
def test_a_checkpoint_that_lacks_something_is_not_gone_on_from(run: Path, name: str, half: bool) -> None:
    whole = store.last_checkpoint(run)
    assert whole is not None and whole.name == "checkpoint-2"
    newer = shutil.copytree(whole, whole.with_name("checkpoint-10"))
    assert store.last_checkpoint(run) == newer
    for path in (newer / name, whole / name):
        assert store.last_checkpoint(run) == path.parent
        path.write_bytes(path.read_bytes()[: 20 if half else 0])
        if not half:
            path.unlink()
    lacks = "lacks a whole " + name.replace("state.pth", r"state\*.pth")
    with pytest.raises(PosteriorError, match=f"checkpoint-10' {lacks}; .*checkpoint-2' {lacks}"):
        store.last_checkpoint(run)
    unfinished(run)
    before = tree(run)
    with pytest.raises(PosteriorError, match="no checkpoint to go on from to the same result"):
        fit(tiny_program(), tiny_rows(5), "mle", output_dir=run, resume=True, **QUICK)
    assert tree(run) == before


def test_a_fit_goes_on_from_an_older_checkpoint_to_the_same_result(tmp_path: Path) -> None:
    settings, run = QUICK | {"epochs": 3, "keep_checkpoints": 3}, tmp_path / "run"
    whole = fit(tiny_program(), tiny_rows(5), "mle", output_dir=run, **settings)
    (run / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    (run / "checkpoints" / "checkpoint-2" / "rng_state.pth").unlink()
    unfinished(run)
    resumed = fit(tiny_program(), tiny_rows(5), "mle", output_dir=run, resume=True, **settings)
    assert all(torch.equal(value, resumed.mean()[name]) for name, value in whole.mean().items())
