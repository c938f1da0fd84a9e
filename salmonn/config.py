"""Typed configuration: dataclass defaults, overridden by YAML, overridden by dotted flags; checked before any loading.

A run's config is written to its folder (`write_config`); `salmonn.train.run_steps` compares the values that results
follow from when a run is resumed. A field that does not affect the results is marked:

    strategy: StrategyName = field(default="ddp", metadata=MAY_CHANGE)
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from salmonn.files import write_text

Config = TypeVar("Config")

RUN_FORMAT = 2  # of the YAML in a run's folder, stated in its first line

# Metadata of dataclass fields that a resumed run may change. With the second, results follow only from whether the
# value is None, and the field's default must be another.
MAY_CHANGE = {"resume": "may_change"}
MAY_CHANGE_BUT_NOT_TO_NONE = {"resume": "may_change_but_not_to_none"}


class HelpFormatter(DefaultHelpFormatter):
    """Formatter that shows choices and defaults as a reader needs them, without Python's names of types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_shown = isinstance(action.default, (int, float, str, Path)) and action.default is not False
        if "default" in text or "%" in text or not is_shown or action.default == argparse.SUPPRESS:
            return text
        return f"{text} (default: %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        choices = re.fullmatch(r"(?:\w+\[)*Literal\[([^]]*)\](?:, null| \| None)?\]*", str(self._get_type_str(action)))
        return f"{{{choices[1].replace(chr(39), '').replace(', ', ',')}}}" if choices else action.dest.upper()


