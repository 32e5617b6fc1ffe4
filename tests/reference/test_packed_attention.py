"""The transformers engine's packs against plain transformers, on many kinds of attention and positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from tiny_models import CONFIGS, SIZES, reference_logprobs, save_model

from pear_data.engines.transformers_engine import TransformersEngine
from pear_data.tokens import TokenBatch

SMALL = {name: SIZES[name] for name in ("vocab_size", "hidden_size")}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
PHI = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONG_ROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
PACKED: dict[str, tf.PretrainedConfig] = {
    "qwen3": tf.Qwen3Config(**SIZES, head_dim=32),
    "qwen3-moe": tf.Qwen3MoeConfig(**SIZES, head_dim=32, **MOE),
    "mistral, window of 64": tf.MistralConfig(**SIZES, sliding_window=64),
    "gemma3, windows and full": tf.Gemma3TextConfig(**SIZES, head_dim=32, sliding_window=64),
    "gpt-oss, attention sinks": tf.GptOssConfig(
        **SIZES,
        head_dim=32,
        sliding_window=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
    "phi3, LongRoPE": tf.Phi3Config(
        **SIZES,
        **PHI,
        original_max_position_embeddings=256,
        rope_parameters=LONG_ROPE | {"rope_theta": 10_000.0},
    ),
    "deepseek-v3, latent attention": tf.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=64,
        first_k_dense_replace=1,
    ),
    "opt, learned positions": tf.OPTConfig(
        **SMALL,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2304,
        word_embed_proj_dim=128,
    ),
}
PADDED: dict[str, tf.PretrainedConfig] = {
    "bloom, ALiBi": tf.BloomConfig(**SMALL, n_layer=2, n_head=4),
    "mamba": tf.MambaConfig(**SMALL, num_hidden_layers=2),
    "llama4, chunks of 64": tf.Llama4TextConfig(
        **SIZES,
        head_dim=32,
        attention_chunk_size=64,
        intermediate_size_mlp=192,
        num_local_experts=2,
        num_experts_per_tok=1,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def corpus() -> TokenBatch:
    """Prompts with several responses, a common beginning of several prompts, long samples and two equal ones, mixed."""
    random = np.random.default_rng(5)
    ids, prompts = [], []

    def add(prompt: np.ndarray, scored: int) -> None:
        ids.append(np.concatenate([prompt, random.integers(0, SIZES["vocab_size"], scored)]).astype(np.int32))
        prompts.append(len(prompt))

    system = random.integers(0, SIZES["vocab_size"], 50)
    for question in (150, 90, 3):
        prompt = np.concatenate([system, random.integers(0, SIZES["vocab_size"], question)])
        for scored in (1, 20, 75):
            add(prompt, scored)
    for length, scored in ((5, 600), (300, 9), (700, 400), (1, 1), (12, 80)):
        add(random.integers(0, SIZES["vocab_size"], length), scored)
    ids.append(ids[4])
    prompts.append(prompts[4])
    masks = [np.arange(len(one)) >= prompt for one, prompt in zip(ids, prompts, strict=True)]
    offsets = np.cumsum([0, *map(len, ids)])
    names = [f"s{row}" for row in range(len(ids))]
    batch = TokenBatch(names, np.concatenate(ids), np.concatenate(masks), offsets)
    return batch.take(random.permutation(len(ids)))


@pytest.fixture(scope="module")
def batch() -> TokenBatch:
    return corpus()


@pytest.fixture
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TransformersEngine]:
    monkeypatch.setitem(CONFIGS, "model", (PACKED | PADDED)[request.param])
    engine = TransformersEngine(save_model(tmp_path, "model"), device="cpu")
    yield engine
    engine.close()


def check(engine: TransformersEngine, found: np.ndarray, exact: np.ndarray) -> None:
    error = np.abs(found - exact).max()
    print(f"{engine._model.config.model_type}: max error {error:.1e} over {len(found)} tokens")
    assert error <= 2e-5


@pytest.mark.parametrize("engine", PACKED, indirect=True)
def test_packed(engine: TransformersEngine, batch: TokenBatch, tmp_path: Path) -> None:
    assert engine.identity()["attention"] == "packed"
    assert engine.remark == ""
    done: list[int] = []
    found = engine.score(batch, done.append)
    assert sum(done) == batch.offsets[-1]
    check(engine, found, reference_logprobs(str(tmp_path / "model"), batch))


@pytest.mark.parametrize("engine", PADDED, indirect=True)
def test_padded_where_packing_would_change_the_numbers(
    engine: TransformersEngine, batch: TokenBatch, tmp_path: Path
) -> None:
    assert engine.identity()["attention"] != "packed"
    assert "cannot be packed" in engine.remark
    found = engine.score(batch, lambda tokens: None)
    check(engine, found, reference_logprobs(str(tmp_path / "model"), batch))
