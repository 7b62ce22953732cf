"""`sweep status DIR` beside `sweep FILE`: a command with words before its argument that are commands of their own."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand


class WithSubcommands(TyperCommand):
    """A command whose first argument may be the name of a command of `beside`; a file of that name is given as ./NAME."""

    beside: typer.Typer

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the command that is meant."""
        group = typer.main.get_group(self.beside)
        if args and args[0] in group.commands:
            return group.commands[args[0]].make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def command_with(beside: typer.Typer) -> type[WithSubcommands]:
    """For ``app.command(cls=...)``: the commands of `beside` work beside that command."""
    return type("CommandWith", (WithSubcommands,), {"beside": beside})
