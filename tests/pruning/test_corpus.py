"""What substitutes are trained on: rows of each source, what of them counts, what is kept."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pruning.calibration import CalibrationError, calibrate
from pruning.corpus import CorpusRequest, make_corpus
from tests.pruning.tiny_models import EOS, ids, tiny_base

LENGTH = 24
BASE = tiny_base()


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 20)
    lines = [{"prompt": "a" * (1 + index % 4)} for index in range(9)] + [{"prompt": "long " * 9}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "kept").mkdir()
    return tmp_path


def request(
    files: Path, written: int = 0, texts: bool = False, prompts: bool = False, answers: int = 99
) -> CorpusRequest:
    return CorpusRequest(
        written=written,
        texts=(str(files / "text.txt"),) if texts else (),
        prompts=(str(files / "chat.jsonl"),) if prompts else (),
        answers=answers,
        length=LENGTH,
        seed=0,
    )


def lines(table: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(line) for line in table.tolist()}


def test_a_part_of_every_source_is_held_out(files):
    found = make_corpus(BASE, request(files, 20 * LENGTH, True, True), files / "kept")
    assert [each.name.rpartition("/")[2] for each in found] == ["self", "text.txt", "chat.jsonl"]
    assert [len(each.held_out) for each in found] == [2, 4, 1]
    own = found[0]
    assert len(own.training) == 18
    assert lines(own.training.token_ids).isdisjoint(lines(own.held_out.token_ids))


def test_its_own_text_is_not_the_text_that_plans_are_made_with(files):
    (own,) = make_corpus(BASE, request(files, 4 * LENGTH), files / "kept")
    calibration = calibrate("self", BASE, samples=4, length=LENGTH).token_ids
    assert lines(own.training.token_ids).isdisjoint(lines(calibration))
    assert bool((own.training.token_ids[:, 0] == calibration[0, 0]).all())


def test_a_file_is_taken_whole_in_windows(files):
    (text,) = make_corpus(BASE, request(files, texts=True), files / "kept")
    assert len(text.training) + len(text.held_out) == (20 * 44 + 1) // LENGTH
    assert text.training.predicted == len(text.training) * (LENGTH - 1)
    assert len(text.training.real) == len(text.training) * LENGTH


def test_answers_alone_are_predicted_and_padding_is_nothing(files, caplog):
    with caplog.at_level(logging.WARNING):
        (chat,) = make_corpus(BASE, request(files, prompts=True), files / "kept")
    assert "1 of 10 prompts" in caplog.text
    rows = chat.training
    assert len(rows) + len(chat.held_out) == 9
    for row in range(len(rows)):
        start, end = int(rows.starts[row]), int(rows.ends[row])
        text = rows.token_ids[row]
        assert text[:start].tolist() == ids("user: " + "a" * (start - 7) + "\n")
        assert 1 <= end - start <= LENGTH // 2
        assert bool((text[end:] == EOS).all())
        inside = (rows.predicting >= row * LENGTH) & (rows.predicting < (row + 1) * LENGTH)
        places = rows.predicting[inside] - row * LENGTH
        assert places.tolist() == list(range(start - 1, end - 1))
        real = (rows.real >= row * LENGTH) & (rows.real < (row + 1) * LENGTH)
        assert int(real.sum()) == end


def test_it_writes_both_sides_of_a_conversation(files):
    asked = replace(request(files, answers=12), prompts=("self",), length=128)
    (chat,) = make_corpus(BASE, asked, files / "kept")
    assert (chat.name, chat.source) == ("self-chat", "self-chat")
    rows = chat.training
    prompts = {
        tuple(rows.token_ids[row, : int(rows.starts[row])].tolist()) for row in range(len(rows))
    }
    assert len(prompts) > 1
    for prompt in prompts:
        opening, end = ids("user: "), ids("\n")
        assert list(prompt[: len(opening)]) == opening
        assert list(prompt[-1:]) == end
        assert len(prompt) > len(opening + end)
        assert len(prompt) <= 64
    assert bool((rows.ends > rows.starts).all())


def test_a_template_that_hides_what_users_say_is_refused(files):
    base = tiny_base()
    base.tokenizer.chat_template = "{{ messages[0]['role'] }}"
    asked = replace(request(files), prompts=("self",))
    with pytest.raises(CalibrationError, match="does not show what a user says"):
        make_corpus(base, asked, files / "kept")


def test_fewer_prompts_are_answered_where_that_is_asked(files):
    (chat,) = make_corpus(BASE, request(files, prompts=True, answers=4), files / "kept")
    assert len(chat.training) + len(chat.held_out) == 4


def test_what_the_model_writes_is_kept(files, monkeypatch):
    asked = request(files, 4 * LENGTH, prompts=True)
    first = make_corpus(BASE, asked, files / "kept")
    silent = tiny_base()
    monkeypatch.setattr(silent.model, "forward", None)
    again = make_corpus(silent, asked, files / "kept")
    assert [each.fingerprint for each in again] == [each.fingerprint for each in first]


def test_what_is_damaged_is_written_again(files, caplog):
    asked = request(files, 4 * LENGTH)
    (first,) = make_corpus(BASE, asked, files / "kept")
    (path,) = (files / "kept").iterdir()
    path.write_bytes(b"nothing")
    (again,) = make_corpus(BASE, asked, files / "kept")
    assert again.fingerprint == first.fingerprint
    assert "writing text again" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"written": 0}, "name something to train on"),
        ({"written": LENGTH}, "less than two sequences of 24"),
        ({"length": 3}, "--length must be 4 to 128"),
        ({"length": 129}, "--length must be 4 to 128"),
        ({"seed": -1}, "seed must be 0"),
        ({"answers": 0}, "--answers must be at least 1"),
        ({"texts": ("no.txt",)}, "no calibration file 'no.txt'"),
        ({"texts": ("a", "a")}, "each file can be given once"),
    ],
)
def test_what_cannot_be_made(files, change, message):
    fields = {
        "written": 99,
        "texts": (),
        "prompts": (),
        "answers": 9,
        "length": LENGTH,
        "seed": 0,
    }
    with pytest.raises(CalibrationError, match=message):
        make_corpus(BASE, CorpusRequest(**(fields | change)), files / "kept")


def test_a_text_that_fills_no_sequence(files):
    (files / "text.txt").write_text("short")
    with pytest.raises(CalibrationError, match="holds 6 tokens, less than one sequence of 24"):
        make_corpus(BASE, request(files, texts=True), files / "kept")
