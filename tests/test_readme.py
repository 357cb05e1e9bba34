"""The READMEs tell the truth: every command runs, every file is in its folder's list, every link leads somewhere.

Commands run as written, with options appended that make them short; the two one-line set-ups are run by .ci/run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[1]
READMES = {path.parent: path.read_text() for path in [HOME / "README.md", *sorted(HOME.glob("[!.]*/README.md"))]}
SHORT = {
    "train.py": "--steps 2 --scenes 40 --eval-scenes 4 --batch-size 4 --log-every 1 --lora-rank 4",
    "generate_pairs.py": "--scenes 12",
    "evaluate.py": "--scenes 4",
    "tools.pretrain": "--steps 2 --scenes 64 --out {out}",
    "benchmarks/alignment.py": "--rows dpo --seeds 0 --scenes 4 --out {out} -- --steps 2 --scenes 40 --batch-size 4",
}


def commands() -> list[str]:
    """Lines of the bash blocks, the main README's first, without comments and without the set-up lines."""
    blocks = [block for text in READMES.values() for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)]
    lines = [line.split(" # ")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]
    return [line for line in lines if "requirements.txt" not in line]


def split(command: str) -> tuple[list[str], str]:
    """(argument list run by this interpreter, the script or module it starts)."""
    words = shlex.split(command)
    script = next(w for w in words if w.endswith(".py") or w.startswith("tools."))
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    port = ["--standalone"] if words[0] == "torchrun" else []
    return [*launcher, *port, *words[1:]], script


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The tracked files alone, as in a fresh clone; the commands share it, in order."""
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
    """Those of one script one after another, since they build on each other; of two scripts at the same time."""
    lanes: dict[str, list] = {}
    for command in commands():
        words, script = split(command)
        lanes.setdefault("train.py" if script == "plots.py" else script, []).append((command, words, script))
    assert {"train.py", "generate_pairs.py", "evaluate.py", "tools.pretrain"} <= lanes.keys()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda lane: run_in_order(lane, clone), sorted(lanes.values(), key=len, reverse=True)))


def run_in_order(lane: list[tuple[str, list[str], str]], clone: Path) -> None:
    for command, words, script in lane:
        short = shlex.split(SHORT.get(script, "").format(out=clone / "runs" / "short"))
        if "--resume" in words and not (clone / "runs" / "adavip").exists():
            first = [w for w in words if w != "--resume"]
            assert run(first + short, clone).returncode == 0
        result = run(words + short, clone)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two run at the same time
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)


def listed(text: str) -> set[str]:
    """What the fenced list of files in a README names."""
    tree = re.search(r"## (?:The map|Files)\n.*?^```\n(.*?)```", text, re.DOTALL | re.MULTILINE).group(1)
    return {line.split()[0] for line in tree.splitlines()}


def test_every_file_is_listed():
    """A README lists the files and folders next to it, all of them and nothing else; those of deeper folders need no
    list of their own."""
    files = tracked()
    for folder, text in READMES.items():
        inside = [f for f in files if folder == HOME or f.startswith(f"{folder.name}/")]
        inside = inside if folder == HOME else [f.partition("/")[2] for f in inside]
        names = {head + slash for head, slash, _ in (f.partition("/") for f in inside)} - {"__init__.py"}
        assert listed(text) | {"README.md"} == names, folder
    assert set(READMES) == {HOME, *(HOME / name for name in listed(READMES[HOME]) if (HOME / name).is_dir()
                                    and name not in ("tests/", ".ci/"))}


def test_links_lead_somewhere():
    targets = [(folder, t) for folder, text in READMES.items() for t in re.findall(r"\]\(([^)]+)\)", text)]
    targets = [(folder, t) for folder, t in targets if not t.startswith("http")]
    assert len(targets) > 40
    assert [t for folder, t in targets if not (folder / t).exists()] == []