class FlagParser(ArgumentParser):
    """Argument parser that shows flags in kebab-case, in help, usage and errors, and accepts `--like_this` as well.

    In code, flags are registered under the names of the dataclass fields that they set, which are also the keys of YAML
    files: `add_argument("--batch_size")`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **options})

    def parse_args(self, args: Sequence[str] | None = None, **options: Any) -> Namespace:  # type: ignore[override]
        """Parse a command line (default: the process's own)."""
        return super().parse_args(normalize_flags(args), **options)

    def format_usage(self) -> str:
        """Return the usage line."""
        return _to_kebab_case(super().format_usage())

    def format_help(self, *args: Any) -> str:
        """Return the help text."""
        return _to_kebab_case(super().format_help(*args))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one sentence, and exit with code 2."""
        if "config" not in {action.dest for action in self._actions}:  # with YAML, the key is what a user has to find
            message = re.sub(r'Parser key "([\w.]+)"', r"--\1", message)
            message = re.sub(r"(?<=are required: )[\w.-]+(, [\w.-]+)*", self._name_required, message)
        if not self.exit_on_error:
            super().error(message, ex)
        command = getattr(ex, "subcommand_parser", None) or self
        prog = command.prog.replace(" [options]", "")
        self.exit(2, f"error: {_to_kebab_case(_describe_types(message))} (see {prog} --help)\n")

    def _name_required(self, missing: re.Match[str]) -> str:
        """Return the missing arguments of a subcommand, known as `command.name`, as a user writes them."""
        names = []
        for key in missing[0].split(", "):
            command, _, name = key.rpartition(".")
            parser = self._subcommands_action.choices[command] if command else self  # type: ignore[union-attr]
            names.append(f"--{name}" if f"--{name}" in parser._option_string_actions else name)
        return ", ".join(names)


def _describe_types(message: str) -> str:
    """Rewrite jsonargparse's message about a value of a wrong type: without Python's names of types, on one line."""
    found = re.search(
        r"(?s)^(?P<flag>.*?):\s*\n.*?Expected an? (?P<type>[^\n]*?)(\. Got value: |\n.*Given value: )", message
    )
    if not found:
        return " ".join(message.split())
    expected, value = found["type"], message[found.end() :].strip()
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", expected):
        expected = f"one of {choices[1].replace(chr(39), '')}"
    else:
        name = re.sub(r"<class '(\w+\.)*(\w+)'>", r"\2", expected)
        expected = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(name, name)
    return f"{found['flag'].strip()}: must be {expected}, got {value}"


def _to_kebab_case(text: str) -> str:
    text = re.sub(r"<class\s+'([\w.]+)'>", r"\1", text)
    return re.sub(r"(?<![\w/.-])--[a-z][\w.-]*", lambda flag: flag[0].replace("_", "-"), text)


def run_recipe(
    main: Callable[[Config], None],
    config_type: type[Config],
    *,
    description: str,
    args: Sequence[str] | None = None,
    on_error: Callable[[str], object] | None = None,
    on_end: Callable[[], object] | None = None,
) -> None:
    """Read a recipe's config from the command line and run the recipe.

    A user's mistake (an unknown key, a wrong type, a missing file, clips that do not fit) ends the process with a
    one-line message and exit code 2, without a traceback.

    Args:
        main: the recipe.
        config_type: a dataclass, possibly with nested dataclasses; its docstrings become the help.
        description: text at the top of `--help`.
        args: the command line (default: that of this process).
        on_error: called with the message after it was printed, such as `dist.abort`, which ends the other processes.
        on_end: called when the recipe has ended without an error.
    """
    config = parse_config(config_type, description=description, args=args)
    try:
        main(config)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        if on_error:
            on_error(str(error))
        sys.exit(2)
    if on_end:
        on_end()


def parse_config(config_type: type[Config], *, description: str, args: Sequence[str] | None = None) -> Config:
    """Build a config from a command line; see `run_recipe`. A mistake ends the process with exit code 2."""
    fields = dataclasses.fields(config_type)  # type: ignore[arg-type]
    switches = {f"--{field.name}" for field in fields if field.type is bool}
    flags = normalize_flags(args)
    flags = [
        f"{flag}=true" if flag in switches and following.startswith("--") else flag  # a bare switch means true
        for flag, following in zip(flags, [*flags[1:], "--"], strict=False)
    ]
    parser = make_parser(config_type)  # type: ignore[arg-type]
    parser.prog, parser.description = Path(sys.argv[0]).name, description
    try:
        built = parser.instantiate(parser.parse_args(flags))
        return config_type(**{field.name: getattr(built, field.name) for field in fields if field.name in built})
    except ValueError as error:  # raised by a dataclass
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


@cache
def make_parser(config_type: type) -> FlagParser:
    """Return the parser of a config's flags, built once: hundreds of flags take tenths of a second."""
    parser = FlagParser()
    parser.add_argument("--config", action="config", help="YAML file with the values that differ from the defaults")
    parser.add_class_arguments(config_type)
    return parser


@cache
def make_writer(config_type: type) -> ArgumentParser:
    """Return the parser that writes a config as YAML, built once."""
    parser = ArgumentParser()
    parser.add_class_arguments(config_type)
    return parser


def normalize_flags(args: Sequence[str] | None) -> list[str]:
    """Return a command line (default: that of this process) with --like-this rewritten to --like_this."""
    normalized = []
    for arg in sys.argv[1:] if args is None else args:
        flag, equals, value = str(arg).partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        normalized.append(flag + equals + value)
    return normalized


def resume_values(config: Any) -> Namespace:
    """Return the values that a run's results follow from: those of all fields that are not marked as `MAY_CHANGE`.

    Args:
        config: a dataclass; nested dataclasses become nested namespaces.
    """
    values = Namespace()
    for field in dataclasses.fields(config):
        value, resume = getattr(config, field.name), field.metadata.get("resume")
        if resume == "may_change_but_not_to_none" and value is not None:
            value = field.default  # stands for any value, so that the YAML reads back as one that is not None
        if resume != "may_change":
            values[field.name] = resume_values(value) if dataclasses.is_dataclass(value) else value
    return values


def write_config(folder: Path, config: Any, *, name: str) -> None:
    """Write a run's config to its folder, as YAML that `--config` reads back.

    Raises:
        ValueError: another version of salmonn wrote the file that is there.
    """
    header = f"# run config, format {RUN_FORMAT}"
    path = folder / f"{name}.yaml"
    if path.is_file() and path.read_text(encoding="utf-8").splitlines()[:1] != [header]:
        raise ValueError(
            f"{path} does not start with {header!r}: another version of salmonn wrote it; "
            "resume the run with that version, or choose another --out"
        )
    writer = make_writer(type(config))  # type: ignore[arg-type]
    write_text(path, f"{header}\n{writer.dump(_to_namespace(config), skip_unset=False)}")


def _to_namespace(config: Any) -> Namespace:
    values = ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    return Namespace(**{name: _to_namespace(one) if dataclasses.is_dataclass(one) else one for name, one in values})
