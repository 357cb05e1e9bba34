"""Every file in losses/ works on its own: copied into an empty folder it runs with only torch installed."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOSSES = sorted(path for path in (ROOT / "losses").glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "math", "difflib", "typing", "__future__"}
PROJECT = ("common", "reinforce", "losses", "model", "data", "retrieval", "pairs", "metrics", "benchmarks", "tests",
           "train", "generate_pairs", "evaluate")

# Runs a script as __main__ after forbidding every import by a name of the project.
RUNNER = f"""
import runpy, sys

class NoProject:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {PROJECT!r}:
            raise ImportError(f"{{name}} belongs to the project")

sys.meta_path.insert(0, NoProject)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run_alone(script: Path) -> subprocess.CompletedProcess[str]:
    """Run in its folder, isolated: no PYTHON* variables, no user site, no current folder on the path."""
    return subprocess.run([sys.executable, "-I", "-c", RUNNER, script.name], cwd=script.parent,
                          capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("source", LOSSES, ids=lambda path: path.stem)
def test_runs_alone(source, tmp_path):
    script = Path(shutil.copy(source, tmp_path))
    result = run_alone(script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{source.stem} ok: ") and result.stdout.count("\n") == 1
    assert result.stderr == ""


@pytest.mark.parametrize("source", LOSSES, ids=lambda path: path.stem)
def test_says_its_licence(source):
    first = source.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# MIT License, copyright (c) 2026 The Plumbline authors")
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The Plumbline authors\n")


@pytest.mark.parametrize("source", LOSSES, ids=lambda path: path.stem)
def test_imports_only_torch(source):
    imported = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno} imports relatively"
            imported.add(node.module.partition(".")[0])
    assert imported <= ALLOWED, f"{source.name} imports {sorted(imported - ALLOWED)}"


@pytest.mark.parametrize("statement", ["import losses", "from model import attention", "import train"])
def test_the_runner_refuses_project_imports(statement, tmp_path):
    """The check above can fail: a script that does import the project is stopped."""
    script = tmp_path / "script.py"
    script.write_text(statement + "\n", encoding="utf-8")
    result = run_alone(script)
    assert result.returncode != 0 and "belongs to the project" in result.stderr


def test_a_wrong_self_check_fails(tmp_path):
    """The self-check can fail: a copy of dpo.py with the margin's sign turned over does not pass."""
    source = (ROOT / "losses" / "dpo.py").read_text(encoding="utf-8")
    broken = source.replace("F.logsigmoid(margin)", "F.logsigmoid(-margin)")
    assert broken != source
    script = tmp_path / "dpo.py"
    script.write_text(broken, encoding="utf-8")
    assert run_alone(script).returncode != 0


def test_init_is_empty():
    assert (ROOT / "losses" / "__init__.py").read_bytes() == b""
