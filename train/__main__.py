"""`python -m train COMMAND ...`; `--help` lists commands and options."""

import sys
from types import ModuleType
from typing import Annotated

import tyro

from oasis_jax.checkpoints import CheckpointError
from oasis_jax.hf import HfError
from train import compare, export, finetune, methods, plan, pretrain
from train.config import (
    Compare,
    Export,
    Finetune,
    Methods,
    Plan,
    Pretrain,
    UserError,
)
from train.text import DataError

Command = (
    Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
    | Annotated[Finetune, tyro.conf.subcommand("finetune")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
)

_MODULES: dict[type, ModuleType] = {
    Pretrain: pretrain,
    Finetune: finetune,
    Export: export,
    Compare: compare,
    Plan: plan,
    Methods: methods,
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 if all went well, 1 with one sentence if not."""
    try:
        config = tyro.cli(Command, args=argv, prog="python -m train")
        return _MODULES[type(config)].main(config)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (UserError, DataError, HfError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
