"""`icons doctor` tells what there is, and fails when the method does."""

import pytest

from icons.cli import call, doctor
from icons.cli import command_line as cli


@pytest.mark.filterwarnings("ignore")
def test_doctor_is_content_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.count("ok ") == len(doctor.SELF_TEST)
    assert "torch" in text
    assert "GiB free" in text


@pytest.mark.filterwarnings("ignore")
def test_doctor_names_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str | None:
        raise OSError("no such device")

    monkeypatch.setitem(doctor.SELF_TEST, "store returns what was written", broken)
    assert call("doctor") == 1
    assert "OSError: no such device" in capsys.readouterr().out


def test_doctor_wants_a_folder_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--folder", "nowhere"]) == 1
    assert (
        "error: --folder nowhere: no such folder; expected the one that stores will lie in" in capsys.readouterr().err
    )
