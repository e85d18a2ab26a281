"""Disks that are full or read-only, folders that are taken: one error, nothing left behind, the model as it was."""

from __future__ import annotations

import errno
import multiprocessing
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import SafetensorError

from singe_plugin import Builder, Callback, History, Result, files, load, prune, save
from singe_plugin.app.cli import main
from singe_plugin.app.curves import Curves
from singe_plugin.app.report import write_report
from singe_plugin.errors import ArtifactError
from singe_plugin.files import locked, write_atomically, write_text
from singe_plugin.integrations.unstructured import prune_weights
from singe_plugin.run import artifact, checkpoint

from asked import asked
from killed import holding, limited, process
from small_nets import Chain, Trace, images

BATCHES = images()
PRUNE = ["prune", "--model", "test_resnet", "--dataset", "digits", "--output"]
FAST: dict[str, Any] = {"nodes": 1, "finetune_steps": 2, "rounds": 2}
CURVES = [Curves("conv", (0, 2), ((2.0, 1.0), (3.0, 1.5)), ((0.1, 0.2), (0.3, 0.1)))]


def pruned(net: Chain, folder: Path) -> Result:
    return prune(net, BATCHES, **asked(verify=False, out_dir=folder, **FAST))


def masked(net: Chain, folder: Path) -> Result:
    return prune_weights(net, BATCHES, **asked(out_dir=folder, **FAST))


# --- faults -----------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Any], Any]] = {
    "os.open": lambda m: m.setattr(files.os, "open", failing(os.open)),
    "os.fsync": lambda m: m.setattr(files.os, "fsync", failing(os.fsync)),
    "os.replace": lambda m: m.setattr(files.os, "replace", failing(os.replace)),
    "save_file": lambda m: [m.setattr(x, "save_file", failing(x.save_file)) for x in (checkpoint, artifact)],
    "savefig": lambda m: m.setattr("matplotlib.figure.Figure.savefig", failing(lambda *_, **__: None)),
}
FAULT: dict[str, Any] = {"after": 0, "error": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}


def failing(works: Callable[..., Any]) -> Callable[..., Any]:
    """A function that works a few times, and then raises the fault; a lock of its own keeps out of it."""
    left = [FAULT["after"]]

    def maybe(*arguments: Any, **options: Any) -> Any:
        if "run.lock" in str(arguments[0]):
            return works(*arguments, **options)
        left[0] -= 1
        if left[0] < 0:
            raise FAULT["error"]
        return works(*arguments, **options)

    return maybe


ERRORS = {
    "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "limit": OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    "read-only": OSError(errno.EROFS, os.strerror(errno.EROFS)),
    "forbidden": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "rust": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@contextmanager
def fault(place: str, error: str, after: int = 0) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        FAULT.update(after=after, error=ERRORS[error])
        WRITERS[place](patch)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    ("place", "error"),
    [("os.open", "read-only"), ("os.open", "forbidden"), ("os.fsync", "quota"), ("os.replace", "full"),
     ("save_file", "rust"), ("save_file", "limit")],
)  # fmt: skip
@pytest.mark.parametrize("run", [pruned, masked])
def test_a_run_that_cannot_write(run: Any, place: str, error: str, after: int, tmp_path: Path) -> None:
    net = Chain().train()
    trace = Trace(net)
    folder = tmp_path / "out"
    with (
        fault(place, error, after),
        pytest.raises(ArtifactError, match=r"cannot be written: .*(make room|another folder)"),
    ):
        run(net, folder)
    trace.assert_unchanged()
    assert list(contents(folder)) == ([checkpoint.CHECKPOINT] if after else [])  # what was written before is whole
    assert run(net, folder).after.params > 0  # and one tries again


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    found = prune_weights(Chain(), BATCHES, **asked(sparsity=0.7, **FAST))
    found.builder = Builder.factory("small_nets:Chain")
    return found


