"""Typed configuration: dataclass defaults < YAML < dotted flags, checked before anything heavy is loaded."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, Namespace

from salmonn.records import write_text

Config = TypeVar("Config")


class FlagParser(ArgumentParser):
    """Argument parser that shows flags in kebab-case, in help, usage and errors, and accepts `--like_this` as well.

    Inside, flags have the names of the dataclass fields that they set, which are also the keys of YAML files.
    """

    def add_argument(self, *args: Any, **options: Any) -> Any:
        """Add an argument; its flag may be written in either spelling."""
        return super().add_argument(*normalize_flags(args), **options)

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
        """Print usage and error message, and exit with code 2."""
        if "config" not in {action.dest for action in self._actions}:  # with YAML, the key is what a user has to find
            message = re.sub(r'Parser key "([\w.]+)"', r"--\1", message)
            message = re.sub(r"(?<=are required: )[\w.-]+(, [\w.-]+)*", self._name_required, message)
        super().error(_to_kebab_case(message), ex)

    def _name_required(self, missing: re.Match[str]) -> str:
        """Return the missing arguments of a subcommand, known as `command.name`, as a user writes them."""
        names = []
        for key in missing[0].split(", "):
            command, _, name = key.rpartition(".")
            parser = self._subcommands_action.choices[command] if command else self  # type: ignore[union-attr]
            names.append(f"--{name}" if f"--{name}" in parser._option_string_actions else name)
        return ", ".join(names)


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
) -> None:
    """Read a recipe's config from the command line and run it.

    A user's mistake (an unknown key, a wrong type, a missing file, clips that do not fit) ends the process with a
    sentence and exit code 2, never with a traceback.

    Args:
        main: the recipe.
        config_type: a dataclass, with further dataclasses nested in it; its docstrings become the help.
        description: what the recipe does, for --help.
        args: the command line (default: the process's own).
        on_error: called with the sentence once it is told; `dist.abort` ends the run's other processes too.
    """
    config = parse_config(config_type, description=description, args=args)
    try:
        main(config)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        code = _complain(error)
        if on_error:
            on_error(str(error))
        sys.exit(code)


def _complain(error: Exception) -> int:
    sys.stderr.write(f"error: {error}\n")
    return 2


def parse_config(config_type: type[Config], *, description: str, args: Sequence[str] | None = None) -> Config:
    """The config that a command line describes; see `run_recipe`."""
    parser = FlagParser(description=description)
    parser.add_argument("--config", action="config", help="YAML file that states what differs from the defaults")
    parser.add_class_arguments(config_type)
    try:
        built = parser.instantiate(parser.parse_args(_switched_on(normalize_flags(args), config_type)))
    except ValueError as error:  # a dataclass refused its values
        sys.exit(_complain(error))
    names = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{name: value for name, value in vars(built).items() if name in names})


def _switched_on(args: Sequence[str], config_type: type) -> list[str]:
    """A command line with --flag=true for a switch that stands alone."""
    switches = {f"--{field.name}" for field in dataclasses.fields(config_type) if field.type is bool}
    return [
        f"{arg}=true" if arg in switches and after.startswith("--") else arg
        for arg, after in zip(args, [*args[1:], "--"], strict=False)
    ]


def normalize_flags(args: Sequence[str] | None) -> list[str]:
    """A command line (default: the process's own) with --like_this for --like-this: both spellings are welcome."""
    given = sys.argv[1:] if args is None else args
    parts = (str(arg).partition("=") for arg in given)
    return [
        (flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
        for flag, equals, value in parts
    ]


def claim_folder(folder: Path, config: Any, *, name: str) -> None:
    """Write the resolved config to a run's folder, as YAML that `--config` reads back.

    Raises:
        ValueError: the folder holds results of another config, which a resumed run would mix with its own.
    """
    path = folder / f"{name}.yaml"
    text = _to_yaml(config)
    if path.is_file():
        before, now = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
        if before != now:
            gained = [f"now {line.strip()}" for line in now if line not in before]
            lost = [f"no longer {line.strip()}" for line in before if line not in now]
            raise ValueError(
                f"{folder} holds a run with another configuration "
                f"({', '.join(gained + lost) or 'a list in another order'}): "
                "choose another --out, or delete that folder to start anew"
            )
    write_text(path, text)


def _to_yaml(config: Any) -> str:
    parser = ArgumentParser()
    parser.add_class_arguments(type(config))
    return parser.dump(_to_namespace(config))


def _to_namespace(config: Any) -> Namespace:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Namespace(
        **{name: _to_namespace(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    )
