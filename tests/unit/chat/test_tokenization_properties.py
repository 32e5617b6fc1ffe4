"""Whatever the messages hold: the ids decode to the rendering, and the scored ones to what the assistant said."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pear_data.chat.messages import Conversation
from pear_data.chat.tokenization import ChatTokenizer
from pear_data.errors import SampleError

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BODY = "{% for m in messages %}HEAD{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"
TEMPLATES = {
    "chatml": BODY.replace("HEAD", "<|im_start|>{{ m.role }}\n").replace("OPEN", "<|im_start|>assistant\n"),
    "plain headers": BODY.replace("HEAD", "{{ m.role }}: ").replace("OPEN", "assistant: "),
}


@cache
def tokenizer(pattern: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without a pattern, merges run across words, lines and markers."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern)
    backend.decoder = decoders.ByteLevel()
    text = "assistant\n\n  user: assistant:  <|im_end|>\n<|im_start|>assistant\n\n<think>x\n\n</think> é漢字 "
    backend.train_from_iterator(
        [text] * 3, trainers.BpeTrainer(vocab_size=450, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    backend.add_tokens(["<think>", "</think>"])
    backend.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@cache
def chat(pattern: bool, template: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer(pattern), TEMPLATES[template])


FRAGMENTS = st.sampled_from(
    [*CONTROL, "<think>", "</think>", "assistant", "\n", " ", ":", "<|im_", "end|>", "é", "🙂"]
)
MESSAGE = st.lists(FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=8).map(
    "".join
)


@pytest.mark.parametrize("pattern", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(MESSAGE, min_size=2, max_size=6))
def test_scored_ids_are_what_was_said(texts: list[str], pattern: bool, template: str) -> None:
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    (samples,) = chat(pattern, template).encode([Conversation(messages)])
    if isinstance(samples, SampleError):
        assert "as plain text" in str(samples)
        assert "\U0010ffff" in "".join(texts)
        return
    (sample,) = samples
    decode = tokenizer(pattern).decode
    rendered = tokenizer(pattern).apply_chat_template(
        messages, chat_template=TEMPLATES[template], tokenize=False
    )
    assert decode(sample.input_ids, clean_up_tokenization_spaces=False) == rendered
    said = "".join(f"{text}<|im_end|>" for text in texts[1::2])
    assert decode(sample.input_ids[sample.loss_mask], clean_up_tokenization_spaces=False) == said
    control = tokenizer(pattern).convert_tokens_to_ids(CONTROL)
    markers = {"chatml": 2, "plain headers": 1}[template] * len(texts)
    assert sum((sample.input_ids == i).sum() for i in control) == markers
