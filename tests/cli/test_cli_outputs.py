"""Where a command can't write what it is to write, it says so in one message, before the work if that can be known."""

import errno
import os
from pathlib import Path

import pytest
from samples import encoded

MODEL = ("--model", "deit_tiny_patch16_224")
NOWHERE = "/proc" if os.path.isdir("/proc") else None
"""A folder in which nobody can make a file, not even root."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(encoded(0))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands(file, folder):
    """Every command that writes, with its output there."""
    data = ("--data", "photos")
    return [
        ("profile", *MODEL, "--json", f"{file}.json"),
        ("verify", *MODEL, "--json", f"{file}.json"),
        ("benchmark", *MODEL, "--json", f"{file}.json"),
        ("benchmark", *MODEL, "--plot", f"{file}.png"),
        ("evaluate", *MODEL, *data, "--json", f"{file}.json"),
        ("embed", *MODEL, *data, "--out", f"{file}.parquet"),
        ("visualize", *MODEL, "--image", "photos/0.jpg", "--out", f"{file}.png"),
        ("export", *MODEL, "--out", f"{file}.onnx"),
        ("demo", "--out", f"{file}.png"),
        ("calibrate", *MODEL, *data, "--target-flops", "0.6", "--output", folder),
        ("finetune", *MODEL, *data, "--output", folder),
    ]


def refuse_to_open(monkeypatch):
    def opened(*arguments, **options):
        raise AssertionError("the model was opened before")

    monkeypatch.setattr("evopatch.sources.models.open_classifier", opened)
    monkeypatch.setattr("evopatch.sources.architectures.open_architecture", opened)
    monkeypatch.setattr("evopatch.sources.encoders.open_classifier", opened)


@pytest.mark.skipif(NOWHERE is None, reason="needs a folder in which nothing can be made")
@pytest.mark.parametrize("index", range(len(commands("", ""))))
def test_a_place_that_cannot_be_written_to_is_refused_first(index, command, folder, monkeypatch):
    refuse_to_open(monkeypatch)
    arguments = commands(f"{NOWHERE}/x", f"{NOWHERE}/x")[index]
    run = command(*arguments)
    run.assert_refused(1, f"{arguments[-2]} {arguments[-1]} can't be written: nothing can be made in {NOWHERE} (")


@pytest.mark.parametrize("index", range(len(commands("", ""))))
def test_a_folder_for_a_file_and_a_file_for_a_folder(index, command, folder, monkeypatch):
    refuse_to_open(monkeypatch)
    arguments = commands("there", "photos/0.jpg/x")[index]
    if arguments[-2] == "--output":
        expected = f"--output photos/0.jpg/x: {folder / 'photos' / '0.jpg'} is a file: expected a folder"
    else:
        Path(arguments[-1]).mkdir()
        expected = f"{arguments[-2]} {arguments[-1]} is a folder: expected a file"
    command(*arguments).assert_refused(1, expected)


def test_what_is_there_may_be_written_to_where_nothing_can_be_made(command, folder):
    run = command("profile", *MODEL, "--json", os.devnull)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in folder.iterdir()] == ["photos"], "trying left nothing behind"


def test_a_disk_that_is_full_is_one_message(command, folder, monkeypatch):
    write = Path.write_text

    def full(path, *arguments, **options):
        if path.name == "out.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    run = command("profile", *MODEL, "--json", "out.json")
    run.assert_refused(1, "error: out.json: No space left on device")
