"""`python -m train COMMAND ...`; `--help` lists commands and options."""

import sys
from collections.abc import Callable
from typing import Any

from oasis_jax.checkpoints import CheckpointError
from oasis_jax.hf import HfError
from oasis_jax.planning.memory import PlanError
from oasis_jax.planning.targets import TargetError
from train.commands import compare, export, finetune, methods, plan, pretrain
from train.errors import DONE, INTERRUPTED, Diverged, Preempted, UserError
from train.options.flags import parse

ABOUT = f"""Train transformers in a subspace. COMMAND --help lists the options of a command.

Exit codes: {DONE} done, {UserError.exit_code} something that the user can mend,
{Diverged.exit_code} training diverged, {Preempted.exit_code} asked to stop with everything
saved, {INTERRUPTED} interrupted before that."""

RUN: dict[str, Callable[[Any], None]] = {
    "pretrain": pretrain.main,
    "finetune": finetune.main,
    "export": export.main,
    "compare": compare.main,
    "plan": plan.main,
    "methods": methods.main,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, else an exit code and one sentence."""
    try:
        words = sys.argv[1:] if argv is None else argv
        command, config = parse(words, "python -m train", ABOUT)
        RUN[command](config)
        return DONE
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
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
    sys.exit(main())
