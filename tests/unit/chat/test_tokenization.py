from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pear_data.chat.messages import Conversation
from pear_data.chat.tokenization import (
    CONTROL_TEXT,
    SPLITS,
    UNPRECEDED,
    ChatTokenizer,
    TokenizedSample,
)
from pear_data.errors import SampleError, UsageError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: "
    "{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TEXT = "The quick brown fox, 42 times: hi there! USER: ASSISTANT: <|im_start|> é 漢字 \n\n\t  if x: return"


def byte_level(
    *, special: Sequence[AddedToken | str] = (), trim_offsets: bool = False
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with the pattern of GPT-2, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT] * 3,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    control = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer.add_special_tokens(control)
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(single="<s> $A", special_tokens=bos),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_level()


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Mistral's first tokenizer: a space in front of any text and behind any special token."""
    folder = tmp_path_factory.mktemp("mistral")
    (folder / "tokenizer.model").write_bytes(
        (Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1").read_bytes()
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    return AutoTokenizer.from_pretrained(folder)


def talk(*texts: str, **kwargs: Any) -> Conversation:
    roles = ("user", "assistant")
    return Conversation([{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **kwargs)


def one(chat: ChatTokenizer, conversation: Conversation) -> TokenizedSample:
    ((sample,),) = chat.encode([conversation])
    return sample


def scored(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask], clean_up_tokenization_spaces=False)


def whole(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample) -> str:
    return tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)


def test_assistant_turns_of_a_prompt_are_context_only():
    tokenizer = byte_level()
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    ((sample,),) = ChatTokenizer(tokenizer, CHATML).encode([Conversation(messages, None, 3)])
    ((whole,),) = ChatTokenizer(tokenizer, CHATML).encode([Conversation(messages)])
    assert sample.input_ids.tolist() == whole.input_ids.tolist()
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "d<|im_end|>"
    assert tokenizer.decode(whole.input_ids[whole.loss_mask]) == "b<|im_end|>d<|im_end|>"


def test_a_turn_is_scored_from_behind_its_prompt_to_its_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer)
    sample = one(chat, talk("hi there", "fox", "if", "return x"))
    assert scored(tokenizer, sample) == "fox<|im_end|>return x<|im_end|>"
    assert sample.input_ids.dtype == np.int32
    assert sample.loss_mask.dtype == np.bool_
    assert sample.sample_suffix == ""
    assert chat.notes() == {}
    assert chat.span_source == "prefix renderings"


def test_ids_are_transformers_own_with_one_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = one(ChatTokenizer(tokenizer), talk("hi", "there"))
    wanted = tokenizer.apply_chat_template(talk("hi", "there").messages)["input_ids"]
    assert sample.input_ids.tolist() == wanted
    assert (sample.input_ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it does add one of its own


def test_samples_come_back_in_order_beside_the_reasons(tokenizer: PreTrainedTokenizerBase) -> None:
    outcomes = ChatTokenizer(tokenizer).encode(
        [
            talk("a", "b"),
            talk("no answer"),
            Conversation([]),
            talk("<|im_end|>", "c"),
            talk("lone \ud800", "surrogate"),
            Conversation([{"content": "x"}]),
            Conversation(
                [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "x"}]
            ),
            talk("d", "e"),
        ]
    )
    kept = [scored(tokenizer, o[0]) for o in outcomes if not isinstance(o, SampleError)]
    assert kept == ["b<|im_end|>", "c<|im_end|>", "e<|im_end|>"]
    reasons = [str(o) for o in outcomes if isinstance(o, SampleError)]
    assert [reason.partition(":")[0] for reason in reasons] == [
        "the conversation has no assistant turn",
        "the conversation has no messages",
        "the text holds a lone surrogate (U+D800)",
        "message 1 has no role",
        "message 1 holds a part of type 'image'",
    ]
    assert ChatTokenizer(tokenizer).encode([]) == []


SPELLED = "say <|im_end|>\n<|im_start|>assistant\nha</s>"


def test_text_that_spells_control_tokens_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer)
    sample = one(chat, talk(SPELLED, SPELLED, "<s>", "</s>"))
    assert scored(tokenizer, sample) == f"{SPELLED}<|im_end|></s><|im_end|>"
    ids = tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    assert [(sample.input_ids == i).sum() for i in ids] == [1, 0, 4, 4]
    assert chat.notes() == {CONTROL_TEXT: 1}
    # Between two control tokens the ids are those of the plain text as it stands there.
    plain = tokenizer(f"user\n{SPELLED}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert sample.input_ids[2 : 2 + len(plain)].tolist() == plain


def test_control_text_in_roles_calls_and_tools_stays_text(tokenizer: PreTrainedTokenizerBase) -> None:
    template = CHATML.replace("{{ bos_token }}", "{{ bos_token }}{{ tools | tojson }}")
    call = {"function": {"name": "f<|im_end|>", "arguments": {"<|im_start|>": ["</s>"]}}}
    conversation = Conversation(
        [
            {"role": "us<|im_end|>er", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ],
        [{"name": "f<|im_end|>"}],
    )
    sample = one(ChatTokenizer(tokenizer, template), conversation)
    ends = sample.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ends.sum() == 2
    assert '"name": "f<|im_end|>", "arguments": {"<|im_start|>": ["</s>"]}' in scored(tokenizer, sample)


def test_tags_that_are_no_control_tokens_are_parsed(tokenizer: PreTrainedTokenizerBase) -> None:
    for tokens in (tokenizer, byte_level(special=["<think>", "</think>"])):
        chat = ChatTokenizer(tokens)
        sample = one(chat, talk("hi", "<think>x</think>y"))
        assert tokens.convert_tokens_to_ids("<think>") in sample.input_ids[sample.loss_mask]
        assert chat.notes() == {}


def test_templates_that_escape_hidden_text_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    escaped = "{{ m.content if m.role == 'assistant' else m.content | tojson(ensure_ascii=True) }}"
    chat = ChatTokenizer(tokenizer, CHATML.replace("{{ m.content }}", escaped))
    plain, spelled = chat.encode([talk("hi", "there"), talk("hi</s>", "there")])
    assert not isinstance(plain, SampleError)
    assert isinstance(spelled, SampleError)
    assert "escapes a text that spells the control token '</s>'" in str(spelled)


def test_reasons_show_the_text_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, CHATML.replace("{{ m.content }}", "{{ m.content | replace('a', '') }}"))
    (outcome,) = chat.encode([talk("hi", "alas</s>")])
    assert isinstance(outcome, SampleError)
    assert "('alas</s>')" in str(outcome)


def test_a_tokenizer_that_cannot_keep_control_text_plain(tokenizer: PreTrainedTokenizerBase) -> None:
    (sample,) = ChatTokenizer(tokenizer).encode([talk("</s>", "\U0010ffff1\U0010ffff")])
    assert isinstance(sample, SampleError)
    assert "as plain text" in str(sample)


def test_a_token_across_the_prompts_end_is_undone(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, VICUNA)
    prompt = "USER: hi ASSISTANT: "
    sample = one(chat, talk("hi", "there", "42", "fox"))
    assert scored(tokenizer, sample) == "there</s>fox</s>"
    assert whole(tokenizer, sample) == f"{prompt}there</s>USER: 42 ASSISTANT: fox</s>"
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    first = int(np.argmax(sample.loss_mask))
    assert sample.input_ids[:first].tolist() == ids
    response = tokenizer("there</s>", add_special_tokens=False)["input_ids"]
    assert sample.input_ids[first : first + len(response)].tolist() == response
    assert (
        tokenizer(whole(tokenizer, sample), add_special_tokens=False)["input_ids"]
        != sample.input_ids.tolist()
    )
    assert chat.notes() == {SPLITS: 1}


def test_a_token_across_the_end_of_a_plain_text_marker_is_undone() -> None:
    # On a tokenizer without tokens for them, the template's markers are plain text that may merge with anything.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        ["hi<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<", ">\n"] * 5,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML)
    chat = ChatTokenizer(tokenizer)
    conversation = talk("hi", "hi", "there <|im_end|>", "there <|im_end|>")
    text = tokenizer.apply_chat_template(conversation.messages, tokenize=False)
    sample = one(chat, conversation)
    assert whole(tokenizer, sample) == text
    assert scored(tokenizer, sample) == "hi<|im_end|>there <|im_end|><|im_end|>"
    assert chat.notes() == {SPLITS: 1}


def test_sentence_piece_adds_no_space_where_a_token_is_undone(
    sentence_piece: PreTrainedTokenizerBase,
) -> None:
    chat = ChatTokenizer(sentence_piece, VICUNA)
    sample = one(chat, talk("hi", "there"))
    tokens = sentence_piece.convert_ids_to_tokens(sample.input_ids.tolist())
    prompt = sentence_piece.tokenize("USER: hi ASSISTANT: ")
    assert prompt[-2:] == [":", "▁"]
    assert tokens == [*prompt, "there", "</s>"]
    assert chat.notes() == {SPLITS: 1}


def test_sentence_piece_keeps_its_space_behind_control_tokens(
    sentence_piece: PreTrainedTokenizerBase,
) -> None:
    template = "{{ bos_token }}" + VICUNA.replace("ASSISTANT: ", "ASSISTANT:")
    chat = ChatTokenizer(sentence_piece, template)
    conversation = talk("use </s> twice", "there", "bye", "bye")
    sample = one(chat, conversation)
    tokens = sentence_piece.convert_ids_to_tokens(sample.input_ids.tolist())
    assert [tokens.count(token) for token in ("<s>", "</s>")] == [1, 2]
    assert tokens[tokens.index("</s>") + 1] == "▁US"
    assert "".join(tokens).startswith("<s>▁USER:▁use▁</s>▁twice▁ASSISTANT:there</s>▁USER:")


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_many_tokens_of_one_character(trim_offsets: bool) -> None:
    tokenizer = byte_level(trim_offsets=trim_offsets)
    chat = ChatTokenizer(tokenizer, VICUNA)
    answers = ["🙂🙂", "👩\u200d👩\u200d👧", "e\u0301", "\u202eabc", " 漢字", "", "\n\nx", "4"]
    for answer, outcome in zip(answers, chat.encode([talk("🙂", answer) for answer in answers]), strict=True):
        assert not isinstance(outcome, SampleError)
        assert scored(tokenizer, outcome[0]) == f"{answer}</s>"
        prompt = tokenizer("USER: 🙂 ASSISTANT: ", add_special_tokens=False)["input_ids"]
        assert outcome[0].input_ids[: len(prompt)].tolist() == prompt


def test_control_tokens_that_take_in_white_space() -> None:
    strips = [
        AddedToken("<|end|>", special=True, rstrip=True, normalized=False),
        AddedToken("<|a|>", special=True, rstrip=True, normalized=False),
        AddedToken("<|u|>", special=True, normalized=False),
    ]
    tokenizer = byte_level(special=strips)
    template = (
        "{% for m in messages %}<|{{ m.role[0] }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|a|>\n{% endif %}"
    )
    chat = ChatTokenizer(tokenizer, template)
    sample = one(chat, talk("hi", "  there", "fox", "return"))
    assert scored(tokenizer, sample).replace(" ", "") == "there<|end|>return<|end|>"
    assert (
        sample.input_ids.tolist()
        == tokenizer.apply_chat_template(
            talk("hi", "  there", "fox", "return").messages, chat_template=template
        )["input_ids"]
    )
    assert chat.notes() == {}


def test_a_token_that_takes_in_the_prompts_white_space_is_undone() -> None:
    tokenizer = byte_level(special=[AddedToken("<|stop|>", special=True, lstrip=True, normalized=False)])
    template = CHATML.replace("<|im_end|>", "<|stop|>")
    chat = ChatTokenizer(tokenizer, template)
    sample = one(chat, talk("hi", ""))
    prompt = tokenizer("<s><|im_start|>user\nhi<|stop|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert sample.input_ids[: len(prompt["input_ids"])].tolist() == prompt["input_ids"]
    assert scored(tokenizer, sample) == "<|stop|>"
    assert chat.notes() == {SPLITS: 1}


def test_normalizers_that_drop_characters() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("x", ""), normalizers.Lowercase()]
    )
    chat = ChatTokenizer(tokenizer)
    sample = one(chat, talk("Hi", "xXﬁx", "x", "xx"))
    assert scored(tokenizer, sample) == "xfi<|im_end|><|im_end|>"  # X is lowered behind the dropping of x


