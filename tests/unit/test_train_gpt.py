"""The example's data order: what makes a resumed run follow the unbroken one at any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # it imports torch


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt", ROOT / "examples/train_gpt.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_window_once_an_epoch_in_an_order_of_the_seed(example: ModuleType) -> None:
    corpus = example.Corpus(seed=3, context=4096, limit_bytes=1 << 20)
    epoch = corpus.samples(0, corpus.windows)
    assert sorted(epoch) == list(range(corpus.windows))
    assert epoch != sorted(epoch)
    assert corpus.samples(corpus.windows, corpus.windows) != epoch, (
        "the next epoch is shuffled anew"
    )
    other = example.Corpus(seed=4, context=4096, limit_bytes=1 << 20)
    assert other.samples(0, other.windows) != epoch


def test_the_order_depends_on_the_cursor_alone(example: ModuleType) -> None:
    """Asked in other portions, from another place, after a restart: the same samples."""
    corpus = example.Corpus(seed=0, context=4096, limit_bytes=1 << 20)
    whole = corpus.samples(0, 2 * corpus.windows)
    again = example.Corpus(seed=0, context=4096, limit_bytes=1 << 20)
    middle = corpus.windows - 3  # across the border of two epochs
    assert again.samples(middle, 7) == whole[middle : middle + 7]
    assert again.samples(2, 5) == whole[2:7], "and back again"


def test_targets_are_the_next_bytes(example: ModuleType) -> None:
    import torch

    corpus = example.Corpus(seed=0, context=64, limit_bytes=1 << 16)
    tokens, targets = corpus.batch([0, corpus.windows - 1], torch.device("cpu"))
    assert tokens.shape == targets.shape == (2, 64)
    assert bytes(tokens[0].tolist()) == bytes(corpus.text[:64].tolist())
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
