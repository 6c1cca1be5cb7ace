"""Templates render as transformers renders them."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from baton_frontend.chat_template import ChatTemplate, TemplateRefused, load_chat_template

USER = [{"role": "user", "content": "hi <b>"}]


def render(source: str, messages: Any = USER, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, add_generation_prompt=True, variables=variables)


def test_blocks_are_trimmed_and_text_is_not_escaped() -> None:
    source = "{{ bos_token }}\n{% for m in messages %}\n    {% if true %}\n{{ m['content'] }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source) == "<s>\nhi <b>\n"


def test_loop_controls_namespaces_and_generation_tags_work() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{% set ns.n = ns.n + 1 %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ ns.n }}{% if add_generation_prompt %}>{% endif %}"
    )
    assert render(source, [{"role": "user", "content": c} for c in "abc"]) == "ab2>"


def test_tojson_keeps_html_and_unicode() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi <b>"}]'
    assert render("{{ {'a': 'é'} | tojson(indent=1) }}") == '{\n "a": "é"\n}'


def test_variables_of_the_caller_reach_the_template() -> None:
    assert render("{% if enable_thinking is defined and not enable_thinking %}quick{% endif %}", enable_thinking=False) == "quick"


def test_tools_are_defined_and_empty() -> None:
    assert render("{% if tools %}x{% else %}none{% endif %}{{ tools is none }}") == "noneTrue"


def test_strftime_now_gives_a_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10


def test_what_the_template_refuses_is_told() -> None:
    with pytest.raises(TemplateRefused, match="only user"):
        render("{{ raise_exception('only user') }}")


@pytest.mark.parametrize("source", ["{{ messages[9].content.x.y }}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ ''.__class__.mro() }}"])
def test_errors_of_the_template_itself_are_refusals(source: str) -> None:
    with pytest.raises(TemplateRefused):
        render(source)


def test_names_of_the_server_cannot_be_taken() -> None:
    with pytest.raises(TemplateRefused, match="tools"):
        render("x", tools=[])


def test_a_template_cannot_change_what_it_gets() -> None:
    with pytest.raises(TemplateRefused):
        render("{{ messages.append(1) }}")


def test_the_file_goes_before_the_config(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    template = load_chat_template(tmp_path, {"chat_template": "config", "eos_token": {"content": "</s>"}})
    assert template is not None
    assert template.render(USER, add_generation_prompt=True, variables={}) == "file </s>"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "eos_token": None}
    template = load_chat_template(tmp_path, config)
    assert template is not None
    assert template.render(USER, add_generation_prompt=False, variables={}) == "d"


def test_no_template_is_none_and_a_broken_one_raises(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, {}) is None
    with pytest.raises(jinja2.TemplateSyntaxError):
        load_chat_template(tmp_path, {"chat_template": "{% if %}"})
