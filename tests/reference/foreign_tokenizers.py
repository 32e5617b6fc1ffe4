"""Tokenizers of real models, from the vocabularies that the package mistral_common ships, with chat templates."""

from __future__ import annotations

import base64
import importlib.resources
import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges

# Tokens taken of each vocabulary: they are listed as they were merged, so a head is a vocabulary of its own.
HEAD = 12_000

# Mistral 7B Instruct v0.2: a space before each answer.
MISTRAL_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}\
{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"""

# Llama 3: headers, and contents trimmed.
LLAMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def save_sentence_piece(folder: Path, template: str = MISTRAL_TEMPLATE) -> str:
    """Of Mistral's SentencePiece model, with byte fallback and a space put before texts; the folder."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(_data("mistral_instruct_tokenizer_240323.model.v3"))
    # Characters come last; of these ASCII is enough, the rest falls back to bytes.
    characters = [piece for piece in proto.pieces[HEAD:] if piece.piece == "▁" or piece.piece.isascii()]
    pieces = [*proto.pieces[:HEAD], *(piece for piece in characters if len(piece.piece) == 1)]
    vocabulary = {piece.piece: index for index, piece in enumerate(pieces)}
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    control = [piece.piece for piece in pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    scores = {piece.piece: piece.score for piece in pieces if piece.type == kinds.NORMAL}
    merges = generate_merges(vocabulary, scores, skip_tokens=control)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return _save(folder, backend, template, bos_token="<s>", eos_token="</s>")


def save_byte_level(folder: Path, template: str = LLAMA_TEMPLATE) -> str:
    """Of Mistral's tekken, a byte-level BPE vocabulary of 130,000 tokens; the folder."""
    tekken = json.loads(_data("tekken_240911.json"))
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in tekken["vocab"][:HEAD]}
    char_of = bytes_to_unicode()
    shown = {token: "".join(char_of[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[a], ranks[b], rank, a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(rank, first, second, a, b) for first, second, rank, a, b in sorted(known)]
    pairs = [(shown[a], shown[b]) for *_, a, b in sorted(merges)]
    backend = Tokenizer(
        models.BPE({shown[token]: rank for token, rank in ranks.items()}, pairs, ignore_merges=True)
    )
    pattern = Regex(tekken["config"]["pattern"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = ("<|begin|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return _save(folder, backend, template, bos_token="<|begin|>", eos_token="<|eot_id|>")


def _data(name: str) -> bytes:
    return (importlib.resources.files("mistral_common") / "data" / name).read_bytes()


def _save(folder: Path, backend: Tokenizer, template: str, **special: str) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)
