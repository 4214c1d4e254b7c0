"""The trained tokenizer is CLIP's kind, and words it has learnt are one token."""

import pytest

from safetydpo_jax.errors import UserError
from safetydpo_jax.pretrain.tokenizer import train_tokenizer

WORDS = ["dagger", "red", "apple", "background", "a", "on", "and"]


def test_known_words_are_one_token_and_any_text_works(tmp_path):
    tokenizer = train_tokenizer(WORDS, tmp_path, max_length=8, vocab_size=700)
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    ids = tokenizer("Zwölf apples!")["input_ids"]
    assert tokenizer.decode(ids[1:-1]).strip() == "zwölf apples !"
    ids = tokenizer("a red apple", padding="max_length", max_length=8)["input_ids"]
    assert len(ids) == 8
    assert ids[0] == tokenizer.bos_token_id
    assert ids[4:] == [tokenizer.eos_token_id] * 4
    # The end has the largest id, as in CLIP: transformers looks for the end by the largest id.
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 514"):
        train_tokenizer(WORDS, tmp_path, max_length=8, vocab_size=100)
