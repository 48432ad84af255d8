"""Folders beside a run's checkpoints that are not its own."""

from pathlib import Path

from evopatch.training import checkpoints


class SavesItself:
    """What `checkpoints.write` needs of an accelerator."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        Path(folder, "model.safetensors").write_text("saved")


def test_others_may_read_the_weights(tmp_path):
    class AsSafetensors(SavesItself):
        def save_state(self, folder):
            super().save_state(folder)
            Path(folder, "model.safetensors").chmod(0o600)

    checkpoints.write(tmp_path, 1, AsSafetensors(), {}, keep=1)
    (tmp_path / "other").touch()
    assert checkpoints.weights(tmp_path)[1].stat().st_mode == (tmp_path / "other").stat().st_mode


def test_copies_of_checkpoints_are_neither_read_nor_deleted(tmp_path):
    folder = tmp_path / checkpoints.FOLDER
    for step in (1, 2, 3):
        checkpoints.write(tmp_path, step, SavesItself(), {}, keep=9)
    for name in ("step-000000003-backup", "step-best", "step-", "step-7", "step-000000002.old"):
        (folder / name).mkdir()
    assert checkpoints.steps(tmp_path) == [1, 2, 3]
    checkpoints.write(tmp_path, 4, SavesItself(), {}, keep=2)
    assert checkpoints.steps(tmp_path) == [3, 4]
    assert len(list(folder.glob("step-*"))) == 7
    assert checkpoints.latest(tmp_path).name == "step-000000004"
    assert list(checkpoints.weights(tmp_path)) == [3, 4]
    (folder / "step-000000003" / "model.safetensors").unlink()
    assert checkpoints.weights(tmp_path) == {4: folder / "step-000000004" / "model.safetensors"}
