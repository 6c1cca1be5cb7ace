"""Chat templates of Hugging Face model folders, rendered as transformers renders them.

Source: transformers 4.5x to 5.x, utils/chat_template_utils.py: sandboxed jinja2 with trimmed blocks, loop controls, a
`generation` tag, `tojson` that does not escape HTML, `raise_exception` and `strftime_now`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateRefused(Exception):
    """The template cannot render these messages; the text is meant for the caller."""


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """special_tokens: bos_token, eos_token, ... as the template names them.

        Raises: jinja2.TemplateSyntaxError.
        """
        self._template = _environment().from_string(source)
        # All names a template sees but its messages; jinja would merge its own with ours at every rendering.
        self._names = {**self._template.globals, **special_tokens, "tools": None, "documents": None}

    def render(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool, variables: Mapping[str, object]) -> str:
        """The prompt text. variables: further names for the template (chat_template_kwargs).

        Raises: TemplateRefused.
        """
        if taken := _RESERVED.intersection(variables):
            raise TemplateRefused(f"{sorted(taken)[0]!r} is set by the server")
        names = {**self._names, **variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return "".join(self._template.root_render_func(self._template.new_context(names, shared=True)))
        except jinja2.TemplateError as error:
            raise TemplateRefused(str(error)) from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # Raised by expressions of the template itself, for messages of a shape it was not written for.
            raise TemplateRefused(f"{type(error).__name__}: {error}") from error


def load_chat_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a model folder: chat_template.jinja, else chat_template of tokenizer_config.json (config); None without one.

    Raises: jinja2.TemplateSyntaxError, OSError.
    """
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else _from_config(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, _special_tokens(config))


def _from_config(entry: object) -> str | None:
    if isinstance(entry, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        entry = next((item.get("template") for item in entry if item.get("name") == "default"), None)
    return entry if isinstance(entry, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    entries = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: entry.get("content") if isinstance(entry, dict) else entry for name, entry in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant wrote, for training; here it renders as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Keep the body, drop the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., object]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _tojson(
    value: object, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
