"""Which methods a run applies: those that are named, and in front of them the default ones where they build on such."""

from __future__ import annotations

from dataclasses import replace

from pow2quant.backends.base import SILENT, Progress
from pow2quant.config import EXPONENT_METHODS, NONE, Choice, RunConfig, default_methods
from pow2quant.plugins import resolve


def with_chain(config: RunConfig, default: tuple[Choice, ...], progress: Progress = SILENT) -> RunConfig:
    """The configuration with its methods written out; one line says where they differ from the default ones.

    Without methods it takes `default`. Where the first one that is named builds on exponents that others chose,
    `default` stands in front; where one of them rounds weights, and `default` does too, what only chooses exponents.
    The result stays as it is when it is completed again.
    """
    named = config.ptq.methods
    if named is None:
        return _with(config, default)
    if not named or named[0] == NONE:
        return config
    first, own, names = resolve("methods", named[0].name), shown(named), {choice.name for choice in named}
    builds = getattr(first, "builds_on_exponents", False)
    twice = builds and any(map(_rounds, named)) and any(map(_rounds, default))
    usual = EXPONENT_METHODS if twice else default
    front = tuple(choice for choice in usual if choice.name not in names)
    if not front:
        return config
    if builds:
        instead = f", in place of the default ({shown(default)})" if twice else ""
        progress.note(f"{own}: behind {shown(front)}{instead}; `none` in front leaves these out")
        return _with(config, (*front, *named))
    if not hasattr(first, "choose"):
        progress.note(f"the methods given replace the default ({shown(default)}); to keep it, name it in front")
    return config


def to_train(config: RunConfig) -> tuple[Choice, ...]:
    """The default methods in front of a training, which moves the weights itself: none of them rounds weights."""
    default = default_methods(config)
    return EXPONENT_METHODS if any(map(_rounds, default)) else default


def fixed(config: RunConfig, methods: tuple[Choice, ...]) -> RunConfig:
    """The configuration with exactly these methods, also when a run is repeated from it."""
    found = _with(config, methods)
    repeated = with_chain(found, default_methods(found))
    return found if repeated == found else _with(config, (NONE, *methods))


def shown(methods: tuple[Choice, ...]) -> str:
    """The methods in order, for people."""
    return ", ".join(choice.name for choice in methods)


def _rounds(choice: Choice) -> bool:
    return bool(getattr(resolve("methods", choice.name), "rounds_weights", False))


def _with(config: RunConfig, methods: tuple[Choice, ...]) -> RunConfig:
    return replace(config, ptq=replace(config.ptq, methods=methods))
