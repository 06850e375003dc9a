"""`python -m train COMMAND ...`; `--help` lists commands and options."""

import importlib
import signal
import sys
from collections.abc import Sequence

from train.errors import DONE, INTERRUPTED, Diverged, Preempted, UserError
from train.run.signals import listening, own_process

ABOUT = f"""Train transformers in a subspace. COMMAND --help lists the options of a command.

Exit codes: {DONE} done, {UserError.exit_code} something that the user can mend,
{Diverged.exit_code} training diverged, {Preempted.exit_code} asked to stop with everything
saved (the same command with --resume goes on), {INTERRUPTED} ended by a signal before there
was anything to save, or by a second one. SIGTERM, SIGINT (Ctrl-C) and SIGHUP ask to stop,
SIGUSR1 to save and go on."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, else an exit code and one sentence."""
    try:
        with listening():
            return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _run(words: Sequence[str]) -> int:
    # Loading takes seconds, in which signals have to be heard already.
    from oasis_jax.checkpoints import CheckpointError
    from oasis_jax.hf import HfError
    from oasis_jax.planning.memory import PlanError
    from oasis_jax.planning.targets import TargetError
    from train.options.flags import parse

    try:
        command, config = parse(words, "python -m train", ABOUT)
        importlib.import_module(f"train.commands.{command}").main(config)
        return DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (HfError, CheckpointError, TargetError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    except OSError as error:
        # A full disk, a folder that is read-only or not there: whoever asked for it.
        if error.strerror is None or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code


if __name__ == "__main__":
    own_process()
    code = main()
    # What is left is not worth a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
