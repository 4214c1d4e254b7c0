"""A CLIP byte-pair tokenizer whose merges are learnt from a list of words."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from safetydpo_jax.errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(
    words: Sequence[str], folder: pathlib.Path, *, max_length: int, vocab_size: int
) -> Any:
    """Learns merges and writes a tokenizer folder as Stable Diffusion checkpoints have it.

    Any text can be tokenized, since the alphabet holds all bytes; words of `words` become one token
    each when `vocab_size` has room for them.

    Args:
      words: the words to learn merges from, each counted once.
      folder: where vocab.json, merges.txt and their configs go.
      max_length: tokens in a prompt with both ends, to which prompts are padded or cut.
      vocab_size: the largest vocabulary to make; at least 514 (bytes, bytes ending a word, two
        ends).

    Returns:
      transformers' CLIPTokenizer.
    """
    from transformers import CLIPTokenizer

    if vocab_size < 514:
        raise UserError(f"vocab_size is {vocab_size}; a byte-pair vocabulary needs at least 514")
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(alphabet) - 2,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    # "Ġ" marks a space in this pre-tokenizer; CLIP marks ends of words instead, so words go alone.
    tokenizer.train_from_iterator(sorted(set(words)), trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    tokens += dict.fromkeys("".join(merge) for merge in merges)
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    for name, content in (
        ("vocab.json", vocab),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder))
