"""Conversations to token ids and loss masks: the one place where a corpus is tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pear_data.chat.boundaries import BoundaryEncoder, Encoded
from pear_data.chat.formats import ChatFormat, RawFormat
from pear_data.chat.messages import Conversation
from pear_data.chat.plain_control import PlainControlEncoder
from pear_data.chat.spans import ScoredText, Turns
from pear_data.chat.tokenizers import tokenizer_fingerprint
from pear_data.errors import SampleError, UsageError

RAW = "none"  # in place of a template's text: no template, plain prompt and response

CONTROL_TEXT = "samples with control-token text encoded as plain text"
SPLITS = "samples with a token undone where scored text begins or ends"
UNPRECEDED = "samples whose first token is left unscored, as nothing precedes it"

SpanSource = Literal["generation marks", "prefix renderings", "raw"]


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Ids of one sample and which of them are scored; its id is the row's with `sample_suffix` behind it."""

    sample_suffix: str
    input_ids: npt.NDArray[np.int32]  # [tokens]
    loss_mask: npt.NDArray[np.bool_]  # [tokens], at least one true, the first never


class ChatTokenizer:
    """Tokenizes conversations with a fast tokenizer and its chat template.

    `chat_template` is the text of a Jinja template to use in place of the tokenizer's, or "none" for raw mode:
    the tokenizer's own BOS and the prompt, then the response and EOS, which are scored. `turns` says what becomes
    of conversations whose earlier turns the template rewrites once later messages follow. `today` is the date that
    templates write which write one; by default that of the clock.

    Raises UsageError for a tokenizer without a fast backend or chat template, and for a template that does not
    show where a turn begins or ends.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        turns: Turns | None = None,
        today: date | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UsageError(
                f"{type(tokenizer).__name__} has no fast backend, which tells what each token covers: "
                "put a tokenizer.json beside the model, or use a tokenizer that has one"
            )
        self._tokenizer = tokenizer
        self._format: ChatFormat | RawFormat = (
            RawFormat(tokenizer)
            if chat_template == RAW
            else ChatFormat(tokenizer, chat_template, turns, today)
        )
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        # Truncation, padding and trimmed offsets are settings that a tokenizer's file may bring along.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None
        self._encoder = BoundaryEncoder(self._backend)
        self._plain_encoder: PlainControlEncoder | None = None
        self._notes: Counter[str] = Counter()

    @property
    def span_source(self) -> SpanSource:
        """How the scored spans are found."""
        return self._format.span_source

    @property
    def writes_date(self) -> bool:
        """Whether the template writes the date into conversations."""
        return self._format.writes_date

    def fingerprint(self) -> str:
        """SHA-256 of what turns text into ids: the tokenizer's backend and its special tokens."""
        return tokenizer_fingerprint(self._tokenizer)

    def template_fingerprint(self) -> str:
        """SHA-256 of the chat template's text."""
        return self._format.fingerprint()

    def notes(self) -> dict[str, int]:
        """How often something had to be decided, by a phrase that reads on from the number."""
        counts = self._notes + self._format.notes
        return dict(sorted(counts.items()))

    def encode(self, conversations: Sequence[Conversation]) -> list[list[TokenizedSample] | SampleError]:
        """The samples of each conversation, or why it has none.

        Raises UsageError where the template or the choice of `turns` is at fault, not the conversation.
        """
        texts: list[ScoredText] = []
        outcomes: list[slice | SampleError] = []
        for conversation in conversations:
            try:
                scored = self.scored_texts(conversation)
            except SampleError as error:
                outcomes.append(error)
            else:
                outcomes.append(slice(len(texts), len(texts) + len(scored)))
                texts.extend(scored)
        samples = self.tokenize(texts)
        return [o if isinstance(o, SampleError) else _all_or_error(samples[o]) for o in outcomes]

    def scored_texts(self, conversation: Conversation) -> list[ScoredText]:
        """The first half of `encode`: the texts of a conversation's samples, with what of them is scored.

        Raises SampleError for a conversation without samples, and UsageError as `encode` does.
        """
        return self._format.scored_texts(conversation)

    def tokenize(self, texts: Sequence[ScoredText]) -> list[TokenizedSample | SampleError]:
        """The second half: one outcome per text. Texts without control-token text, nearly all, go in one batch."""
        plain = [text for text in texts if not text.hidden]
        batch = iter(self._encoder.encode([t.text for t in plain], [_boundaries(t) for t in plain]))
        return [self._sample(t, self._encode_hidden(t) if t.hidden else next(batch)) for t in texts]

    def _encode_hidden(self, text: ScoredText) -> Encoded | SampleError:
        if self._plain_encoder is None:
            self._plain_encoder = PlainControlEncoder(self._backend, self._format.control)
        self._notes[CONTROL_TEXT] += 1
        return self._plain_encoder.encode(text.text, _boundaries(text), text.hidden)

    def _sample(self, text: ScoredText, encoded: Encoded | SampleError) -> TokenizedSample | SampleError:
        if isinstance(encoded, SampleError):
            return encoded
        ids = np.concatenate([text.ids_before, encoded.ids, text.ids_behind]).astype(np.int32)
        mask = np.zeros(len(ids), dtype=np.bool_)
        positions = np.asarray(encoded.positions).reshape(-1, 2) + len(text.ids_before)
        for start, end in positions.tolist():
            mask[start:end] = True
        mask[len(ids) - len(text.ids_behind) :] = True
        self._notes[SPLITS] += encoded.splits > 0
        if mask[:1].any():
            self._notes[UNPRECEDED] += 1
            mask[0] = False
        if not mask.any():
            return SampleError("the response has no scored tokens")
        return TokenizedSample(text.suffix, ids, mask)


def _boundaries(text: ScoredText) -> list[int]:
    return [boundary for span in text.spans for boundary in span]


def _all_or_error(samples: list[TokenizedSample | SampleError]) -> list[TokenizedSample] | SampleError:
    error = next((sample for sample in samples if isinstance(sample, SampleError)), None)
    return error or [sample for sample in samples if isinstance(sample, TokenizedSample)]
