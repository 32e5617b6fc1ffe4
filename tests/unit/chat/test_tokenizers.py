from __future__ import annotations

import shutil
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pear_data.chat.tokenizers import load_tokenizer, same_ids, token_strings, tokenizer_fingerprint
from pear_data.errors import PearError, UsageError

MISTRAL = Path(mistral_common.__file__).parent / "data"


def byte_level(texts: list[str], *added: str) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(MISTRAL / "tokenizer.model.v1", folder / "tokenizer.model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return AutoTokenizer.from_pretrained(folder)


def test_loading(tmp_path: Path) -> None:
    saved = byte_level(["a b c"], "<s>")
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == saved.get_vocab()
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(saved)


def test_what_is_not_there_is_one_line_with_a_way_out(tmp_path: Path) -> None:
    for name in ("./no/such/folder", str(tmp_path / "gone"), str(tmp_path), "no-such/model"):
        with pytest.raises(PearError, match="folder") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_slow_tokenizers_are_refused(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"ByT5Tokenizer\) has no fast backend"):
        load_tokenizer(str(tmp_path))


def test_tokenizers_of_one_make_give_the_same_ids() -> None:
    first, second = byte_level(["the fox"] * 3), byte_level(["the fox"] * 3, "<more>")
    ids = np.array([1, 5, 5, 258], dtype=np.int32)
    assert same_ids(first, second, ids, ["the fox", "é 漢"]) is None
    assert same_ids(first, second, ids, []) is None


def test_the_first_difference_is_told() -> None:
    fox, dog = byte_level(["the fox"] * 3), byte_level(["the dog"] * 3)
    shared = len(pre_tokenizers.ByteLevel.alphabet())
    assert same_ids(fox, dog, np.arange(shared), []) is None
    ours, theirs = fox.convert_ids_to_tokens(shared), dog.convert_ids_to_tokens(shared)
    assert same_ids(fox, dog, np.arange(len(fox)), []) == (
        f"id {shared} is {ours!r} in the corpus's tokenizer and is {theirs!r} in the other"
    )
    reason = same_ids(fox, dog, np.arange(shared), ["xx", "a fox"])
    assert reason is not None
    assert reason.startswith("the other tokenizer splits 'a fox' differently: ")
    more = byte_level(["the fox"] * 3, "<more>")
    assert same_ids(more, fox, np.array([more.convert_tokens_to_ids("<more>")]), []) == (
        f"id {len(fox)} is '<more>' in the corpus's tokenizer and does not exist in the other"
    )


def test_strings_of_byte_level_tokens() -> None:
    tokenizer = byte_level([" fox 漢"] * 3, "<|im_end|>")
    strings = token_strings(tokenizer)
    assert len(strings) == len(tokenizer)
    ids = tokenizer("a fox 漢字\n<|im_end|>", add_special_tokens=False)["input_ids"]
    shown = [strings[i] for i in ids]
    assert shown[:2] == ["a", " fox"]
    assert shown[-2:] == ["\n", "<|im_end|>"]
    assert "\ufffd" in shown


def test_strings_of_sentence_piece_tokens(sentence_piece: PreTrainedTokenizerBase) -> None:
    strings = token_strings(sentence_piece)
    ids = sentence_piece("hi there\n🦄</s>", add_special_tokens=False)["input_ids"]
    assert [strings[i] for i in ids] == [
        " hi",
        " there",
        "\n",
        "\ufffd",
        "\ufffd",
        "\ufffd",
        "\ufffd",
        "</s>",
    ]
