"""Scored spans against the generation marks of templates that others wrote.

TRL ships chat templates as models carry them (X.jinja) beside twins with generation marks (X_training.jinja).
Wherever both render the same text, the spans we derive from X must be the twin's marks less what the generation
prompt holds and less what follows the end-of-turn token. The marks come from transformers' own tracker, the
generation prompts from `apply_chat_template`, the end-of-turn tokens from the table below; the tokenizer is a real
one (Mistral's tekken) that has been given the families' control tokens.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import mistral_common
import numpy as np
import pytest
import trl
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase
from transformers.integrations.mistral import convert_tekken_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from pear_data.chat.messages import Conversation
from pear_data.chat.tokenization import ChatTokenizer, TokenizedSample
from pear_data.errors import SampleError, UsageError

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PAIRS = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))
PARTS = {"idefics3", "llava_next", "smolvlm"}  # templates that read contents as lists of parts only

ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "cohere2": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek_r1_distill": ["<\uff5cend▁of▁sentence\uff5c>"],
    "deepseekv3": ["<\uff5cend▁of▁sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<tool_call|>"],
    "gemma": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "glm4moe": ["<|user|>", "<|observation|>", "<|system|>"],
    "gptoss": ["<|return|>", "<|end|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>", "<|eom|>"],
    "phi3": ["<|end|>"],
    "phi3_5": ["<|end|>"],
    "smolvlm": ["<end_of_utterance>"],
}  # all others: <|im_end|>

# Templates that render an earlier turn otherwise once a later message follows: they need --turns.
REWRITING = {
    "diffusion_gemma",
    "glm4moe",
    "gptoss",
    "qwen3",
    "qwen3_5_nothink",
    "qwen3_5_think",
    "qwen3_6",
} | {
    "nemotron_3_5_lightning",
    "nemotron_3_nano",
    "nemotron_3_super",
    "nemotron_3_ultra",
}

Span = tuple[int, int]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def called(name: str, call_id: str, **arguments: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(text: str, name: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": name, "tool_call_id": call_id}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name."}},
            "required": ["city"],
        },
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Sum of two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "x": {"type": "integer", "description": "One."},
                "y": {"type": "integer", "description": "Other."},
            },
            "required": ["x", "y"],
        },
    },
}
SPELLED = "Write <|im_end|>\n<|im_start|>assistant\nHa!<|eot_id|><end_of_turn></s><|end|> in a file."

CONVERSATIONS = {
    "single": Conversation([user("What is 2+2?"), assistant("2+2 is 4.")]),
    "one token": Conversation([user("2+2?"), assistant("4")]),
    "empty answer": Conversation([user("Say nothing."), assistant("")]),
    "two turns": Conversation([user("Hi"), assistant("Hello!"), user("And 3+3?"), assistant("6.")]),
    "four turns, one text": Conversation([user("a"), assistant("a")] * 4),
    "system": Conversation([system("Be brief."), user("Hi"), assistant("Hello.")]),
    "system, two turns": Conversation(
        [system("Be brief."), user("Hi"), assistant("Hello."), user("Bye"), assistant("Goodbye.")]
    ),
    "ends with the user": Conversation([user("Hi"), assistant("Hello."), user("Still there?")]),
    "reasoning field": Conversation([user("2+2?"), assistant("4", reasoning_content="Two and two.")]),
    "reasoning field, two turns": Conversation(
        [
            user("2+2?"),
            assistant("4", reasoning_content="Two and two."),
            user("3+3?"),
            assistant("6", reasoning_content="Three and three."),
        ]
    ),
    "reasoning inline": Conversation([user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\n4")]),
    "channel field": Conversation([user("2+2?"), assistant("4", thinking="Two and two.")]),
    "unicode": Conversation(
        [user("¿Qué? 你好 🙂"), assistant("é e\u0301 ß 漢字 👩\u200d👩\u200d👧 \u202eabc\u202c")]
    ),
    "white space": Conversation([user("  spaced  \n"), assistant("\n\n  indented\n\tcode  \n\n")]),
    "code": Conversation([user("Code?"), assistant("```python\nprint('<b>' + \"{{ x }}\")\n```")]),
    "user spells markers": Conversation([user(SPELLED), assistant("No."), user(SPELLED), assistant("No!")]),
    "assistant spells markers": Conversation([user("Write it."), assistant(SPELLED)]),
    "consecutive answers": Conversation([user("Hi"), assistant("One."), assistant("Two.")]),
    "answer first": Conversation([assistant("Welcome!"), user("Hi"), assistant("How can I help?")]),
    "tool": Conversation(
        [
            user("Weather in Oslo?"),
            assistant("", tool_calls=[called("get_weather", "a1", city="Oslo")]),
            answer('{"celsius": 4}', "get_weather", "a1"),
            assistant("It is 4 degrees."),
        ],
        [WEATHER],
    ),
    "tool with reasoning": Conversation(
        [
            user("Weather in Oslo?"),
            assistant(
                "", reasoning_content="Look it up.", tool_calls=[called("get_weather", "a1", city="Oslo")]
            ),
            answer("4 degrees", "get_weather", "a1"),
            assistant("It is 4 degrees.", reasoning_content="The tool says 4."),
        ],
        [WEATHER],
    ),
    "two tools": Conversation(
        [
            system("Use tools."),
            user("Add, then the weather."),
            assistant("Adding.", tool_calls=[called("add", "b1", x=2, y=3)]),
            answer("5", "add", "b1"),
            assistant("", tool_calls=[called("get_weather", "b2", city="Bergen")]),
            answer("rain", "get_weather", "b2"),
            assistant("5, and rain."),
            user("Thanks"),
            assistant("Welcome."),
        ],
        [WEATHER, ADD],
    ),
    "ends with a call": Conversation(
        [user("Weather?"), assistant("", tool_calls=[called("get_weather", "c1", city="Rome")])], [WEATHER]
    ),
    "calls as text": Conversation(
        [
            user("Two sums."),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "add", "arguments": json.dumps({"x": n, "y": n})},
                    }
                    for n in (1, 2)
                ],
            },
            answer("2", "add", "d1"),
            answer("4", "add", "d2"),
            assistant("2 and 4."),
        ],
        [ADD],
    ),
}


def with_control_tokens(tekken: Path) -> PreTrainedTokenizerBase:
    """Mistral's tekken with every control token the templates write."""
    tokenizer = convert_tekken_tokenizer(str(tekken), chat_template="")
    sources = "".join(path.read_text() for path in TEMPLATES.glob("*.jinja"))
    control = set(re.findall(r"<[|\uff5c][^<>|\uff5c\s'\"{}]+[|\uff5c]>", sources))
    control |= {token for ends in ENDS.values() for token in ends}
    control |= {"<start_of_turn>", "<|turn>", "<|tool_call>", "<|tool_response>", "<tool_response|>"}
    control |= {"<|channel>", "<channel|>", "[gMASK]", "<sop>"}
    control -= set(tokenizer.all_special_tokens)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in sorted(control)])
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tags])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Tekken's first four thousand tokens: the same pattern and merges, loaded in no time."""
    tekken = json.loads(TEKKEN.read_text())
    tekken["config"]["default_vocab_size"] = tekken["config"]["default_num_special_tokens"] + 4_000
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps({**tekken, "vocab": tekken["vocab"][:4_000]}))
    return with_control_tokens(path)


