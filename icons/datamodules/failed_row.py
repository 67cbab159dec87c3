"""FailedRowError: a record that cannot become a sample, with the status and the sentence that are kept of it."""

from icons.batch import Status


class FailedRowError(Exception):
    """A record that cannot become a sample, and why. It costs its row, and never the run."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status

    def __reduce__(self) -> tuple[type["FailedRowError"], tuple[Status, str]]:
        return type(self), (self.status, str(self))


def bad_record(reason: str) -> FailedRowError:
    """A record that is no conversation; `reason` goes on from "the record"."""
    return FailedRowError(Status.BAD_RECORD, f"the record {reason}")
