"""What the README promises about settings is what the program has."""

from __future__ import annotations

from pathlib import Path

from server.config import Settings

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_every_setting_is_in_the_table_with_its_default() -> None:
    for name, field in Settings.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        default = "" if field.default in (None, (), "") else f"`{field.default}`"
        assert f"| `{option}` | {default} | {field.description} |" in README


def test_no_setting_is_made_up() -> None:
    options = [line.split("`")[1] for line in README.splitlines() if line.startswith("| `--")]
    assert options == [f"--{name.replace('_', '-')}" for name in Settings.model_fields]
