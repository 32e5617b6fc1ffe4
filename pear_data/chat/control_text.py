"""Control tokens of a tokenizer, and message texts that happen to spell one.

A message holding `<|im_end|>` means the nine characters, not the end of a turn. Such text is replaced by one
private-use character per token while the template renders, so that it can neither move a span nor become a
control token; the encoder puts it back as plain text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain

from pear_data.chat.messages import Conversation, map_strings, strings
from pear_data.errors import SampleError

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


Hidden = dict[str, str]  # private-use character -> the control-token text it stands for


class ControlText:
    """The texts that a tokenizer turns into control tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(tokens)
        self.pattern = re.compile(alternation(self.tokens))

    def hide(self, conversation: Conversation) -> tuple[Conversation, Hidden]:
        """The conversation with control-token text replaced, and what stands for what; usually unchanged."""
        texts = list(chain(strings(conversation.messages), strings(conversation.tools)))
        found = sorted({token for text in texts for token in self.pattern.findall(text)})
        if not found:
            return conversation, {}
        taken = set().union(*texts)
        free = (char for char in map(chr, _PRIVATE_USE) if char not in taken)
        hidden = dict(zip(found, free, strict=False))

        def change(text: str) -> str:
            return self.pattern.sub(lambda match: hidden[match.group()], text)

        replaced = dataclasses.replace(
            conversation,
            messages=map_strings(conversation.messages, change),
            tools=map_strings(conversation.tools, change),
        )
        return replaced, {char: token for token, char in hidden.items()}


def check_unescaped(text: str, hidden: Hidden) -> None:
    """Raise SampleError where the template wrote a replaced text in escaped form: it could not be put back."""
    for char, token in hidden.items():
        if json.dumps(char)[1:-1] in text:
            raise SampleError(f"the chat template escapes a text that spells the control token {token!r}")


def put_back(text: str, hidden: Hidden) -> str:
    """`text` with the replaced texts in it again."""
    for char, token in hidden.items():
        text = text.replace(char, token)
    return text


def put_back_shown(reason: str, hidden: Hidden) -> str:
    """The same for a message that shows a text by its repr."""
    return put_back(reason, {repr(char)[1:-1]: token for char, token in hidden.items()})


def alternation(words: Iterable[str]) -> str:
    """A regular expression for any of `words`, longest first, that fails fast: a trie of common prefixes."""
    groups: dict[str, list[str]] = {}
    for word in sorted(filter(None, words)):
        groups.setdefault(word[0], []).append(word)
    if not groups:
        return r"(?!)"
    branches = []
    for group in groups.values():
        prefix = common_prefix(group)
        rests = [word[len(prefix) :] for word in group if len(word) > len(prefix)]
        optional = "?" if len(rests) < len(group) else ""
        branches.append(re.escape(prefix) + (f"(?:{alternation(rests)}){optional}" if rests else ""))
    return "|".join(branches)


def common_prefix(texts: Sequence[str]) -> str:
    """The longest text that all of `texts` begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
