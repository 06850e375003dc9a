"""What can go wrong so that a person can mend it, and the exit code that tells which."""

DONE = 0
INTERRUPTED = 130  # as shells say it of Ctrl-C


class UserError(Exception):
    """Something that the user can mend; the message is one clear sentence."""

    exit_code = 2


class DataError(UserError):
    """The data cannot be used."""


class Diverged(UserError):
    """Training has left the numbers behind; what it had before is saved."""

    exit_code = 3


class Preempted(UserError):
    """A run was asked to stop; it has saved where it was, and can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
