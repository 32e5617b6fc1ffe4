"""Tiny Qwen2-shaped policies for the demo: their tokenizer, training, sampling and log-probs, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

Chat = list[dict[str, str]]
Encoded = tuple[
    list[int], int
]  # ids of a chat up to its end-of-turn token, and how many of them are the prompt

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_VOCABULARY = 512
CONTEXT = 2048
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with a ChatML template; any text can be encoded.

    It is a Qwen2 tokenizer in everything but its vocabulary, because transformers gives every checkpoint of that
    architecture Qwen2's way of splitting text, whatever its tokenizer.json says.
    """
    tokenizer = Qwen2Tokenizer(model_max_length=CONTEXT).train_new_from_iterator(
        texts, MAX_VOCABULARY, new_special_tokens=[START_OF_TURN, END_OF_TURN], show_progress=False
    )
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, END_OF_TEXT
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def new_policy(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """An untrained policy of about 0.9M parameters; heads of 32, the smallest vLLM takes."""
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )
    policy = Qwen2ForCausalLM(config)
    policy.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return policy


def encode(tokenizer: Qwen2Tokenizer, chat: Chat) -> Encoded:
    """Ids of a chat that ends with the assistant's reply; nothing after the end-of-turn token."""
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    reply_ids = tokenizer(chat[-1]["content"] + END_OF_TURN, add_special_tokens=False).input_ids
    return prompt_ids + reply_ids, len(prompt_ids)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rates: warm-up over the first twentieth of the steps, then a cosine down to a twentieth."""

    steps: int
    matrix_rate: float = 0.02
    other_rate: float = 0.003

    def share(self, step: int) -> float:
        """The share of its peak that every rate has at a step."""
        warmup = max(1, self.steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / (self.steps - warmup)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2


def train(
    policy: Qwen2ForCausalLM,
    batches: Iterator[list[Encoded]],
    schedule: Schedule,
    log: Callable[[str], None],
) -> None:
    """Next-token training on the reply tokens, in float32.

    Muon takes the matrices of the layers and AdamW the rest: in a minute on one core that gets further than AdamW
    alone does in five.
    """
    optimizers = _optimizers(policy)
    policy.train()
    for step in range(schedule.steps):
        for optimizer, peak_rate in zip(optimizers, (schedule.matrix_rate, schedule.other_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * schedule.share(step)
        loss = -_reply_logprobs(policy, next(batches)).mean()
        policy.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 200 == 0 or step == schedule.steps - 1:
            log(f"step {step:5d} of {schedule.steps}  loss {loss.item():.4f}")
    policy.eval()


def _optimizers(policy: Qwen2ForCausalLM) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    named = dict(policy.named_parameters())
    matrices = {name for name, parameter in named.items() if parameter.ndim == 2 and "embed" not in name}
    return (
        torch.optim.Muon([named[name] for name in named if name in matrices], weight_decay=0.01),
        torch.optim.AdamW([named[name] for name in named if name not in matrices], betas=(0.9, 0.95)),
    )


def score(
    policy: Qwen2ForCausalLM, rows: Sequence[Encoded], batch_rows: int = 32
) -> list[npt.NDArray[np.float64]]:
    """Log-probs (nats) of every row's reply tokens, end-of-turn token included."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scored: list[Any] = [None] * len(rows)
    with torch.no_grad():
        for start in range(0, len(rows), batch_rows):
            chosen = by_length[start : start + batch_rows]
            flat = _reply_logprobs(policy, [rows[i] for i in chosen]).double().numpy()
            lengths = [len(rows[i][0]) - rows[i][1] for i in chosen]
            for i, part in zip(chosen, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
                scored[i] = part
    return scored


def _reply_logprobs(policy: Qwen2ForCausalLM, rows: Sequence[Encoded]) -> torch.Tensor:
    """Log-probs of the reply tokens of right-padded rows, flat, row after row; padding never looks back."""
    width = max(len(ids) for ids, _ in rows)
    input_ids_BL = torch.zeros(len(rows), width, dtype=torch.long)
    scored_BL = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (ids, prompt_length) in enumerate(rows):
        input_ids_BL[i, : len(ids)] = torch.tensor(ids)
        scored_BL[i, prompt_length : len(ids)] = True
    hidden_BLD = policy.model(input_ids=input_ids_BL[:, :-1], use_cache=False).last_hidden_state
    logits_NV = policy.lm_head(hidden_BLD[scored_BL[:, 1:]])
    return -cross_entropy(logits_NV.float(), input_ids_BL[:, 1:][scored_BL[:, 1:]], reduction="none")


def sample(
    policy: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    prompts: Sequence[Chat],
    *,
    max_new_tokens: int = 320,
    batch_rows: int = 64,
) -> list[str | None]:
    """One reply to each chat at temperature 1.

    None where a reply did not end, or where its text does not tokenize back into the sampled ids: its log-probs would
    not be those it was sampled with.
    """
    replies: list[str | None] = []
    for start in range(0, len(prompts), batch_rows):
        texts = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            for chat in prompts[start : start + batch_rows]
        ]
        batch = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        output = policy.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            top_k=0,
            max_new_tokens=max_new_tokens,
        )
        replies += [_reply_text(tokenizer, ids) for ids in output[:, batch.input_ids.shape[1] :].tolist()]
    return replies


def _reply_text(tokenizer: Qwen2Tokenizer, ids: list[int]) -> str | None:
    if tokenizer.eos_token_id not in ids:
        return None
    ids = ids[: ids.index(tokenizer.eos_token_id)]
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text if tokenizer(text, add_special_tokens=False).input_ids == ids else None
