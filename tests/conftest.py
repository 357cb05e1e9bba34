"""Shared by all tests: the repository root on the path, one thread, small random models (tests/small.py)."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: threads would wait for each other
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory) -> Path:
    """A llava-hf checkpoint folder with random weights."""
    import small

    return small.write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP checkpoint folder with random weights."""
    import small

    return small.write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def model(llava_folder):
    """The random LLaVA, a fresh copy for each test."""
    from model.checkpoint import load_llava

    return load_llava(llava_folder)


@pytest.fixture(scope="session")
def pixels() -> torch.Tensor:
    """Four distinct pictures (4, 3, S, S)."""
    import small

    return small.pictures(4)


@pytest.fixture(scope="session")
def views() -> list:
    """The same pictures as views of one tile."""
    import small

    return small.views(4)
