"""Calibration sets: where the tokens come from, and every way in which the data can be wrong."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pruning.calibration import (
    MAX_FILE_BYTES,
    CalibrationError,
    CalibrationSet,
    calibrate,
    calibration_source,
    mixture,
)
from tests.pruning.tiny_models import BOS, EOS, ids, tiny_base


def write(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


class TestSelfSampled:
    def test_same_seed_same_text_and_other_seed_other_text(self):
        base = tiny_base()
        first = calibrate("self", base, samples=3, length=20, seed=5)
        again = calibrate("self", base, samples=3, length=20, seed=5)
        other = calibrate("self", base, samples=3, length=20, seed=6)
        assert torch.equal(first.token_ids, again.token_ids)
        assert first.fingerprint == again.fingerprint != other.fingerprint
        assert (first.samples, first.length, first.seed) == (3, 20, 5)
        assert set(first.token_ids[:, 0].tolist()) == {BOS}

    def test_more_samples_than_one_batch_are_all_different(self):
        table = calibrate("self", tiny_base(), samples=70, length=12).token_ids
        assert len({tuple(row) for row in table.tolist()}) == 70

    def test_tokens_follow_the_models_own_distribution(self):
        """Frequencies of the first sampled token against the softmax of an uncached forward."""
        base = tiny_base()
        table = calibrate("self", base, samples=4000, length=2).token_ids
        with torch.no_grad():
            expected = torch.softmax(base.model(torch.tensor([[BOS]])).logits[0, -1], -1)
        observed = torch.bincount(table[:, 1], minlength=len(expected)) / len(table)
        assert (observed - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5

    def test_the_kv_cache_conditions_on_everything_written_before(self):
        """Teacher forcing: replaying the draws over full forwards gives the same tokens."""
        base = tiny_base("gemma2")
        table = calibrate("self", base, samples=2, length=16, seed=9).token_ids
        generator = torch.Generator().manual_seed(9)
        for position in range(1, 16):
            with torch.no_grad():
                logits = base.model(table[:, :position]).logits[:, -1]
            sums = torch.softmax(logits.float(), -1).double().cumsum(-1)
            points = torch.rand(2, 1, generator=generator, dtype=torch.float64) * sums[:, -1:]
            drawn = (sums <= points).sum(-1)
            assert drawn.tolist() == table[:, position].tolist()

    def test_starts_with_eos_without_bos_and_refuses_without_either(self):
        base = tiny_base()
        base.tokenizer.bos_token = None
        assert calibrate("self", base, samples=1, length=4).token_ids[0, 0] == EOS
        base.tokenizer.eos_token = None
        with pytest.raises(CalibrationError, match="neither a BOS nor an EOS"):
            calibrate("self", base, samples=1, length=4)

    def test_logits_that_are_not_finite_are_refused(self):
        base = tiny_base()
        base.model.lm_head.weight.data.fill_(float("inf"))
        with pytest.raises(CalibrationError, match="not finite in float32"):
            calibrate("self", base, samples=1, length=4)

    def test_progress_ends_at_the_total(self):
        seen: list[tuple[str, int, int]] = []
        calibrate("self", tiny_base(), samples=3, length=5, progress=lambda *x: seen.append(x))
        assert seen[-1] == ("writing calibration text", 15, 15)
        assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


class TestTextFiles:
    def test_windows_lie_at_an_even_stride(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("abcdefghijklmnopqrs")
        table = calibrate(str(path), tiny_base(), samples=4, length=3).token_ids
        assert table.tolist() == [ids("abc"), ids("fgh"), ids("klm"), ids("pqr")]

    def test_every_window_begins_with_bos_where_the_tokenizer_adds_one(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("abcdefg")
        table = calibrate(str(path), tiny_base(adds_bos=True), samples=2, length=4).token_ids
        assert table.tolist() == [[BOS, *ids("abc")], [BOS, *ids("efg")]]

    def test_source_identifies_the_content_and_nothing_is_random(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("abcdefgh")
        before = calibrate(str(path), tiny_base(), samples=2, length=2)
        path.write_text("abcdefgX")
        assert before.sources[0].startswith("text.txt sha256:")
        assert before.sources[0] != calibration_source(str(path))
        assert before.seed is None

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is empty"),
            (b" \n\n ", "is empty"),
            (b"abc\xff\xfe", r"not UTF-8 \(byte 3\)"),
            (b"abcdefg", "holds 8 tokens, but 3 samples of 4 need 12"),
        ],
    )
    def test_unusable_content(self, tmp_path, content, message):
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=message):
            calibrate(str(path), tiny_base(), samples=3, length=4)

    def test_missing_and_unreadable_and_too_large(self, tmp_path):
        base = tiny_base()
        with pytest.raises(CalibrationError, match="there is no calibration file 'selff'"):
            calibrate("selff", base, samples=1, length=4)
        with pytest.raises(CalibrationError, match=r"cannot read .* Is a directory"):
            calibrate(str(tmp_path), base, samples=1, length=4)
        large = tmp_path / "large.txt"
        with large.open("wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)
        with pytest.raises(CalibrationError, match="at most 16777216 are read"):
            calibrate(str(large), base, samples=1, length=4)


class TestJsonLines:
    def test_text_prompt_and_messages_with_eos_between(self, tmp_path):
        path = write(
            tmp_path / "data.jsonl",
            {"text": "ab\u2028c"},
            {"prompt": "de", "other": 1},
            {"messages": [{"role": "user", "content": "hi"}]},
        )
        table = calibrate(path, tiny_base(), samples=1, length=18).token_ids
        unknown = 3
        expected = [*ids("ab"), unknown, *ids("c"), EOS, *ids("de"), EOS, *ids("user: hi\n"), EOS]
        assert table.tolist() == [expected]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 2: it is not JSON"),
            ("", "line 2: it is not JSON"),
            ('{"text": "  "}', "line 2: its text is empty"),
            ('{"text": 3}', "line 2: it needs 'text' or 'prompt'"),
            ("[1]", "line 2: it needs 'text' or 'prompt'"),
            ('{"messages": ["x"]}', "line 2: the chat template cannot render"),
        ],
    )
    def test_every_line_must_yield_text(self, tmp_path, line, message):
        path = tmp_path / "data.jsonl"
        path.write_text('{"text": "abcdefgh"}\n' + line + '\n{"text": "abcdefgh"}\n')
        with pytest.raises(CalibrationError, match=message):
            calibrate(str(path), tiny_base(), samples=1, length=4)


class TestDataSets:
    """A data set in a local folder is fetched by the same call as one by name."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        folder = tmp_path / "corpus"
        folder.mkdir()
        write(folder / "train.jsonl", *({"text": "abcd", "body": "efgh"} for _ in range(50)))
        return folder

    def test_columns(self, folder):
        base = tiny_base()
        text = calibrate(f"hf:{folder}", base, samples=2, length=5)
        body = calibrate(f"hf:{folder}::train:body", base, samples=2, length=5)
        assert text.token_ids.tolist() == [[*ids("abcd"), EOS]] * 2
        assert body.token_ids.tolist() == [[*ids("efgh"), EOS]] * 2
        assert (body.sources[0], body.seed) == (f"hf:{folder}::train:body", None)

    @pytest.mark.parametrize(
        ("suffix", "message"),
        [
            (":::none", "column 'none' holds no text; columns with text: .*'body', 'text'"),
            ("::nosplit", "cannot be fetched: .*nosplit"),
            ("/nowhere", "cannot be fetched"),
            (":a:b:c:d", "is not of the form"),
        ],
    )
    def test_errors(self, folder, suffix, message):
        with pytest.raises(CalibrationError, match=message):
            calibrate(f"hf:{folder}{suffix}", tiny_base(), samples=2, length=5)

    def test_too_little_text(self, folder):
        with pytest.raises(CalibrationError, match="holds 250 tokens"):
            calibrate(f"hf:{folder}", tiny_base(), samples=100, length=5)

    def test_without_the_datasets_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(CalibrationError, match=r"pip install 'attndrop\[datasets\]'"):
            calibrate("hf:some/set", tiny_base(), samples=1, length=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, not 0"),
        ({"length": 1}, "length must be 2 to 128 tokens"),
        ({"length": 129}, "length must be 2 to 128 tokens"),
        ({"seed": -1}, "seed must be 0 to"),
    ],
)
def test_shape_is_checked(wrong, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate("self", tiny_base(), **{"samples": 2, "length": 4, "seed": 0, **wrong})


def test_fingerprint_covers_tokens_and_shape():
    table = torch.arange(12)
    prints = {
        CalibrationSet(table.reshape(3, 4), ("x",), None).fingerprint,
        CalibrationSet(table.reshape(4, 3), ("x",), None).fingerprint,
        CalibrationSet(table.reshape(3, 4) + 1, ("x",), None).fingerprint,
    }
    assert len(prints) == 3
    one = CalibrationSet(table.reshape(3, 4), ("x",), None)
    assert replace(one, sources=("y",)).fingerprint == one.fingerprint


@pytest.mark.skipif("ATTNDROP_SHARED_DATA" not in os.environ, reason="ATTNDROP_SHARED_DATA not set")
def test_real_text_with_the_embedded_model(base):
    path = Path(os.environ["ATTNDROP_SHARED_DATA"]) / "calibration" / "cal_c4.txt"
    data = calibrate(str(path), base, samples=16, length=64)
    assert base.tokenizer.decode(data.token_ids[0]).startswith("Restore from larger disk")
    assert data.token_ids.shape == (16, 64)


class TestMixtures:
    @pytest.fixture
    def two(self, tmp_path) -> tuple[str, str]:
        text = tmp_path / "text.txt"
        text.write_text("abcdefghijklmnopqrs" * 4)
        chat = write(
            tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "hi " * 30}]}
        )
        return str(text), chat

    def test_samples_take_turns_and_chat_is_rendered(self, two):
        mixed = mixture(two, tiny_base(), samples=5, length=6)
        text = calibrate(two[0], tiny_base(), samples=3, length=6)
        chat = calibrate(two[1], tiny_base(), samples=2, length=6)
        assert torch.equal(mixed.token_ids[::2], text.token_ids)
        assert torch.equal(mixed.token_ids[1::2], chat.token_ids)
        assert chat.token_ids[0].tolist() == ids("user: ")
        assert mixed.sources == (*text.sources, *chat.sources)
        assert mixed.seed is None
        assert mixture(["self", two[0]], tiny_base(), samples=2, length=4, seed=3).seed == 3

    def test_one_in_four_samples_of_each_source_is_held_out(self):
        table = torch.arange(20)[:, None].expand(20, 2)
        chosen, held_out = CalibrationSet(table, ("a", "b"), None).split()
        assert held_out[:, 0].tolist() == [6, 7, 14, 15]
        assert len(chosen) == 16
        few = CalibrationSet(table[:5], ("a", "b"), None).split()[1]
        assert few[:, 0].tolist() == [3, 4], "the last one where there are fewer than four"

    @pytest.mark.parametrize(
        ("specs", "samples", "message"),
        [
            ([], 4, "must be different ones"),
            (["self", "self"], 4, "must be different ones"),
            (["self", "a", "b"], 2, "too few for 3 sources"),
        ],
    )
    def test_mixtures_that_cannot_be(self, specs, samples, message):
        with pytest.raises(CalibrationError, match=message):
            mixture(specs, tiny_base(), samples=samples, length=4)

    def test_a_single_sample_leaves_nothing_to_judge_by(self):
        with pytest.raises(CalibrationError, match="give at least 4, two for each source"):
            CalibrationSet(torch.zeros(3, 2), ("a", "b"), None).split()