@pytest.mark.parametrize(("place", "error"), [(place, "full") for place in WRITERS] + [("save_file", "rust")])
def test_results_reports_and_histories_that_cannot_be_written(
    place: str, error: str, result: Result, tmp_path: Path
) -> None:
    actions: list[Callable[[], Any]] = [
        lambda: save(result, tmp_path / "a"),
        lambda: write_report(result, tmp_path / "b", curves=CURVES),
        lambda: result.history.save(tmp_path / "c" / "history.jsonl"),
    ]
    for action in actions:
        for after in range(4):
            with fault(place, error, after):
                try:
                    action()
                except ArtifactError as raised:
                    text = str(raised)
                    assert "cannot be written" in text
                    assert "\n" not in text
                except OSError:
                    pytest.fail("a raw error")
            assert not list(tmp_path.rglob(".*"))
        action()  # what was there is replaced
        before = contents(tmp_path)
        with fault(place, error):
            try:
                action()
            except ArtifactError:
                assert contents(tmp_path) == before or place == "savefig"
    assert load(tmp_path / "a", trust=True).after == result.after


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    started = process(limited, tmp_path)
    started.join()
    assert started.exitcode == 0


def test_a_folder_where_a_file_should_be_and_the_other_way_round(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name in ("model.safetensors", "singe.json", "report.md", "units.png", checkpoint.CHECKPOINT, "history"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    net = Chain()
    trace = Trace(net)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "folder"):
        for action in (
            lambda folder=folder: save(result, folder),
            lambda folder=folder: write_report(result, folder),
            lambda folder=folder: History().save(folder / "history"),
            lambda folder=folder: pruned(net, folder),
            lambda folder=folder: masked(net, folder),
        ):
            with pytest.raises(ArtifactError, match=r"cannot be (written|used as an output folder): .*another folder"):
                action()
            trace.assert_unchanged()
    assert (tmp_path / "file").read_text() == "mine"
    assert not any(p.is_file() for p in (tmp_path / "folder").rglob("*"))


def test_a_read_only_folder(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda path, mode: not mode & os.W_OK)  # as root, permissions do not matter
    for action in (lambda: pruned(Chain(), tmp_path), lambda: write_report(result, tmp_path)):
        with pytest.raises(ArtifactError, match="it is read-only; choose another folder"):
            action()
    shown = CliRunner().invoke(main, [*PRUNE, str(tmp_path)])
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert len(shown.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(umask: int, mode: int, result: Result, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save(result, tmp_path)
        write_report(result, tmp_path, curves=CURVES)
        result.history.save(tmp_path / "history.jsonl")
        masked(Chain(), tmp_path)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 10
    assert set(modes.values()) == {mode}


def test_an_interrupt_while_a_file_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")

    def interrupt(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", interrupt)
    assert contents(tmp_path) == {"file": b"old"}


# --- two runs in one folder -------------------------------------------------------------------------------------


def test_a_folder_that_another_process_runs_in(tmp_path: Path) -> None:
    ready = multiprocessing.get_context("forkserver").Event()
    other = process(holding, tmp_path, ready)
    try:
        assert ready.wait(120)
        net = Chain()
        trace = Trace(net)
        for run in (pruned, masked):
            with pytest.raises(ArtifactError, match=rf"process {other.pid} is running in .* already; wait for its end"):
                run(net, tmp_path)
        trace.assert_unchanged()
        shown = CliRunner().invoke(main, [*PRUNE, str(tmp_path)])
        assert shown.exit_code == 1
        assert f"process {other.pid} is running in" in shown.stderr
    finally:
        other.kill()
        other.join()
    assert (tmp_path / "run.lock").exists()  # and keeps nobody out
    (tmp_path / ".singe-0123").mkdir()
    (tmp_path / ".singe-0123" / "half").write_text("what a kill left half-written")
    pruned(Chain(), tmp_path)
    assert list(contents(tmp_path)) == [checkpoint.CHECKPOINT]


def test_a_folder_that_this_process_runs_in(tmp_path: Path) -> None:
    class Inside(Callback):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def try_it(self) -> None:
            try:
                pruned(Chain(), tmp_path / ".")
            except ArtifactError as error:
                self.seen.append(str(error))

        def on_run_end(self, event: Any) -> None:
            self.try_it()
            thread = threading.Thread(target=self.try_it)
            thread.start()
            thread.join()

    inside = Inside()
    prune(Chain(), BATCHES, **asked(verify=False, out_dir=tmp_path, callbacks=[inside], **FAST))
    assert len(inside.seen) == 2
    assert all(f"process {os.getpid()} is running in" in text for text in inside.seen)
    with locked(tmp_path, run=False):
        pruned(Chain(), tmp_path)  # one after the other
        pruned(Chain(), tmp_path)
    assert list(contents(tmp_path)) == [checkpoint.CHECKPOINT]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with locked(tmp_path):
        pass
