import resource

import pytest

from icons.datamodules.descriptors import check_descriptors


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the process is allowed, and what it then asks for."""
    found = [(50, 50)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: found[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, asked: found.append(asked))
    return found


def test_too_few_open_files_for_the_workers_are_said_before_they_start(limits: list[tuple[int, int]]) -> None:
    check_descriptors(0)
    with pytest.raises(ValueError, match=r"--num-workers 2: needs 64 open files, .* may have 50; .*ulimit -n"):
        check_descriptors(2)
    assert limits == [(50, 50)]


@pytest.mark.parametrize("most", [4096, resource.RLIM_INFINITY])
def test_as_many_as_needed_are_asked_for_where_the_system_gives_them(limits: list[tuple[int, int]], most: int) -> None:
    limits.append((50, most))
    check_descriptors(8)
    assert limits[-1] == (136, most)
    check_descriptors(4)
    assert len(limits) == 3
