"""`python -m train COMMAND ...`; `--help` lists commands and options."""

import sys
from typing import Annotated

import tyro

from oasis_jax.checkpoints import CheckpointError
from train import compare, methods, plan, pretrain
from train.config import Compare, Methods, Plan, Pretrain, UserError
from train.text import DataError

Command = (
    Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, 1 with one sentence if not."""
    try:
        config = tyro.cli(Command, args=argv, prog="python -m train")
        if isinstance(config, Compare):
            return compare.main(config)
        if isinstance(config, Plan):
            return plan.main(config)
        if isinstance(config, Methods):
            return methods.main(config)
        return pretrain.main(config)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (UserError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
