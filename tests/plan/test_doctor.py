"""`fluidsched doctor`, versions and shell completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.reporting import installation


def test_a_sound_installation_is_well() -> None:
    found = installation.diagnose()
    assert found.is_well, found
    assert {check.name for check in found.checks} == {
        *("dependencies", "threads", "cache", "fluid program", "kernel", "queue", "table", "pictures")
    }
    assert found.versions["fluidsched"] == fs.__version__
    assert all(f"{name} {version}" in fs.show_versions() for name, version in found.versions.items())


def test_a_wrong_answer_and_a_crash_are_failures_and_the_other_checks_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 3; the line says what was found and what it should have been."""

    def crash() -> object:
        raise OSError("no such library")

    monkeypatch.setattr("fluidsched.queues.embedded_queue_mean", lambda *_: 1.25)
    monkeypatch.setattr(installation, "_pictures", crash)
    monkeypatch.setattr(installation, "_table", lambda: ("ok", "not tried again"))
    with pytest.raises(SystemExit) as left:
        app(["doctor", "--json"])
    assert left.value.code == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "fluidsched.doctor/1"
    assert answer["is_well"] is False
    by_name = {check["name"]: check for check in answer["checks"]}
    assert by_name["queue"]["status"] == by_name["pictures"]["status"] == "failed"
    assert "1.25" in by_name["queue"]["detail"]
    assert "0.816667" in by_name["queue"]["detail"]  # m²/(2(1 − m)) at m = 0.7
    assert "OSError: no such library" in by_name["pictures"]["detail"]
    assert by_name["kernel"]["status"] == "ok"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fluidsched pl", {"plan"}),
        ("fluidsched plan --gp", {"--gpu"}),
        ("fluidsched plan --gpu h2", {"h200"}),
        ("fluidsched solve -w azu", {"azure_code", "azure_conv", "azure.toml"}),
    ],
)
def test_the_shell_completes_commands_options_and_values(
    tmp_path: Path, typed: str, offered: set[str]
) -> None:
    """As bash asks: the words typed so far in, one completion a line out."""
    (tmp_path / "azure.toml").write_text("")
    words = typed.split()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv = ['fluidsched']; from fluidsched.__main__ import main; main()",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "COMP_WORDS": typed,
            "COMP_CWORD": str(len(words) - 1),
            "_FLUIDSCHED_COMPLETE": "complete_bash",
        },
    )
    assert set(done.stdout.split()) == offered, done.stderr
