"""A built wheel has all that the package has and nothing else, and works where only the wheel is installed.

    python .ci/check_wheel.py dist

The wheel goes into a fresh environment without its dependencies, which are looked up in the environment that this runs
in; the checkout is not on the path.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRIED = """
import sys, torch, singe_plugin
from pathlib import Path
assert Path(singe_plugin.__file__).is_relative_to(sys.prefix), singe_plugin.__file__
for name in singe_plugin.__all__:
    getattr(singe_plugin, name)
net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(2)]
result = singe_plugin.prune(net, batches, target="params=0.5", finetune=0)
assert result.after.params < result.before.params
"""


def of_the_package() -> set[str]:
    """What belongs into a wheel: the package with what its links lead to, but no caches."""
    found = set()
    for folder, folders, names in os.walk(ROOT / "singe_plugin", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names if not name.endswith(".pyc")}
    return found


def check_files(wheel: Path) -> None:
    """Compare names; what is about the distribution is left out."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, more = sorted(of_the_package() - found), sorted(found - of_the_package())
    if missing or more:
        raise SystemExit(
            f"{wheel.name} lacks {missing or 'nothing'} and has {more or 'nothing'} besides; see packages and "
            "package-data in pyproject.toml"
        )


def check_installed(wheel: Path) -> None:
    """Install it alone, ask the command for its version, and prune something."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
        here = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

        def run(*words: str | Path) -> str:
            done = subprocess.run(words, cwd=folder, env=here, text=True, capture_output=True, check=False)
            if done.returncode:
                raise SystemExit(f"{' '.join(map(str, words))[:80]}: {done.stdout}{done.stderr}")
            return done.stdout

        run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel.resolve())
        ours = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # a .pth file puts a folder on the path, but reads none of those in it: no editable install comes along
        (ours / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        version = wheel.name.split("-")[1]
        if version not in (said := run(python.with_name("singe"), "--version")):
            raise SystemExit(f"{wheel.name} has the version {version}, but `singe --version` says {said!r}")
        run(python, "-c", TRIED)


def main() -> None:
    wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{sys.argv[1]} has {len(wheels)} wheels; build one")
    check_files(wheels[0])
    check_installed(wheels[0])
    print(f"{wheels[0].name}: complete, and works by itself")


if __name__ == "__main__":
    main()
