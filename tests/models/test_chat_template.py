import json

import pytest

from ragkit.errors import ModelError
from ragkit.models.chat_template import FIXED_DATE, ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]


def _template(folder, source, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **config}))
    return ChatTemplate(folder)


def test_messages_and_special_tokens_are_rendered(tmp_path):
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert _template(tmp_path, source, bos_token={"content": "<s>"}).render(MESSAGES) == "<s>[user] hi>"


def test_the_date_is_always_the_same(tmp_path):
    assert (
        _template(tmp_path, "{{ strftime_now('%Y') }} {{ date_string }}").render(MESSAGES)
        == f"{FIXED_DATE} {FIXED_DATE}"
    )


def test_a_template_file_comes_before_the_config(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("file")
    assert _template(tmp_path, "config").render(MESSAGES) == "file"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert _template(tmp_path, named).render(MESSAGES) == "d"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_run_in_the_sandbox(tmp_path, attack):
    with pytest.raises(ModelError, match="chat template"):
        _template(tmp_path, attack).render(MESSAGES)


def test_a_templates_own_refusal_is_reported(tmp_path):
    with pytest.raises(ModelError, match="roles must alternate"):
        _template(tmp_path, "{{ raise_exception('roles must alternate') }}").render(MESSAGES)


@pytest.mark.parametrize("source", [None, []])
def test_a_model_without_a_template_is_refused(tmp_path, source):
    with pytest.raises(ModelError, match="no chat template"):
        _template(tmp_path, source)


def test_a_folder_without_tokenizer_config_has_no_template(tmp_path):
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate(tmp_path)


def test_broken_syntax_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="no Jinja template"):
        _template(tmp_path, "{% if %}").render(MESSAGES)
