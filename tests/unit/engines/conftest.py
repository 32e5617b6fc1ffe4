from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from pear_data.tokens import TokenBatch

VOCAB = 211
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal model with layers between its base model and its output embeddings."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert_decoder")
    BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose rows see the whole sample."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert_encoder")
    BertForMaskedLM(BertConfig(**SIZES, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def batch_of() -> Callable[..., TokenBatch]:
    """A batch with a sample for each string of "." (not scored) and "x" (scored)."""

    def build(*masks: str) -> TokenBatch:
        offsets = np.cumsum([0, *map(len, masks)])
        ids = np.random.default_rng(1).integers(0, VOCAB, offsets[-1], dtype=np.int32)
        mask = np.array([mark == "x" for mark in "".join(masks)], dtype=np.bool_)
        return TokenBatch([f"s{i}" for i in range(len(masks))], ids, mask, offsets)

    return build


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub to reach, and an empty cache in this directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path
