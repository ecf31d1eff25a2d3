"""Tables that are generated while the site is built: commands, configuration keys, operations, methods."""

from __future__ import annotations

import inspect
import re
from dataclasses import Field, fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from typer.models import ArgumentInfo, CommandInfo, ParameterInfo

from pow2quant import config, plugins
from pow2quant.cli import application

MARKERS = {
    "<!-- generated: aimet members -->": "aimet_members",
    "<!-- generated: command line -->": "command_line",
    "<!-- generated: configuration -->": "configuration",
    "<!-- generated: operations -->": "operations",
    "<!-- generated: methods -->": "methods",
    "<!-- generated: rewrites -->": "rewrites",
}

USE = {
    "equalize": ("low", "depthwise layers, one scale per tensor"),
    "align": ("low", "weights below 8 bits; part of the default"),
    "migrate": ("low", "channels behind LayerNorm or RMSNorm that differ much, as in large transformers"),
    "ptf": ("low", "residual streams in front of norms whose channels differ much; activations below 8 bits"),
    "log2_attention": ("low", "attention on hardware that shifts, or without a divider"),
    "output_mse": ("medium", "weights below 8 bits, one scale per tensor; part of the default there"),
    "bias_correction": ("low", "every width, as the last method; part of the default"),
    "bn_reestimation": ("low", "networks with batch norm, instead of `bias_correction`"),
    "aciq": ("low", "activations of 4 bits, without learning"),
    "lapq": ("medium", "activations of 4 bits, before `adaround` or `qdrop`"),
    "gpfq": ("medium", "weights of 4 bits and fewer, without learning"),
    "gptq": ("medium", "weights below 8 bits, without learning; part of the default"),
    "adaround": ("high", "weights of 4 bits, activations of 8"),
    "qdrop": ("high", "weights and activations of 4 bits"),
    "ternary": ("low", "weights of 2 bits"),
    "auto": ("high", "when you don't want to choose: it tries chains within a limit of minutes"),
}
"""method: (cost, when to use it)."""

