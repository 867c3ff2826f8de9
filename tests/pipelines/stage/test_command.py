"""How commands end: one line for what a user can mend, a traceback and a log for everything else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from llada.errors import UserError
from pipelines.stage.artifact import open_output
from pipelines.stage.command import Common, exit_codes, parse, parse_known, run_stage, take_recipe
from pipelines.stage.lifecycle import begin_stage
from pipelines.stage.tracking import Tracker


def ended(
    capsys: pytest.CaptureFixture[str], error: BaseException, output: str | None = None
) -> tuple[int, str]:
    """Exit code and standard error of a command whose work raises `error`."""
    with pytest.raises(SystemExit) as exit_, exit_codes("sft", output):
        raise error
    return int(exit_.value.code or 0), capsys.readouterr().err


def log_of(err: str) -> Path:
    """The log that the last line names."""
    named = re.search(r"a fault of ours or of the machine; its traceback is above and in (.+)$", err.strip())
    assert named, err
    return Path(named[1])


def test_a_user_error_is_one_line(capsys):
    assert ended(capsys, UserError("--data: no folder")) == (1, "llada sft: --data: no folder\n")


def test_ctrl_c_is_one_line(capsys):
    code, err = ended(capsys, KeyboardInterrupt())
    assert (code, len(err.splitlines())) == (130, 1)


@pytest.mark.parametrize(
    "error", [ValueError("shapes (2, 3) and (4,)"), FileNotFoundError("x"), KeyError("k")]
)
def test_a_fault_of_ours_keeps_its_traceback(capsys, error):
    code, err = ended(capsys, error)
    log = log_of(err)
    text = log.read_text()
    log.unlink()
    assert code == 1
    for shown in (err, text):
        assert "Traceback (most recent call last)" in shown
        assert "raise error" in shown
        assert type(error).__name__ in shown


def test_a_fault_inside_a_stage_is_logged_in_its_folder(capsys, tmp_path, tracking_uri):
    """A begun folder gets the log, each failure below the last; a folder that no stage has begun stays empty."""

    def stage(*, output: str, **_: object) -> dict:
        open_output(output, stage="sft", config={}, inputs=[])
        return {"rows": list(zip([1], [1, 2], strict=True))}

    common = Common(output=str(tmp_path / "out"), tracking_uri=tracking_uri)
    for attempt in (1, 2):
        with pytest.raises(SystemExit) as exit_:
            run_stage("sft", stage, common)
        assert exit_.value.code == 1
        err = capsys.readouterr().err
        assert "zip() argument 2 is longer than argument 1" in err
        assert log_of(err) == tmp_path / "out" / "logs" / "error.log"
        assert log_of(err).read_text().count("Traceback (most recent call last)") == attempt

    (tmp_path / "begun_by_nobody").mkdir()
    log = log_of(ended(capsys, ValueError("early"), str(tmp_path / "begun_by_nobody"))[1])
    assert log.is_file()
    log.unlink()
    assert not list((tmp_path / "begun_by_nobody").iterdir())
    assert not (tmp_path / "none").exists()


def test_a_stage_that_ends_the_process_has_not_succeeded(capsys, tmp_path):
    """Say, a library that calls sys.exit(0); of a command alone it is how --help ends."""
    with pytest.raises(SystemExit) as exit_, exit_codes("sft", str(tmp_path / "out")):
        sys.exit(0)
    err = capsys.readouterr().err
    assert exit_.value.code == 1
    assert "SystemExit: 0" in err
    log_of(err).unlink()
    with pytest.raises(SystemExit) as exit_, exit_codes("sft"):
        sys.exit(0)
    assert exit_.value.code == 0


def test_a_users_fault_inside_a_stage_is_one_line(capsys, tmp_path, tracking_uri):
    def stage(**_: object) -> dict:
        raise UserError("the data does not fit")

    with pytest.raises(SystemExit):
        run_stage("sft", stage, Common(output=str(tmp_path / "out"), tracking_uri=tracking_uri))
    assert capsys.readouterr().err == "llada sft: the data does not fit\n"


def test_what_a_refusal_asks_for_may_be_given_with_the_same_folder(capsys, tmp_path, tracking_uri):
    def stage(steps: int, *, output: str, tracker: Tracker, **_: object) -> dict:
        begin_stage("sft", output, config={"steps": steps}, inputs=[], tracker=tracker)
        assert tracker.wait_started(200)
        if steps > 8:
            raise UserError("give fewer steps")
        return json.loads((tmp_path / "out" / "tracking.json").read_text())

    common = Common(output=str(tmp_path / "out"), tracking_uri=tracking_uri)
    with pytest.raises(SystemExit):
        run_stage("sft", stage, common, 9)
    assert capsys.readouterr().err == "llada sft: give fewer steps\n"
    run = run_stage("sft", stage, common, 8)["run_id"]
    client = pytest.importorskip("mlflow").MlflowClient(tracking_uri)
    assert client.get_run(run).data.params == {"steps": "8"}


def test_resume_insists_on_a_begun_folder(tmp_path):
    with pytest.raises(UserError, match="--resume: nothing was begun in"):
        run_stage("sft", dict, Common(output=str(tmp_path), resume=True))


@dataclass(frozen=True)
class Two:
    kind: str = "a"
    number: int = 1


def test_words_lie_over_defaults():
    assert parse(Two, ["--number", "3"], "test", kind="b") == Two("b", 3)
    assert parse_known(Two, ["x", "--other", "--kind", "c", "y"], "test") == Two("c", 1)
    with pytest.raises(SystemExit) as ended:
        parse(Two, ["--numbr", "3"], "test")
    assert ended.value.code == 2


def test_the_first_word_is_a_preset():
    recipe, words = take_recipe(["tiny", "--x"], "plan")
    assert (recipe.model.d_model, words) == (128, ["--x"])
    assert take_recipe(["--help"], "plan")[1] == ["--help"]
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        take_recipe(["tinny"], "plan")
    with pytest.raises(UserError, match=r"llada plan <tiny\|"):
        take_recipe([], "plan")


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    (tmp_path / "r.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"the recipe .*r\.json is not UTF-8 text"):
        take_recipe([str(tmp_path / "r.json")], "pretrain")


def alone(code: str, **streams: int) -> subprocess.CompletedProcess[bytes]:
    """A command whose work is `code`, with streams of a process of its own."""
    program = f"from pipelines.stage.command import exit_codes\nwith exit_codes('plan'):\n    {code}"
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=False, **streams)


def test_a_log_takes_text_that_is_none():
    """File names need not be UTF-8: their odd bytes are half surrogate pairs."""
    done = alone("raise RuntimeError('no file a\\udcff')")
    log = log_of(done.stderr.decode())
    assert done.returncode == 1
    assert "no file a\\udcff" in log.read_text()
    log.unlink()


def test_a_broken_pipe_of_something_else_is_a_fault(capsys):
    """Say, of a store's connection: what the command prints still has its reader."""
    code, err = ended(capsys, BrokenPipeError(32, "Broken pipe"))
    log_of(err).unlink()
    assert (code, "Traceback" in err) == (1, True)


def test_a_reader_who_goes_is_no_fault():
    for length in (10, 100_000):  # less and more than the buffer
        read, write = os.pipe()
        os.close(read)
        done = alone(f"print('x' * {length})", stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (1, b"")
