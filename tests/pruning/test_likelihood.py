"""Likelihoods in batches against plain transformers, one pair at a time."""

from __future__ import annotations

import pytest
import torch

from pruning import likelihood
from pruning.evidence import EvidenceError
from pruning.likelihood import Pair, encoded, likelihoods
from pruning.targets import attention_of
from tests.pruning.tiny_models import BOS, ids, tiny_base, tiny_model
from tests.reference.silenced import silenced

TEXTS = [("one", " two three"), ("a", " b"), ("who is it that", " knocks?"), ("x" * 30, " y")]


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_batches_score_as_single_sequences_do(family, monkeypatch):
    monkeypatch.setitem(likelihood._TOKENS, "cpu", 40)  # several batches, one of them padded
    base, plain = tiny_base(family), silenced(tiny_model(family), [1])
    pairs = [encoded(base.tokenizer, *texts) for texts in TEXTS]
    for (context, text), found in zip(
        TEXTS, likelihoods(base, pairs, attention_of([1])), strict=True
    ):
        whole = torch.tensor([ids(context + text)])
        with torch.no_grad():
            logprobs = plain(whole).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        chosen = logprobs.gather(1, whole[0, len(context) :, None])
        assert found.logprobs == pytest.approx(chosen[:, 0].tolist(), abs=1e-4)
        assert found.total == pytest.approx(chosen.sum().item(), abs=1e-4)
        assert found.ranks == tuple((logprobs > chosen).sum(-1).tolist())
        assert found.greedy == (max(found.ranks) == 0)


def test_spaces_that_end_the_context_count_as_the_continuations():
    base = tiny_base()
    assert encoded(base.tokenizer, "ab  ", "c") == Pair(tuple(ids("ab")), tuple(ids("  c")))


def test_what_the_tokenizer_puts_before_a_text_stands_before_the_context():
    base = tiny_base(adds_bos=True)
    assert encoded(base.tokenizer, "a", "b") == Pair((BOS, *ids("a")), tuple(ids("b")))


@pytest.mark.parametrize(("context", "text"), [("", " a"), ("a", "")])
def test_nothing_to_score(context, text):
    with pytest.raises(EvidenceError, match="nothing can be scored"):
        encoded(tiny_base().tokenizer, context, text)


def test_longer_than_the_models_context():
    with pytest.raises(EvidenceError, match="have 129 tokens, but tiny reads 128"):
        likelihoods(tiny_base(), [Pair((5,) * 128, (6,))])