TAKES = {int: "integer", str: "text", Path: "path"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts what is generated in the place of its marker (an event of mkdocs)."""
    for marker, function in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, globals()[function]())
    return markdown


def aimet_members() -> str:
    """The table of AIMET's public members."""
    from pow2quant.adapters.aimet_members import page

    return page()


def on_post_page(output: str, **_: Any) -> str:
    """Names the theme's search dialog for screen readers (an event of mkdocs)."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')


def operations() -> str:
    """The table of modules, and the names of PyTorch's operations."""
    from pow2quant.frontends import catalogue

    rows = [catalogue.COLUMNS, tuple("---" for _ in catalogue.COLUMNS), *catalogue.modules()]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"{table}\n\n{', '.join(f'`{name}`' for name in catalogue.operations())}\n"


def methods() -> str:
    """Every method: what it is, what it costs, when to use it."""
    summary = {name: _summary(plugins.resolve("methods", name)).split("\n")[0] for name in plugins.TABLES["methods"]}
    rows = "\n".join(f"| `{name}` | {_cell(text)} | {' | '.join(USE[name])} |" for name, text in summary.items())
    return f"| method | what it is | cost | use it for |\n|---|---|---|---|\n{rows}"


def rewrites() -> str:
    """onnxruntime's optimizers: a row for those that do the same."""
    from pow2quant.rewrites import REWRITES

    kinds: dict[tuple[str, str], list[str]] = {}
    for rewrite in REWRITES:
        kinds.setdefault((rewrite.guard, rewrite.level), []).append(f"`{rewrite.name}`")
    rows = "\n".join(f"| {', '.join(names)} | {level} | {_cell(guard)} |" for (guard, level), names in kinds.items())
    return f"| optimizers | level | what they do, and why values stay |\n|---|---|---|\n{rows}"


def command_line() -> str:
    """A section for every command: what its `--help` says."""
    return "\n\n".join(_command(command) for command in application().registered_commands)


def _command(command: CommandInfo) -> str:
    assert command.callback is not None
    hints = get_type_hints(command.callback, include_extras=True)
    parameters = [(name, *get_args(hint)) for name, hint in hints.items() if name != "return"]
    rows = [_parameter(name, hint, info) for name, hint, info in parameters if not info.hidden]
    table = "\n".join(["| argument or flag | takes | meaning |", "|---|---|---|", *rows])
    example = (command.epilog or "").removeprefix("Example: ")
    text = inspect.cleandoc(command.callback.__doc__ or "")
    return f"## {command.name or command.callback.__name__}\n\n{text}\n\n{table}\n\nExample: `{example}`"


def _parameter(name: str, hint: Any, info: ParameterInfo) -> str:
    """A row of the table. hint: `int | None`, `list[str]` and the like."""
    declared = (info.default, *(info.param_decls or ()))  # `Option("--json")` in an Annotated is kept as a default
    flags = [d for d in declared if isinstance(d, str) and d.startswith("-")] or [f"--{name.replace('_', '-')}"]
    shown = info.metavar if isinstance(info, ArgumentInfo) else "`, `".join(flags)
    kinds = [TAKES[t] for t in (hint, *get_args(hint), *chain(*map(get_args, get_args(hint)))) if t in TAKES]
    return f"| `{shown}` | {kinds[0] if kinds else ''} | {_cell(info.help or '')} |"


def configuration() -> str:
    """A table for every section: key, meaning, default, legal values."""
    default = config.RunConfig()
    written = yaml.safe_load(config.dump(default))
    top = [f for f in fields(default) if not is_dataclass(getattr(default, f.name))]
    parts = ["## Top level", _table(config.RunConfig, top, "", written)]
    for section in fields(default):
        value = getattr(default, section.name)
        if section.name == "quantization":
            roles = [f for f in fields(value) if f.name in config.ROLES]
            parts += ["## quantization", _roles(roles, written["quantization"])]
            overrides = [f for f in fields(value) if f.name not in config.ROLES]
            parts.append(_table(type(value), overrides, "quantization.", written["quantization"]))
        elif is_dataclass(value):
            parts += [f"## {section.name}", _summary(type(value)).split("\n\n")[0]]
            parts.append(_table(type(value), list(fields(value)), f"{section.name}.", written[section.name]))
    return "\n\n".join(parts)


def _roles(roles: list[Field[Any]], written: dict[str, Any]) -> str:
    """The keys that each role has, with the default of each role."""
    keys = [("bitwidth" if f.name == "bits" else f.name, f) for f in fields(config.TensorSpec)]
    head = [f"| key | meaning | {' | '.join(r.name for r in roles)} | legal |", "|---" * (len(roles) + 3) + "|"]
    rows, meaning = [], meanings(config.TensorSpec)
    for key, spec in keys:
        values = " | ".join(f"`{_yaml(written[r.name][key])}`" for r in roles)
        rows.append(f"| `{key}` | {meaning[spec.name]} | {values} | {_legal(config.TensorSpec, spec)} |")
    return "Each of `weight`, `input`, `output`, `bias` is a mapping, or `null`: then it stays float.\n\n" + "\n".join(
        head + rows
    )


def _table(cls: type, keys: list[Field[Any]], prefix: str, written: dict[str, Any]) -> str:
    rows, meaning = ["| key | meaning | default | legal |", "|---|---|---|---|"], meanings(cls)
    for f in keys:
        rows.append(f"| `{prefix}{f.name}` | {meaning[f.name]} | `{_yaml(written.get(f.name))}` | {_legal(cls, f)} |")
    return "\n".join(rows)


def meanings(cls: type) -> dict[str, str]:
    """What each field of a dataclass means. Its docstring says `key: meaning.` or `key, key: meaning.` of each."""
    known = {f.name for f in fields(cls)}
    text = " ".join(_summary(cls).split())
    start = re.compile(r"(?:^|(?<=[.;] ))([a-z_0-9]+(?:, [a-z_0-9]+)*): ")
    marks = [m for m in start.finditer(text) if set(m[1].split(", ")) <= known]
    ends = [*(m.start() for m in marks[1:]), len(text)]
    said = {
        name: text[m.end() : end].rstrip("; ") for m, end in zip(marks, ends, strict=True) for name in m[1].split(", ")
    }
    return {name: _cell(words[:1].upper() + words[1:]) for name, words in said.items()}


def _legal(cls: type, key: Field[Any]) -> str:
    """What the field's annotation says, as the error message about an illegal value does."""
    hint = get_type_hints(cls, include_extras=True)[key.name]
    found = next((a for a in get_args(hint) if isinstance(a, config.Legal)), None)
    words = found.words() if found else "true or false"
    none = ", or null" if "None" in str(get_args(hint)[:1]) and "null" not in words else ""
    return _cell((words + none).removesuffix("; names: "))


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _cell(text: str) -> str:
    """Text without a meaning in Markdown: `|` ends a cell, `<` begins a tag, `{` a list of attributes."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=200).removesuffix("\n...\n").strip()
