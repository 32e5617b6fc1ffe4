"""How conversations become texts with spans: by a chat template, or raw."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from datetime import date
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pear_data.chat.control_text import ControlText, check_unescaped, put_back_shown
from pear_data.chat.end_of_turn import EndOfTurn
from pear_data.chat.frame import AddedTokens, TurnFrame
from pear_data.chat.messages import Conversation, checked, message_text, with_content
from pear_data.chat.spans import ScoredText, SpanFinder, Turns
from pear_data.chat.template import ChatTemplate
from pear_data.errors import SampleError, UsageError

# Reasoning comes inline between these, and templates look for them in contents; some tokenizers call them special.
_THINK_TAGS = frozenset({"<think>", "</think>"})


class ChatFormat:
    """Conversations through the tokenizer's chat template, or through `chat_template` in its place."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        turns: Turns | None,
        today: date | None = None,
    ) -> None:
        tokens = _added_tokens(tokenizer)
        self._texts = _template_texts(tokenizer) if chat_template is None else (chat_template, chat_template)
        self._frames: dict[str, TurnFrame] = {}
        self._finders: dict[str, SpanFinder] = {}
        for text in dict.fromkeys(self._texts):
            template = ChatTemplate(text, tokenizer.special_tokens_map, today)
            frame = TurnFrame(template, tokens)
            self._frames[text] = frame
            self._finders[text] = SpanFinder(template, frame, EndOfTurn(frame, tokens), turns)
        framing = (frame.control_texts for frame in self._frames.values())
        self.control = ControlText(tokens.special.union(*framing) - _THINK_TAGS)

    @property
    def span_source(self) -> Literal["generation marks", "prefix renderings"]:
        """How the spans are found where a conversation offers no tools."""
        marks = self._frames[self._texts[0]].template.has_marks
        return "generation marks" if marks else "prefix renderings"

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for the date."""
        return any(frame.template.writes_date for frame in self._frames.values())

    @property
    def notes(self) -> Counter[str]:
        """Decisions of the span finders, counted."""
        return sum((finder.notes for finder in self._finders.values()), Counter())

    def fingerprint(self) -> str:
        """SHA-256 of the template's text, or of both where the tokenizer has one for tools."""
        return _sha256(*dict.fromkeys(self._texts))

    def scored_texts(self, conversation: Conversation) -> list[ScoredText]:
        """Rendered texts with their spans; raises SampleError and UsageError as `SpanFinder` does."""
        conversation = checked(conversation)
        template = self._texts[conversation.tools is not None]
        shaped = with_content(conversation, as_parts=self._frames[template].as_parts)
        shaped, hidden = self.control.hide(shaped)
        try:
            scored = self._finders[template].scored_texts(shaped)
        except SampleError as error:
            raise SampleError(put_back_shown(str(error), hidden)) from error
        for text in scored:
            check_encodable(text.text)
            check_unescaped(text.text, hidden)
        return [dataclasses.replace(text, hidden=hidden) for text in scored] if hidden else scored


class RawFormat:
    """One prompt and one response, without a template: BOS, prompt, response, EOS."""

    span_source: Literal["raw"] = "raw"
    writes_date = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "raw mode ends a response with the tokenizer's EOS token and it has none: "
                "pass a chat template with --chat-template FILE"
            )
        self.control = ControlText(_added_tokens(tokenizer).special)
        self.notes: Counter[str] = Counter()
        self._before = _ids_in_front(tokenizer)
        self._behind = (tokenizer.eos_token_id,)

    def fingerprint(self) -> str:
        """SHA-256 of the fact that there is no template."""
        return _sha256("none")

    def scored_texts(self, conversation: Conversation) -> list[ScoredText]:
        """The one text of a prompt and a response; raises SampleError for any other conversation."""
        conversation = checked(conversation)
        roles = [message["role"] for message in conversation.messages]
        if roles not in (["user", "assistant"], ["assistant"]) or conversation.tools:
            raise SampleError(
                f"without a chat template a sample is one prompt and one response, not {', '.join(roles)}; "
                "pass a chat template with --chat-template FILE"
            )
        conversation, hidden = self.control.hide(conversation)
        *prompts, response = [message_text(message) for message in conversation.messages]
        prompt = "".join(prompts)
        text = prompt + response
        check_encodable(text)
        spans, turns = ((len(prompt), len(text)),), ((len(roles) - 1, len(text)),)
        return [
            ScoredText(text, spans, turns, hidden=hidden, ids_before=self._before, ids_behind=self._behind)
        ]


def check_encodable(text: str) -> None:
    """Raise SampleError for text that no UTF-8 exists for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"the text holds a lone surrogate (U+{ord(text[error.start]):04X})") from None


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}.union(tokenizer.all_special_tokens)
    return AddedTokens(frozenset(special), frozenset(token.content for token in added) - special)


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The tokenizer's template, and the one it keeps for conversations with tools (mostly the same)."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no chat template: pass one "
            "with --chat-template FILE, or --chat-template none for plain prompts and responses"
        )
    try:
        return tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[])
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{reason} Pass one with --chat-template FILE") from error


def _ids_in_front(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids a tokenizer puts in front of any text: its BOS, where it adds one."""
    with_special = tokenizer("a")["input_ids"]
    (first, *_) = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(with_special[: with_special.index(first)])


def _sha256(*texts: str) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
