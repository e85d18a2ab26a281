"""Two processes prune as one does, and the failure of one ends both. Started once; see rank_cells.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

import singe_plugin
from singe_plugin import FineTune
from singe_plugin.errors import ConfigError, DataError
from singe_plugin.loop.phase import rows_of
from singe_plugin.ranks import Division, Ranks, current, processes, together

import rank_cells

ROUNDING = 1e-10  # of double precision, after some training steps
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What both ranks have seen; a run of one process that ended in the middle is there for them to go on with."""
    said, _ = rank_cells.failing(
        rank_cells.runs(out_dir=folder / "one", callbacks=[rank_cells.Stops()])["obs and repair"]
    )
    assert said.startswith("KeyboardInterrupt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, rank_cells.__file__, str(folder)],
            env=os.environ | launched | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 3], "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def check(outcomes: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Both ranks have the same to the bit, and what one process has to rounding."""
    first, second = outcomes
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
        assert weight.shape == reference["weights"][name].shape, name
        assert torch.allclose(weight, reference["weights"][name], rtol=0, atol=ROUNDING), name
    assert first["removals"] == second["removals"] == reference["removals"]
    assert first["losses"] == second["losses"] == pytest.approx(reference["losses"], abs=ROUNDING)
    assert first["measured"] == second["measured"] == reference["measured"]


@pytest.mark.parametrize("name", sorted(rank_cells.runs()))
def test_two_ranks_prune_as_one(found: Found, name: str) -> None:
    """Batches of nine rows, five of which are one rank's; three and five batches to score on, or one."""
    check([rank[name] for rank in found], rank_cells.runs()[name]())


def test_a_launcher_needs_no_process_group(found: Found) -> None:
    """What the environment describes is made, and ended with the run."""
    check([rank["launched"] for rank in found], rank_cells.runs()["ig in rounds"]())
    assert [rank["left"] for rank in found] == [False, False]


def test_ranks_with_samplers_of_their_own(found: Found) -> None:
    check([rank["own batches"] for rank in found], rank_cells.as_if_own())


def test_wrappers_of_earlier_phases_are_gone(found: Found) -> None:
    assert [rank["wrappers"] for rank in found] == [0, 0]


@pytest.mark.parametrize(
    ("name", "both", "says"),
    [
        ("another model", True, "the weights of rank 1 are not those of rank 0"),
        ("another choice", True, "the units to remove of rank 1 are not those of rank 0"),
        ("a bad scoring batch", False, "OSError: the disk is gone"),
        ("a bad training batch", False, "the fine-tuning loader failed at batch 2"),
        ("a bad step", False, "ValueError: a bad batch"),
        ("a bad judge", False, "RuntimeError: no such image"),
        ("interrupted", False, "KeyboardInterrupt"),
        ("stopped", True, "KeyboardInterrupt"),
        ("an undivided batch", True, "shape (4,) for 9 examples"),
    ],
)
def test_a_failure_ends_both(found: Found, name: str, both: bool, says: str) -> None:
    """With what went wrong, at once, and with the model as it was (which the ranks check)."""
    first, second = (rank[name] for rank in found)
    assert says in first[0]
    assert says in second[0]
    if not both:
        assert first[0].startswith("RankError: rank 1 of 2 failed")
        assert not second[0].startswith("RankError")
    assert max(first[1], second[1]) < 60  # a group waits for 30 minutes


def test_a_rank_that_is_gone(found: Found) -> None:
    said, seconds = found[0]["alone"]
    assert said.startswith("RankError: rank 0 of 2 lost the others")
    assert seconds < 60


def test_two_ranks_go_on_where_one_stopped_and_one_where_two_stopped(found: Found, folder: Path) -> None:
    whole = rank_cells.runs()["obs and repair"]()
    check([rank["resumed"] for rank in found], whole)
    resumed = rank_cells.runs(out_dir=folder / "two", resume=True)["obs and repair"]()
    check([resumed, resumed], whole)


def test_the_command(found: Found, folder: Path) -> None:
    """Rank 0 says and writes everything, and what it wrote is whole."""
    pytest.importorskip("sklearn")
    (code, said, files), (other_code, silence, _) = (rank["the command"] for rank in found)
    assert (code, other_code, silence) == (0, 0, "")
    assert "parameters" in said
    assert {"model.safetensors", "report.md", "singe.json"} <= set(files)
    assert "checkpoint.safetensors" not in files
    loaded = singe_plugin.load(folder / "command")
    assert sum(p.numel() for p in loaded.model.parameters()) == loaded.after.params


def test_an_accelerator_accumulates(found: Found) -> None:
    accelerate = pytest.importorskip("accelerate")
    reference = rank_cells.accelerated(None)
    check([rank["accelerated"] for rank in found], reference)
    alone = rank_cells.accelerated(accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2))
    check([alone, alone], reference)


def test_an_accelerator_s_precision_is_obeyed() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    seen = []

    def step(model: Any, batch: Any) -> torch.Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return model(batch[0].float()).square().mean()

    try:
        amp = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        tuned = FineTune(steps=2, step_fn=step, amp=amp)
        net = rank_cells.net().float()
        batches = [(x.float(), y) for x, y in rank_cells.BATCHES]
        result = singe_plugin.prune(net, batches, target="params=0.4", finetune=tuned, repair=None)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
    assert seen == [(True, torch.bfloat16)] * 2
    assert result.options["finetune"]["amp"] == "Accelerator"


def test_an_accelerator_that_divides_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    amp = accelerate.Accelerator(cpu=True)
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        monkeypatch.setattr(
            accelerate.Accelerator, "distributed_type", property(lambda _, kind=kind: accelerate.DistributedType[kind])
        )
        with pytest.raises(ConfigError, match=f"divides the model among processes .{kind}."):
            FineTune(amp=amp)
    with pytest.raises(ConfigError, match="is no precision"):
        FineTune(amp=SimpleNamespace())


def test_rows_of_lists_and_of_too_few_examples() -> None:
    """Detectors take lists of images and of targets; who gets no example takes one that does not count."""
    images, targets = (
        [torch.full((3, 2, 2), float(i)) for i in range(3)],
        [{"boxes": torch.zeros(i, 4)} for i in range(3)],
    )
    (mine, theirs), count = rows_of((images, targets), Division(1, 2))
    assert count == 1
    assert [float(image.mean()) for image in mine] == [1.0]
    assert [len(target["boxes"]) for target in theirs] == [1]
    (x,), count = rows_of((torch.arange(2),), Division(3, 4))
    assert (x.tolist(), count) == ([0], 0)
    for bad in (
        (torch.zeros(4), torch.zeros(7)),
        ("no tensor", 3),
        (torch.zeros(4), torch.nn.utils.rnn.pack_sequence([torch.zeros(4)])),
    ):
        with pytest.raises(DataError, match="cannot be divided"):
            rows_of(bad, Division(0, 2))


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a batch system says how large a job is, and nothing that a process group is made from."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes() == 1
    with together() as ranks:
        assert type(ranks) is Ranks
    assert current().world == 1


def test_a_model_that_is_divided_is_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = rank_cells.net()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match=r"divided among processes \(FSDP\)"):
            singe_plugin.prune(model, rank_cells.BATCHES)
    finally:
        distributed.destroy_process_group()
