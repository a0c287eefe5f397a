"""Tokenizers of both kinds, read once for all tests of data: reading SmolLM2's takes seconds."""

from __future__ import annotations

import pytest

from jindo_core.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_peer(smollm2_gguf):
    """The same as transformers reads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="session")
def llama(stories15m):
    return load_tokenizer(stories15m)


@pytest.fixture(scope="session")
def words():
    """Makes a byte-level tokenizer without merges, whose special tokens come first: BOS, EOS, others."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jindo_core.tokenizer import _Fast

    def make(special, template=None, **settings):
        names = special.split()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({name: i for i, name in enumerate([*names, *alphabet])}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, normalized=False, **settings) for name in names])
        peer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
        peer.chat_template = template
        ours = _Fast(peer)
        ours.peer = peer  # for tests that ask transformers the same
        return ours

    return make
