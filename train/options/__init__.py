"""The options of every command, checked when they are made."""

from train.options.commands import (
    COMMANDS,
    Compare,
    Export,
    Finetune,
    Methods,
    Plan,
    Pretrain,
    Training,
)

__all__ = [
    "COMMANDS",
    "Compare",
    "Export",
    "Finetune",
    "Methods",
    "Plan",
    "Pretrain",
    "Training",
]
