import dataclasses
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

import soulsmith
from soul.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True)
class Config:
    """A command for the tests."""

    out: Path
    data: tuple[Path, ...] = ()
    steps: int = 3
    soul: Path | None = None
    inner: Inner = Inner()


@pytest.fixture
def command(monkeypatch):
    module = types.ModuleType("a_test_command")
    module.Config, module.seen, module.main = Config, [], lambda config: module.seen.append(config) or 0
    monkeypatch.setitem(sys.modules, "a_test_command", module)
    monkeypatch.setitem(soulsmith.COMMANDS, "try it", ("a_test_command", "for tests"))
    return module


def test_help_needs_no_heavy_import():
    code = "import soulsmith, sys; soulsmith.main(['--help']); print([m for m in ('jax', 'tyro', 'datasets', 'openai', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert result.stdout.endswith("[]\n") and all(name in result.stdout for name in soulsmith.COMMANDS)


@pytest.mark.parametrize("name", list(soulsmith.COMMANDS))
def test_every_command_has_a_frozen_config_with_help(name):
    import importlib

    module = importlib.import_module(soulsmith.COMMANDS[name][0])
    assert dataclasses.is_dataclass(module.Config) and module.Config.__dataclass_params__.frozen
    assert callable(module.main) and (module.Config.__doc__ or module.__doc__)


def test_settings_are_saved_and_read_back(command, tmp_path):
    out = tmp_path / "run"
    assert soulsmith.main(["try", "it", "--out", str(out), "--steps", "7", "--data", "a", "b", "--inner.rate", "2"]) == 0
    saved = out / "try_it.json"
    assert json.loads(saved.read_text())["steps"] == 7
    assert soulsmith.main(["try", "it", "--config", str(saved), "--steps", "8"]) == 0
    assert command.seen == [
        Config(out, (Path("a"), Path("b")), 7, None, Inner(2.0)),
        Config(out, (Path("a"), Path("b")), 8, None, Inner(2.0)),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ('{"out": "x", "stepz": 1}', "unknown setting 'stepz'"),
        ("{}", "'out' is missing"),
        ('{"out": "x", "steps": "1"}', "must be int"),
    ],
)
def test_a_bad_config_file_is_one_line_and_exit_2(command, tmp_path, capsys, content, message):
    (tmp_path / "c.json").write_text(content)
    assert soulsmith.main(["try", "it", "--config", str(tmp_path / "c.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and "c.json" in error and error.count("\n") == 1


def test_refused_input_leaves_the_run_directory_as_it_was(command, tmp_path, capsys):
    def refuse(config):
        raise UserError("no", where="SOUL.md:3", fix="Do this.")

    command.main = refuse
    out = tmp_path / "run"
    assert soulsmith.main(["try", "it", "--out", str(out)]) == 2 and not out.exists()
    assert capsys.readouterr().err == "soulsmith: SOUL.md:3: no. Do this.\n"
    out.mkdir()
    (out / "try_it.json").write_text("before")
    assert soulsmith.main(["try", "it", "--out", str(out)]) == 2 and (out / "try_it.json").read_text() == "before"


def test_interrupt_prints_the_command_that_goes_on(command, tmp_path, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    command.main = interrupted
    assert soulsmith.main(["try", "it", "--out", f"{tmp_path}/a b"]) == 130
    assert f"soulsmith try it --out '{tmp_path}/a b'" in capsys.readouterr().err


def test_an_unknown_command_suggests_one(capsys):
    assert soulsmith.main(["generat"]) == 2
    assert "Did you mean `soulsmith generate`?" in capsys.readouterr().err
