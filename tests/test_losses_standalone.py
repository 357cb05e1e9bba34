"""Every file in losses/ works on its own: copied into an empty folder it runs with only torch installed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from losses.dpo import dpo_loss

ROOT = Path(__file__).resolve().parents[1]
LOSSES = sorted(path for path in (ROOT / "losses").glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "math", "difflib", "typing", "__future__"}
PROJECT = ("common", "reinforce", "lifecycle", "results", "losses", "model", "data", "retrieval", "pairs", "metrics", "benchmarks", "tests",
           "train", "generate_pairs", "evaluate")

# Runs each script as __main__ after forbidding every import by a name of the project; what they say, as JSON.
RUNNER = f"""
import contextlib, io, json, runpy, sys, traceback

class NoProject:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {PROJECT!r}:
            raise ImportError(f"{{name}} belongs to the project")

def run(script):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            traceback.print_exc()
    return out.getvalue(), err.getvalue()

sys.meta_path.insert(0, NoProject)
print(json.dumps({{script: run(script) for script in sys.argv[1:]}}))
"""
# What a self-check has to notice, wherever a loss has it: the sign of the reference, which reference is whose, and beta.
MUTANTS = [("(precision) - reference", "(precision) + reference"), ("(precision) - reference", "(precision) - 0 * reference"),
           ("[reference_chosen_logps, reference_rejected_logps", "[reference_rejected_logps, reference_chosen_logps"),
           ("beta * (", "("), ("beta * _", "_"), ("-kl_coef * kl", "kl_coef * kl"), ("- kl_coef * kl", "+ kl_coef * kl"),
           ("torch.maximum(plain", "torch.minimum(plain")]
STATEMENTS = ("import losses", "from model import attention", "import train")
SCRIPT = {statement: f"statement{i}.py" for i, statement in enumerate(STATEMENTS)}


def mutants(path: Path) -> list[str]:
    """The mutants of a loss file."""
    source = path.read_text(encoding="utf-8")
    head, body = source.split("\n# sequence name", 1) if "\n# sequence name" in source else source.split("\nimport torch\n", 1)
    return [source.removesuffix(body) + body.replace(right, wrong, 1) for right, wrong in MUTANTS if right in body]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """What each script writes to the console and its errors, run in a folder without the project, isolated: no PYTHON*
    variables, no user site, no current folder on the path."""
    folder = tmp_path_factory.mktemp("alone")
    for source in LOSSES:
        shutil.copy(source, folder)
    for statement, name in SCRIPT.items():
        (folder / name).write_text(statement + "\n", encoding="utf-8")
    source = (ROOT / "losses" / "dpo.py").read_text(encoding="utf-8")
    (folder / "broken.py").write_text(source.replace("F.logsigmoid(margin)", "F.logsigmoid(-margin)"), encoding="utf-8")
    assert source.count("F.logsigmoid(margin)") >= 1
    for path in LOSSES:
        for i, text in enumerate(mutants(path)):
            (folder / f"{path.stem}-{i}.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-I", "-c", RUNNER, *(path.name for path in folder.iterdir())], cwd=folder,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("source", LOSSES, ids=lambda path: path.stem)
def test_runs_alone(source, said):
    console, errors = said[source.name]
    assert errors == ""
    assert console.startswith(f"{source.stem} ok: ") and console.count("\n") == 1


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


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_runner_refuses_project_imports(statement, said):
    """The check above can fail: a script that does import the project is stopped."""
    assert "belongs to the project" in said[SCRIPT[statement]][1]


def test_a_wrong_self_check_fails(said):
    """The self-check can fail: a copy of dpo.py with the margin's sign turned over does not pass."""
    assert "Traceback" in said["broken.py"][1] and " ok: " not in said["broken.py"][0]


@pytest.mark.parametrize("source", LOSSES, ids=lambda path: path.stem)
def test_the_self_check_notices_a_wrong_reference_sign_or_beta(source, said):
    if source.stem not in ("sft", "reward_model", "fisao"):  # which have neither
        assert mutants(source)
    for i in range(len(mutants(source))):
        console, errors = said[f"{source.stem}-{i}.py"]
        assert "AssertionError" in errors and console == "", mutants(source)[i]


def test_the_loop_of_the_readme():
    """Position t predicts token t + 1, only tokens of the response count, and the reference gets no gradient."""
    block = re.search("```python\n(.*?)```", (ROOT / "losses" / "README.md").read_text(), re.DOTALL)[1]
    torch.manual_seed(0)
    tables = [torch.randn(5, 5, requires_grad=True) for _ in range(2)]  # (token, next token)
    models = [lambda input_ids, table=table: SimpleNamespace(logits=table[input_ids]) for table in tables]
    ids, mask = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.tensor([[False, False, True, True]] * 2)
    names = {"torch": torch, "dpo_loss": dpo_loss, "images": {}, "model": models[0], "reference_model": models[1],
             "chosen": (ids, mask), "rejected": (ids.flip(0), mask)}
    exec(block, names)
    first, second = (table.log_softmax(-1) for table in tables)
    ratios = [(t[2, 3] + t[3, 4], t[3, 2] + t[2, 1]) for t in (first, second)]
    margin = 0.1 * ((ratios[0][0] - ratios[0][1]) - (ratios[1][0] - ratios[1][1]))
    torch.testing.assert_close(names["losses"], torch.nn.functional.softplus(torch.stack([-margin, margin])))
    assert tables[0].grad is not None and tables[1].grad is None


def test_init_is_empty():
    assert (ROOT / "losses" / "__init__.py").read_bytes() == b""
