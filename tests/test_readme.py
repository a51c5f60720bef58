"""The README's Python runs as it stands, and prints what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fluidsched as fs

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "critical rate 5.827 req/s" in printed
    for policy in ("capped", "vllm", "sarathi"):
        assert re.search(rf"^{policy} .*stable$", printed, flags=re.MULTILINE)


def test_the_two_commands_are_marked_for_the_checks() -> None:
    """`.ci/run` reads each command from the block after its marker."""
    for marker, word in (("main-job", "fluidsched plan"), ("tests", "pytest")):
        (command,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
        assert word in command
        assert len(command.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_page_shown_is_what_plan_prints() -> None:
    """Every line of the page is one of `plan`'s, numbers aside: their last digits differ between processors."""

    def skeleton(text: str) -> list[str]:
        lines = (re.sub(r"[-+]?\d[\d,.]*", "#", line) for line in text.splitlines())
        return [re.sub(r"─+|\s+", " ", line).strip() for line in lines]

    text = (Path(__file__).parents[1] / "docs" / "howto" / "reading_a_plan.md").read_text()
    (page,) = re.findall(r"```text\n(policy .*?)```", text, flags=re.DOTALL)
    printed = skeleton(repr(fs.plan()))
    missing = [line for line in skeleton(page) if line not in {*printed, "", "…"}]
    assert not missing
