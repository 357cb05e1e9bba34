"""The README tells the truth: every command runs, every file is in its tree, every link leads somewhere.

Commands run as written, with options appended that make them short; the two one-line set-ups are run by .ci/run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
README = (HOME / "README.md").read_text()
SHORT = {
    "train.py": "--steps 2 --scenes 40 --eval-scenes 4 --batch-size 4 --log-every 1 --lora-rank 4",
    "generate_pairs.py": "--scenes 12",
    "evaluate.py": "--num 4",
    "model.pretrain": "--steps 2 --scenes 64 --out {out}",
    "benchmarks/alignment.py": "--rows dpo --seeds 0 --scenes 4 --out {out} -- --steps 2 --scenes 40 --batch-size 4",
}


def commands() -> list[str]:
    """Lines of the README's bash blocks, without comments and without the set-up lines."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split(" # ")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if "requirements.txt" not in line and "benchmarks/step.py" not in line]


def split(command: str) -> tuple[list[str], str]:
    """(argument list run by this interpreter, the script or module it starts)."""
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py") or w.startswith("model."))
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    port = ["--standalone"] if words[0] == "torchrun" else []
    return [*launcher, *port, *words[1:]], script


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files alone, as in a fresh clone; commands of one README share it, in order."""
    out = tmp_path_factory.mktemp("clone")
    for name in tracked():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HOME / name, out / name)
    return out


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=HOME, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_every_command_runs(clone):
    assert len(commands()) >= 8
    done_before = set()
    for command in commands():
        words, script = split(command)
        short = shlex.split(SHORT.get(script, "").format(out=clone / "runs" / "short"))
        if "--resume" in words:
            short = [w for w in short if w != "--resume"]
            first = [w for w in words if w != "--resume"]
            assert run(first + short, clone).returncode == 0
        result = run(words + short, clone)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        done_before.add(script)
    assert {"train.py", "generate_pairs.py", "evaluate.py", "model.pretrain"} <= done_before


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True)


def test_file_tree_is_complete():
    """Every tracked file stands in the tree, by its own line or by that of its folder, and nothing else does."""
    tree = re.search(r"## Files\n+```\n(.*?)```", README, re.DOTALL).group(1)
    named, folder = set(), ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            named.add(name)
        else:
            named.add(folder + name)
    files = tracked()
    folders = {f"{'/'.join(f.split('/')[:i])}/" for f in files for i in range(1, f.count("/") + 1)}
    assert named <= set(files) | folders, named - set(files) - folders
    whole = {n for n in named if n.endswith("/") and not any(m != n and m.startswith(n) for m in named)}
    missing = [f for f in files if f not in named and not any(f.startswith(w) for w in whole)]
    assert [f for f in missing if not f.endswith("__init__.py")] == []


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", README) if not t.startswith("http")]
    assert len(targets) > 5
    assert [t for t in targets if not (HOME / t).exists()] == []
