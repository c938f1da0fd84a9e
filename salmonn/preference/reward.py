"""A judge from its configuration."""

from dataclasses import replace

from salmonn.score.config import JudgeConfig
from salmonn.score.judge import Judge
from salmonn.score.llm_client import LLMClient
from salmonn.score.llm_judge import EventPrompt, LLMJudge
from salmonn.score.published import TEMPLATES
from salmonn.synthetic.judge import RuleJudge


def make_judge(config: JudgeConfig, *, published: bool = False, processes: int = 1) -> Judge:
    """The judge that the configuration names.

    Args:
        config: who, and at what cost.
        published: whether a language model is asked, and its replies are read, as the published scorer does.
        processes: how many of them share the caps and the concurrency.
    """
    if config.kind == "rule":
        return RuleJudge()
    chat = make_llm_client(config, processes=processes)
    if published:
        return LLMJudge(chat, templates=TEMPLATES, as_published=True)
    return LLMJudge(chat, templates=[EventPrompt()] * config.attempts)


def make_llm_client(config: JudgeConfig, *, processes: int = 1) -> LLMClient:
    """The language model that the configuration names; caps and concurrency are one process's share.

    Raises:
        ValueError: a cap is too small to be shared.
    """

    def share(cap: int | None) -> int | None:
        if cap is not None and cap < processes:
            raise ValueError(f"{processes} processes cannot share a cap of {cap}: raise max_requests or max_tokens")
        return None if cap is None else cap // processes

    return LLMClient(
        replace(
            config,
            concurrency=max(1, config.concurrency // processes),
            max_requests=share(config.max_requests),
            max_tokens=share(config.max_tokens),
        )
    )
