"""Stored rows: one JSON object per line, with where it comes from; what is stored is not computed again."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["alone", "append", "command_line", "commit", "environment", "on_a_cpu", "peak_mb", "read"]

HERE = Path(__file__).parent


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a line that was cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path.name}: a line of {len(line)} characters is cut off and left out", file=sys.stderr)
    return rows


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own even after a line that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    broken = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write(("\n" if broken else "") + json.dumps(row) + "\n")


def command_line() -> str:
    """The command of this process; of paths only the last part."""
    words = [Path(word).name if "/" in word and not word.startswith("torch/") else word for word in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def environment() -> dict[str, str]:
    """Command, commit, machine, device, threads and versions."""
    import torch  # here: parents that only start processes and keep rows do without

    cuda = torch.cuda.is_available()
    return {
        "command": command_line(),
        "commit": commit(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "torch-pruning", "timm")),
    }


def on_a_cpu(*packages: str) -> dict[str, str]:
    """Commit, machine and versions of what was computed on one thread."""
    return {
        "commit": commit(),
        "machine": f"{platform.machine()}, 1 thread, CPU",
        "versions": ", ".join(f"{p} {version(p)}" for p in packages),
    }


def alone(script: str, words: Sequence[str], limit: int) -> dict[str, Any]:
    """The row that ``script one WORDS`` prints last, in a process of one thread; its error, if it ends with one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", script, "one", *words]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {limit} s"}
    if ran.returncode:
        return {"error": (ran.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row: dict[str, Any] = json.loads((ran.stdout.strip().splitlines() or [""])[-1])
    return row


def commit() -> str:
    """The commit, and whether the code differs from it; stored rows and the pages made of them may.

    A copy of the files without their history is told: ``BENCHMARK_COMMIT=$(git rev-parse --short HEAD)``.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=HERE.parent, check=False
        ).stdout.strip()

    told = os.environ.get("BENCHMARK_COMMIT")
    if told:
        return told
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def peak_mb() -> float:
    """The most memory so far: of the device if there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
