"""The `record` column of a corpus, read again."""

from __future__ import annotations

from pear_data.chat.messages import Conversation
from pear_data.corpus.layouts import Fields, Layout, Tokens, pair_layout, recognised
from pear_data.corpus.records import parse_json
from pear_data.errors import SampleError

NamedFields = tuple[str | None, str | None]


def conversation_of(record: str, named: NamedFields) -> Conversation:
    """The conversation that a stored row holds; `named` are the fields of prompt and response, where ingest was told.

    Raises:
        SampleError: the row came as token ids.
    """
    fields = parse_json(record)
    prompt, response = named
    layouts = [pair_layout(prompt, response)] if prompt and response else _of_text(fields)
    if not layouts:
        raise SampleError("the row came as token ids: there is no text for another tokenizer to read")
    content = layouts[0].content(fields)
    assert not isinstance(content, Tokens)
    return content


def _of_text(fields: Fields) -> list[Layout]:
    # A row of another layout may hold token ids too, of whatever they may be.
    return [layout for layout in recognised(fields) if not layout.stored]
