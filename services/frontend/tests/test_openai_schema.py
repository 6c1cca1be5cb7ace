"""Every field works, is harmless, or is refused by name."""

import json

import pytest
from baton_frontend import openai_schema
from baton_frontend.openai_errors import ApiError
from baton_frontend.openai_schema import ChatBody, CompletionBody, parse_chat, parse_completion

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def chat(**fields: object) -> ChatBody:
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def test_every_refused_field_is_known_to_an_endpoint_and_refused() -> None:
    for name, (neutral, _) in openai_schema.NEUTRAL.items():
        kinds = [kind for kind in (ChatBody, CompletionBody) if name in kind.__struct_fields__]
        assert kinds, name
        parse = parse_chat if kinds[0] is ChatBody else parse_completion
        base: dict[str, object] = dict(CHAT) if kinds[0] is ChatBody else {"model": "m", "prompt": "x"}
        for value in (None, *neutral):
            parse(json.dumps({**base, name: value}).encode())
        with pytest.raises(ApiError, match=name) as refused:
            parse(json.dumps({**base, name: {"odd": 1}}).encode())
        assert (refused.value.status, refused.value.param) == (400, name)


def test_true_does_not_pass_for_one() -> None:
    with pytest.raises(ApiError, match="best_of"):
        chat(best_of=True)


def test_the_body_itself_is_named_if_no_field_is() -> None:
    with pytest.raises(ApiError, match="the body") as refused:
        parse_chat(b"[]")
    assert refused.value.param is None


def test_class_comes_from_baton_before_service_tier() -> None:
    assert chat().is_interactive()
    assert not chat(service_tier="flex").is_interactive()
    assert all(chat(service_tier=tier).is_interactive() for tier in ("auto", "default", "scale", "priority", None))
    assert chat(service_tier="flex", baton={"class": "interactive"}).is_interactive()


def test_roles_and_parts_become_template_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": parts}, {"role": "assistant", "content": None, "name": "n"}])
    assert [message.as_template_message() for message in body.messages] == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": "", "name": "n"},
    ]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert chat(messages=[answer, {**answer, "tool_calls": []}]).messages[0].as_template_message() == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "image_url"}]}, {"content": "x"}]
)
def test_messages_of_other_kinds_are_refused(message: object) -> None:
    with pytest.raises(ApiError, match=r"messages\[0\]"):
        chat(messages=[message])


@pytest.mark.parametrize(("seed", "expected"), [(None, None), (0, 0), (-1, 2**64 - 1), (2**64 - 1, 2**64 - 1)])
def test_seeds_are_unsigned(seed: int | None, expected: int | None) -> None:
    assert chat(seed=seed).checked_seed() == expected


def test_doubled_stop_strings_count_once() -> None:
    assert chat(stop=["a", "b", "a"]).stops() == ("a", "b")
    assert chat(stop="a").stops() == ("a",)
    assert chat().stops() == ()


def test_unknown_fields_are_ignored_wherever_openai_may_add_one() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    body = chat(made_up={"deep": [1]}, messages=[{"role": "user", "content": parts, "new": 1}], stream=True, stream_options={"new": True})
    assert body.messages[0].as_template_message() == {"role": "user", "content": "a"}
    assert parse_completion(b'{"model": "m", "prompt": "x", "messages": 5}').prompt == "x"


def test_a_wrong_name_in_our_own_extension_is_refused() -> None:
    with pytest.raises(ApiError, match=r"dedline_s.*correct its name") as refused:
        chat(baton={"dedline_s": 3})
    assert (refused.value.param, refused.value.code) == ("baton.dedline_s", "unknown_parameter")


@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"5": 101}, {"5": None}, 5])
def test_a_wrong_bias_names_its_field_also_if_the_key_is_wrong(bias: object) -> None:
    with pytest.raises(ApiError, match="logit_bias") as refused:
        chat(logit_bias=bias)
    assert refused.value.param == "logit_bias"
