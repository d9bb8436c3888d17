"""Plain help pages: options in groups, then examples.

Typer draws groups (``rich_help_panel``) only with rich, whose import doubles the time of
``--help``. These classes write the same groups as plain text.
"""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

from typer.core import TyperCommand, TyperGroup

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""Click's settings for every command."""


class Command(TyperCommand):
    """A command whose help shows options in groups and prints its epilog under "Examples"."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line; Typer puts required arguments in braces."""
        return [
            piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, a section for each ``rich_help_panel``."""
        _write_groups(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, a line each."""
        _write_lines(formatter, "Examples", self.epilog or "")


class Group(TyperGroup):
    """The root command. Its epilog consists of sections: a title, then indented lines."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the commands."""
        _write_groups(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order in which they are used, not in alphabetical order."""
        return list(self.commands)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each section under its title."""
        for section in (self.epilog or "").strip().split("\n\n"):
            title, _, lines = section.partition("\n")
            _write_lines(formatter, title, lines)


def _write_groups(command: Any, ctx: Any, formatter: Any) -> None:
    groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or kind
            # Typer puts a default that is described, not a value, in parentheses.
            text = re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", record[1])
            name = re.sub(r"<list\[(\w+)\]>", lambda kind: f"<{kind[1].lower()}>", record[0])
            groups.setdefault(title, []).append((name, text))
    for title, records in groups.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _write_lines(formatter: Any, title: str, lines: str) -> None:
    """Write a section whose lines are kept as they are."""
    with formatter.section(title):
        for line in dedent(lines).strip("\n").splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
