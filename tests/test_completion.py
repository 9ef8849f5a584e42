"""Completion: a script for each command and shell that completes all its options, and the values of
some; used in a real bash."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from erase.methods import METHODS
from erase.scripts import run_erase
from erase.scripts.cli import run
from erase.scripts.cli.completion import SHELLS
from tests.test_commands import COMMANDS, every_command

pytest.importorskip("shtab", reason="shtab, the extra `completion`, is not installed")
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
ASK = """
source /dev/stdin
name=$1
complete_it() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
  found=$(complete -p "$name"); found=${found##*-F }; ${found%% *}
  printf '%s\\n' "${COMPREPLY[@]}"
}
complete_it "$@"
"""


def printed(name: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        run(COMMANDS[name].main, ["--print_completion", shell])
    assert left.value.code == 0
    return capsys.readouterr().out


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", *words],
        input=script,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@every_command
@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_has_a_script_for_every_shell(name, shell, capsys):
    script = printed(name, shell, capsys)
    assert name in script and "--config" in script and "--quiet" in script
    assert script.startswith("#compdef" if shell == "zsh" else "#")


@needs_bash
@every_command
def test_bash_completes_the_options_of_every_command(name, capsys):
    script = printed(name, "bash", capsys)
    assert completed(script, name, "--print_co") == ["--print_config", "--print_completion"]
    assert "--quiet" in completed(script, name, "--")


@needs_bash
def test_bash_completes_names_of_groups_values_and_files(capsys, tmp_path, monkeypatch):
    script = printed("erase-concept", "bash", capsys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert completed(script, "erase-concept", "--train.lo") == ["--train.log_with"]
    assert set(completed(script, "erase-concept", "--method", "")) == set(METHODS)
    assert completed(script, "erase-concept", "--train.compile", "t") == ["true"]
    assert completed(script, "erase-concept", "--concept", "mu") == ["mushroom"]
    assert completed(script, "erase-concept", "--scope", "xattn") == ["xattn", "xattn_kv"]
    assert completed(script, "erase-concept", "--mask.rule", "b") == ["benefit"]
    assert completed(script, "erase-concept", "--out", "r") == ["runs"]


def test_the_script_is_of_the_method_that_is_named(capsys):
    with pytest.raises(SystemExit):
        run(run_erase.main, ["--method", "uce", "--print_completion", "bash"])
    script = capsys.readouterr().out
    assert "--train.lr" not in script and "--method" in script


def test_without_shtab_a_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert run(run_erase.main, ["--print_completion", "bash"]) == 2
    assert "pip install 'concept-erasure-toolkit[completion]'" in capsys.readouterr().err
    assert run(run_erase.main, ["--print_completion", "fish"]) == 2
    assert "fish" in capsys.readouterr().err
