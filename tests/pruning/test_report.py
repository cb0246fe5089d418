"""`attndrop report`: one page of evidence, in which what a model wrote is text and nothing else."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pruning.evidence import EvidenceError, read_evidence
from pruning.plan import read_plan
from pruning.report.markup import Markup, element, joined
from pruning.report.plot import Axes, Point, Series, _log_ticks, _ticks, line_plot
from pruning.report.subject import read_speed
from server.cli import app
from tests.pruning.test_evaluate import folder, run  # noqa: F401 - a fixture

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Parsed(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evidence(folder, tmp_path_factory) -> Path:  # noqa: F811
    """Evidence of two depths, whose first example is hostile."""
    path = tmp_path_factory.mktemp("report") / "evidence.json"
    quiz = path.with_name("quiz.jsonl")
    lines = [{"prompt": f"n {n} is", "choices": ["odd", "even"], "gold": n % 2} for n in range(6)]
    quiz.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ("--windows", 2, "--length", 24, "--prompts", 2, "--answer", 6)
    sources = ("--text", folder / "text.txt", "--conversation", folder / "chat.jsonl")
    depths = ("--drop", 2, "--drop", 4)
    result = run(folder, *sources, *small, "--multiple-choice", quiz, *depths, "--json", path)
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text())
    found["examples"][0]["prompt"] = HOSTILE
    found["examples"][0]["answers"][1]["text"] = HOSTILE
    found["retrieval"] = [
        {"dropped": d, "length": 64, "depth": at, "trials": 2, "found": 0.5}
        | {"found_error": 0.5, "logprob": -1.0, "logprob_error": 0.1}
        for d in (0, 2)
        for at in (0, 100)
    ]
    found["following"] = [
        {"source": "f", "dropped": d, "prompts": 2, "left_out": 1, "instructions": 3}
        | {"prompt_accuracy": 0.5, "prompt_error": 0.5}
        | {"instruction_accuracy": 0.6, "instruction_error": 0.2}
        for d in (0, 2)
    ]
    path.write_text(json.dumps(found))
    return path


def report(*options: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, options)])


def test_the_page_shows_everything_and_needs_nothing(folder, evidence, tmp_path):  # noqa: F811
    out, speed = tmp_path / "report.html", tmp_path / "speed.json"
    rows = [{"dropped": d, "tokens_per_second": 100.0 + d, "in_flight": 8} for d in (0, 2, 4)]
    speed.write_text(
        json.dumps({"setting": {"title": "tiny"}, "machine": {"device": "X1"}, "rows": rows})
    )
    plan = folder / "p.json"
    result = report("--evidence", evidence, "--plan", plan, "--speed", speed, "--output", out)
    assert result.exit_code == 0, result.output
    page = Parsed(out.read_text())
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or "href" in name]
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert page.text.count(HOSTILE) == 2
    for title in (
        "Which layers go first",
        "Quality against layers dropped",
        "Where conversation departs from multiple choice",
        "Memory and speed against quality",
        "Multiple choice",
        "Instructions followed",
        "Retrieval from long text",
        "Answers side by side",
        "The figures",
    ):
        assert title in page.text
    found = read_evidence(evidence)
    row = next(row for row in found.figures if (row.domain, row.dropped) == ("text", 4))
    assert f"{row.kl:.3f} ± {row.kl_error:.3f}" in page.text
    assert f"4 dropped, KL {row.kl:.3f} ± {row.kl_error:.3f}" in page.text
    first = read_plan(plan).ranking[0].layer
    assert f"layer {first}: dropped as number 1" in page.text


def test_sections_without_evidence_are_left_out(folder, tmp_path):  # noqa: F811
    path, out = tmp_path / "evidence.json", tmp_path / "report.html"
    run(folder, "--text", folder / "text.txt", "--windows", 1, "--length", 24, "--json", path)
    assert report("--evidence", path, "--output", out).exit_code == 0
    text = out.read_text()
    assert "Quality against layers dropped" in text
    assert "<h2>Multiple choice</h2>" not in text
    assert "Retrieval" not in text


def test_plans_without_evidence_are_refused(folder, evidence, tmp_path):  # noqa: F811
    other = tmp_path / "other.json"
    content = json.loads((folder / "p.json").read_text())
    other.write_text(json.dumps({**content, "protected": [0], "substitutes": None}))
    result = report("--evidence", evidence, "--plan", other, "--output", tmp_path / "r.html")
    assert (result.exit_code, "no evidence is about plan" in result.stderr) == (1, True)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"extra": 1}, {"layers": "six"}, {"model": None}]
)
def test_evidence_of_another_form_is_refused(evidence, tmp_path, change):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**json.loads(evidence.read_text()), **change}))
    with pytest.raises(EvidenceError, match="is not usable"):
        read_evidence(path)


def test_evidence_of_two_models_is_refused(evidence, tmp_path):
    other = tmp_path / "other.json"
    content = json.loads(evidence.read_text())
    other.write_text(json.dumps({**content, "fingerprint": "sha256:" + "0" * 64}))
    both = ("--evidence", evidence, "--evidence", other)
    result = report(*both, "--output", tmp_path / "r.html")
    assert (result.exit_code, "2 different models" in result.stderr) == (1, True)


@pytest.mark.parametrize("content", ["[]", "{", '{"rows": [{}]}', "[" * 100_000])
def test_speed_of_another_form_is_refused(tmp_path, content):
    path = tmp_path / "speed.json"
    path.write_text(content)
    with pytest.raises(EvidenceError, match="is not what"):
        read_speed(path)


class TestMarkup:
    def test_strings_are_text_and_attributes_are_quoted(self):
        found = element("p", HOSTILE, element("b", "x"), title=HOSTILE, class_="a", data=None)
        parsed = Parsed(found)
        assert parsed.tags == ["p", "b"]
        assert parsed.attributes == [("title", HOSTILE), ("class", "a")]
        assert parsed.text == HOSTILE + "x"

    def test_only_what_elements_returned_is_markup(self):
        assert joined(Markup("<b>"), "<b>") == "<b>&lt;b&gt;"


class TestPlots:
    @pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1.93), (17, 40), (0, 0.004), (0, 30)])
    def test_ticks_are_few_and_inside(self, low, high):
        found = _ticks(low, high)
        assert 3 <= len(found) <= 7
        assert low <= found[0] <= found[-1] <= high * (1 + 1e-9)

    @pytest.mark.parametrize(("low", "high"), [(0.97, 1.2), (0.97, 8.4), (1, 2000)])
    def test_logarithmic_ticks_are_few_and_inside(self, low, high):
        found = _log_ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low <= found[0] <= found[-1] <= high

    def test_equal_values_have_a_scale_too(self):
        points = (Point(0, 0.0, "a"), Point(4, 0.0, "b", 0.0))
        assert "NaN" not in line_plot([Series("s", 0, points)], Axes("x", "y"))
        ones = (Point(0, 1.0, "a"), Point(4, 1.0, "b"))
        assert "nan" not in line_plot([Series("s", 0, ones)], Axes("x", "y", logarithmic=True))
