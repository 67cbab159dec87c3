"""A process is named so that others of its machine can tell whether it is gone."""

import os
import subprocess

from icons.process import is_gone, machine, process_mark, start_time


def test_a_process_is_gone_once_it_has_ended_and_one_elsewhere_is_never_said_to_be() -> None:
    where, pid, started = process_mark().split("-")
    assert pid == str(os.getpid()) and started == start_time(os.getpid()) != "" and machine()
    process = subprocess.Popen(["sleep", "60"])
    mark = f"{where}-{process.pid}-{start_time(process.pid)}"
    assert not is_gone(mark) and is_gone(f"{where}-{process.pid}-1"), "the number is another process's now"
    process.kill()
    process.wait()
    assert is_gone(mark) and not is_gone(f"0000{mark[4:]}")


def test_a_fork_has_a_name_of_its_own() -> None:
    own = process_mark()
    reads, writes = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writes, process_mark().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reads, 99).decode().split("-")[1] == str(pid) != own.split("-")[1]