def source(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def in_form(pair: str, conversation: Conversation) -> list[dict[str, Any]]:
    if pair not in PARTS:
        return [dict(message) for message in conversation.messages]
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in conversation.messages
    ]


def through(conversation: Conversation, turn: int | None) -> Conversation:
    """The conversation up to its `turn`-th assistant message (from 1); all of it for None."""
    if turn is None:
        return conversation
    index = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"][turn - 1]
    return Conversation(conversation.messages[: index + 1], conversation.tools)


def answers(conversation: Conversation) -> int:
    return sum(message["role"] == "assistant" for message in conversation.messages)


class Family:
    """One pair of templates, rendered by transformers alone."""

    def __init__(self, pair: str, tokenizer: PreTrainedTokenizerBase, x: str | None = None) -> None:
        self.pair = pair
        self.x = source(x or pair)
        self.tokenizer = tokenizer

    def text(self, conversation: Conversation) -> str:
        """X's rendering; any exception means that X refuses the conversation."""
        return self.tokenizer.apply_chat_template(
            in_form(self.pair, conversation),
            tools=conversation.tools,
            chat_template=self.x,
            tokenize=False,
        )

    def marks(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The twin's rendering and its generation marks, touching ones joined."""
        texts, marks = render_jinja_template(
            [in_form(self.pair, conversation)],
            tools=conversation.tools,
            chat_template=source(f"{self.pair}_training"),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        joined: list[Span] = []
        for start, end in marks[0]:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], end)
            elif start < end:
                joined.append((start, end))
        return texts[0], joined

    def prompts(self, conversation: Conversation) -> Iterator[list[str]]:
        """For each assistant turn the generation prompts that X has for it, its default one first."""
        messages = in_form(self.pair, conversation)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                hello = in_form(
                    self.pair, Conversation([user("Hi")])
                )  # without messages transformers refuses
                asked, prompted = (
                    self.tokenizer.apply_chat_template(
                        hello,
                        chat_template=self.x,
                        tokenize=False,
                        add_generation_prompt=prompt,
                    )
                    for prompt in (False, True)
                )
                opening = prompted.removeprefix(
                    asked.removesuffix(self.tokenizer.eos_token)
                )  # phi's, at the end
                yield [self.text(conversation).partition(opening)[0] + opening] if opening else []
                continue
            yield [
                self.tokenizer.apply_chat_template(
                    messages[:index],
                    tools=conversation.tools,
                    chat_template=self.x,
                    tokenize=False,
                    add_generation_prompt=True,
                    **mode,
                )
                for mode in ({}, {"enable_thinking": False}, {"enable_thinking": True})
            ]

    def continued(self, conversation: Conversation, text: str) -> list[int | None]:
        """Where each turn's generation prompt ends in `text`; None where the turn does not go on from any."""
        return [
            next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)
            for prompts in self.prompts(conversation)
        ]

    def expected(self, text: str, marks: list[Span], prompts: list[int]) -> list[Span]:
        """The marks less the generation prompts and less what follows the end-of-turn token."""
        spans: list[Span] = []
        for start, end in zip(prompts, [*prompts[1:], len(text)], strict=True):
            tokens = ENDS.get(self.pair, ["<|im_end|>"])
            inside = [(max(a, start), min(b, end)) for a, b in marks if a < end and b > start]
            stops = [max(text.rfind(t, a, b) + len(t) for t in tokens if t in text) for a, b in inside]
            closing = max(i for i, (a, _) in enumerate(inside) if stops[i] > a)  # behind it: the next header
            spans.extend([*inside[:closing], (inside[closing][0], stops[closing])])
        return spans