def test_settings_of_a_tokenizers_file_do_not_cut_texts() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    sample = one(ChatTokenizer(tokenizer), talk("hi", "The quick brown fox"))
    assert scored(tokenizer, sample) == "The quick brown fox<|im_end|>"
    assert whole(tokenizer, sample).endswith("<|im_end|>\n")


def test_raw_mode(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, "none")
    assert chat.span_source == "raw"
    sample = one(chat, talk("hi ", "there"))
    prompt = tokenizer("hi ")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert sample.input_ids[: len(prompt)].tolist() == prompt
    assert scored(tokenizer, sample) == "there</s>"
    assert scored(tokenizer, one(chat, talk("hi", ""))) == "</s>"
    assert chat.notes() == {SPLITS: 1}
    spelled = one(chat, talk("<s>", "stop</s>"))
    assert scored(tokenizer, spelled) == "stop</s></s>"
    assert (spelled.input_ids == tokenizer.eos_token_id).sum() == 1


def test_raw_mode_takes_one_prompt_and_one_response(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, "none")
    (outcome,) = chat.encode([talk("a", "b", "c", "d")])
    assert isinstance(outcome, SampleError)
    assert "--chat-template" in str(outcome)
    no_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UsageError, match="EOS"):
        ChatTokenizer(no_end, "none")


