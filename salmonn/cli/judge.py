"""The flags that say who judges, shared by the commands that judge."""

from dataclasses import fields
from typing import get_args

from jsonargparse import Namespace

from salmonn.config import FlagParser
from salmonn.score.config import JudgeConfig, JudgeKind


def add_judge(parser: FlagParser) -> None:
    """Add --judge and all that it may cost."""
    parser.add_argument("--judge", type=JudgeKind, default="rule", help="who judges: " + ", ".join(get_args(JudgeKind)))
    parser.add_class_arguments(JudgeConfig, skip={"kind"})


def judge_config(values: Namespace) -> JudgeConfig:
    """The judge that the flags describe."""
    names = {field.name for field in fields(JudgeConfig)} - {"kind"}
    return JudgeConfig(kind=values.judge, **{name: values[name] for name in names})