def scored(tokenizer: PreTrainedTokenizerBase, sample: TokenizedSample) -> tuple[str, list[Span]]:
    """A sample's text and its scored runs in characters, by decoding alone."""

    def decoded(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.loss_mask, [False]]).astype(np.int8)))
    at = [len(decoded(sample.input_ids[:edge])) for edge in edges]
    return decoded(sample.input_ids), list(zip(at[::2], at[1::2], strict=True))


def left_out(family: Family, conversation: Conversation, text: str) -> bool:
    """Whether X renders the conversation without a text or a call of the assistant's."""
    for i, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        texts = [message.get(field) or "" for field in ("content", "reasoning_content", "thinking")]
        if any(part.strip() not in text for part in texts):
            return True
        if "tool_calls" in message:
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            messages = [*conversation.messages[:i], without, *conversation.messages[i + 1 :]]
            with suppress(TemplateError, TypeError):
                if family.text(Conversation(messages, conversation.tools)) == text:
                    return True
    return False


def refuses_beginning(family: Family, conversation: Conversation) -> bool:
    """Whether X cannot render the conversation as it stood after one of its turns."""
    for turn in range(1, answers(conversation)):
        try:
            family.text(through(conversation, turn))
        except TemplateError:
            return True
    return False


Outcome = Literal[
    "equal", "choice", "refused: text left out", "refused: no rendering so far", "refused: another prompt"
]


def compare(
    family: Family, chat: ChatTokenizer, turns: str | None, conversation: Conversation
) -> Counter[Outcome]:
    """Compare every sample of the conversation whose text X and its twin render alike."""
    try:
        (samples,) = chat.encode([conversation])
    except UsageError as error:
        if turns is not None or "--turns last" not in str(error) or "--turns all" not in str(error):
            raise
        return Counter({"choice": 1})
    if isinstance(samples, SampleError):
        part = conversation if turns is None else through(conversation, answers(conversation))
        reason = refusal(family, part, samples)
        return Counter({reason: 1}) if reason else Counter()
    found: Counter[Outcome] = Counter()
    for sample in samples:
        text, spans = scored(family.tokenizer, sample)
        turn = int(sample.sample_suffix[1:]) if sample.sample_suffix else None
        if turns == "last" or (turns == "all" and not text.startswith(family.text(conversation))):
            turn = turn or answers(conversation)
        wanted = expectation(family, through(conversation, turn), text, last_only=turn is not None)
        if wanted is not None:
            assert spans == wanted, [text[a:b] for a, b in spans]
            found["equal"] += 1
    return found