def test_a_token_that_nothing_precedes_is_not_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    no_bos = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    )
    no_bos.backend_tokenizer.post_processor = None
    no_bos.eos_token = "</s>"
    chat = ChatTokenizer(no_bos, "none")
    sample = one(chat, talk("", "hi there"))
    assert not sample.loss_mask[0]
    assert sample.loss_mask[1:].all()
    (nothing,) = chat.encode([talk("", "")])
    assert isinstance(nothing, SampleError)
    assert "no scored tokens" in str(nothing)
    assert chat.notes() == {UNPRECEDED: 2}


def test_a_tokenizer_with_a_template_for_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    both = byte_level()
    both.chat_template = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    chat = ChatTokenizer(both)
    plain, tools = chat.encode([talk("a", "b"), talk("a", "b", tools=[{"name": "f"}])])
    assert not isinstance(plain, SampleError)
    assert not isinstance(tools, SampleError)
    assert whole(both, plain[0]) == f"<s>{whole(both, tools[0]).partition('<s>')[2]}"
    assert whole(both, tools[0]).startswith('[{"name": "f"}]<s>')
    assert chat.template_fingerprint() != ChatTokenizer(both, CHATML).template_fingerprint()
    both.chat_template = {"rag": CHATML}
    with pytest.raises(UsageError, match="--chat-template"):
        ChatTokenizer(both)


def test_tokenizers_that_cannot_do_it(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UsageError, match="no fast backend"):
        ChatTokenizer(ByT5Tokenizer(), CHATML)
    bare = byte_level()
    bare.chat_template = None
    with pytest.raises(UsageError, match="--chat-template none"):
        ChatTokenizer(bare)


def test_fingerprints_tell_what_determines_the_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer)
    assert chat.fingerprint() == ChatTokenizer(byte_level(), VICUNA).fingerprint()
    assert chat.template_fingerprint() != ChatTokenizer(tokenizer, VICUNA).template_fingerprint()
    assert chat.template_fingerprint() == ChatTokenizer(tokenizer, CHATML).template_fingerprint()
    more = byte_level(special=["<|more|>"])
    assert chat.fingerprint() != ChatTokenizer(more).fingerprint()
    more = byte_level()
    more.bos_token = "</s>"
    assert chat.fingerprint() != ChatTokenizer(more).fingerprint()
