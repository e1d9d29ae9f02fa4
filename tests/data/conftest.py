"""Fixtures for tests of the data: the tiny model's tokenizer and a cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from entrypoint.data.tokens import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with a ChatML template and no begin-of-sequence."""
    return load_tokenizer(tiny)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "prepared"


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """Where a test puts its traces."""
    return tmp_path / "lake"
