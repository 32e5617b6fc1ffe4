"""The bytes of tokens against the text they were made from."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pear_data.chat.token_bytes import TokenBytes
from pear_data.demo import asset
from pear_data.errors import UsageError

TEXT = "2*3=6, ünï 漢字 🙂🏽\r\n\t “q” \x00\x7f"


def sentence_piece():
    """A, the space, and every byte."""
    pieces = ["<unk>", "<s>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def test_byte_level_tokens_are_the_texts_bytes():
    tokenizer = AutoTokenizer.from_pretrained(asset("initial"))
    tokens = TokenBytes(tokenizer)
    ids = np.array(tokenizer(TEXT + "<|im_end|>").input_ids)
    lengths = tokens.lengths(ids)
    assert tokens.joined(ids, lengths).tobytes() == (TEXT + "<|im_end|>").encode()
    assert lengths[-1] == len("<|im_end|>")
    assert tokens.text(ids[-2:].tolist()) == b"\x7f<|im_end|>"
    assert tokens.text([]) == b""
    cut = np.maximum(lengths - 1, 0)
    pieces = [tokens.text([token])[1:] for token in ids.tolist()]
    assert tokens.joined(ids, cut).tobytes() == b"".join(pieces)


def test_sentence_piece_tokens_are_the_texts_bytes_but_for_the_space_put_before_it():
    tokenizer = sentence_piece()
    tokens = TokenBytes(tokenizer)
    text = f"<s>a a<s> {TEXT}"
    ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
    previous = np.concatenate(([3], ids[:-1]))
    plain, spaceless = tokens.lengths(ids), tokens.without_added_spaces(ids, previous)
    assert tokens.joined(ids, plain).tobytes() == text.replace("<s>", "<s> ").encode()
    assert tokens.joined(ids, spaceless).tobytes() == text.encode()


def test_a_tokenizer_whose_tokens_do_not_say_their_bytes_is_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UsageError, match="neither byte-level BPE's nor SentencePiece's"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
