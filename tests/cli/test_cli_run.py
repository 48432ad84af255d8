"""`evopatch run`: what goes wrong in a script is the script's."""

import sys

import pytest

SCRIPTS = {
    "missing.py": "import wandbx_missing",
    "config.py": "from evopatch import EvoConfig\n\ndef build():\n    EvoConfig(keep_ratio=2)\n\nbuild()",
    "bad.py": "def broken(:",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import wandbx_missing")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(
    ("script", "files", "last"),
    [
        (("missing.py",), ["missing.py"], "ModuleNotFoundError: No module named 'wandbx_missing'"),
        (("config.py",), ["config.py", "config.py"], "evopatch.errors.ConfigError: keep_ratio=2"),
        (("bad.py",), ["bad.py"], "SyntaxError: invalid syntax"),
        (("-m", "missing"), ["missing.py"], "ModuleNotFoundError: No module named 'wandbx_missing'"),
        (("-m", "package.part"), [], "ModuleNotFoundError: No module named 'wandbx_missing'"),
    ],
)
def test_an_error_of_the_script_is_shown_as_python_shows_it(script, files, last, command, folder):
    run = command("run", *script)
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    frames = [line for line in lines if line.startswith("  File ")]
    assert "run.py" not in run.stderr
    assert "runpy" not in run.stderr
    assert len(frames) >= len(files)
    for frame, file in zip(frames, files, strict=False):
        assert f'{file}"' in frame
    assert any(line.startswith(last) for line in lines)
    assert "evopatch[all]" not in run.stderr
    assert "error:" not in run.stderr


def test_evopatchs_own_errors_are_one_message(command, folder):
    command("run", "nowhere.py").assert_refused(2, "nowhere.py: no such file")
    command("run", "--keep-ratio", "2", "config.py").assert_refused(2, "keep_ratio=2.0")


def test_a_script_that_exits(command, folder):
    (folder / "exits.py").write_text("import sys\nsys.exit(3)")
    run = command("run", "exits.py")
    assert run.returncode == 3
    assert "Traceback" not in run.stderr
