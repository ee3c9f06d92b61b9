# SPDX-License-Identifier: Apache-2.0
"""A tiny random language model with a tokenizer of single characters, and records for it."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpopt.finetune.language_model import Tokens

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,:|0123456789"


def tokenizer_of_characters():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_language_model(seed=0, dtype=torch.float64, hidden=16):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 3, hidden_size=hidden, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=2, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def random_records(number, seed=0, prompts=True):
    random = torch.Generator().manual_seed(seed)
    found = []
    for i in range(number):
        length = int(torch.randint(4, 20, (1,), generator=random))
        ids = torch.randint(3, len(CHARACTERS) + 3, (length,), generator=random)
        found.append(Tokens(ids, i % 3 if prompts else 0))
    return found