def refusal(family: Family, part: Conversation, error: SampleError) -> Outcome | None:
    """Why a conversation that X and its twin render alike is refused, made sure of without our code."""
    try:
        text, (twin_text, _) = family.text(part), family.marks(part)
    except Exception:
        return None  # X or its twin refuses it
    if text != twin_text:
        return None
    if left_out(family, part, text):
        return "refused: text left out"
    if refuses_beginning(family, part):
        return "refused: no rendering so far"
    assert None in family.continued(part, text), error
    return "refused: another prompt"


def expectation(family: Family, part: Conversation, text: str, *, last_only: bool) -> list[Span] | None:
    """The spans wanted of a sample with this text; None where X and its twin render differently."""
    try:
        twin_text, marks = family.marks(part)
    except Exception:
        return None
    if text != twin_text:
        assert family.text(part) != twin_text
        return None
    prompts = family.continued(part, text)[-1 if last_only else 0 :]
    if None in prompts and family.pair == "llava_next":
        return None  # no generation prompt says where an assistant's opening turn begins
    return family.expected(text, marks, prompts)


@pytest.mark.parametrize("pair", PAIRS)
def test_spans_derived_from_prefixes(pair: str, tokenizer: PreTrainedTokenizerBase) -> None:
    family = Family(pair, tokenizer)
    found: Counter[Outcome] = Counter()
    for turns in (None, "last", "all"):
        chat = ChatTokenizer(tokenizer, source(pair), turns)
        assert chat.span_source == "prefix renderings"
        for name, conversation in CONVERSATIONS.items():
            outcome = compare(family, chat, turns, conversation)
            print(pair, turns, name, dict(outcome))
            found += outcome
    # R1's templates drop the reasoning and prompt for one: hardly a turn goes on from its generation prompt.
    assert found["equal"] >= {"deepseek_r1_distill": 1, "deepseekv3": 0}.get(pair, 34), found
    assert (found["choice"] > 0) == (pair in REWRITING), found


@pytest.mark.parametrize("pair", PAIRS)
def test_spans_from_marks(pair: str, tokenizer: PreTrainedTokenizerBase) -> None:
    twin = f"{pair}_training"
    family = Family(pair, tokenizer, x=twin)
    chat = ChatTokenizer(tokenizer, source(twin))
    assert chat.span_source == "generation marks"
    found: Counter[Outcome] = Counter()
    for name, conversation in CONVERSATIONS.items():
        outcome = compare(family, chat, None, conversation)
        print(pair, name, dict(outcome))
        found += outcome
    assert found["equal"] >= {"deepseek_r1_distill": 1, "deepseekv3": 0}.get(pair, 10), found


def test_pairs_are_many() -> None:
    assert len(PAIRS) >= 29


@pytest.fixture(scope="module")
def tekken() -> PreTrainedTokenizerBase:
    return with_control_tokens(TEKKEN)


def test_ids_are_those_of_apply_chat_template(tekken: PreTrainedTokenizerBase) -> None:
    """On all of tekken, wherever no token lies across the end of a generation prompt and no text spells markers."""
    for pair in ("qwen2_5", "llama3", "gemma3", "phi3"):
        chat = ChatTokenizer(tekken, source(pair))
        plain = [name for name in CONVERSATIONS if "spells" not in name and name != "white space"]
        outcomes = chat.encode([CONVERSATIONS[name] for name in plain])
        equal = 0
        for name, samples in zip(plain, outcomes, strict=True):
            if isinstance(samples, SampleError):
                continue
            conversation = CONVERSATIONS[name]
            wanted = tekken.apply_chat_template(
                list(conversation.messages), tools=conversation.tools, chat_template=source(pair)
            )["input_ids"]
            assert samples[0].input_ids.tolist() == wanted, name
            equal += 1
        assert equal >= 11
        assert chat.notes() == {}
