"""Chat templates that do not come to an end."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from icons.datamodules.chat import endless
from icons.datamodules.chat.own_template import OwnTemplate
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.chat.templates import Turn

CHATML = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
LOOPS = {
    "nested": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "of a list": "{% set x = range(9999) | list %}{% for a in x %}{% for b in x %}{% for c in x %}{{ loop.index }}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "that leave all out": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_an_endless_template_is_refused_at_the_start(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    monkeypatch.setattr(endless, "SECONDS", 0.1)
    tokenizer.chat_template = loop + CHATML
    with pytest.raises(ValueError, match=r"its chat template is endless: it does not come to an end within 0.1 s"):
        OwnTemplate(tokenizer, "the model")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_row_that_makes_a_template_endless_fails_in_any_thread_and_the_next_does_not(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(endless, "SECONDS", 0.1)
    bad = "{% for m in messages if m.content == 'for ever' %}" + LOOPS["nested"] + "{% endfor %}"
    tokenizer.chat_template = bad + template
    made = OwnTemplate(tokenizer, "the model")
    tokenizer.chat_template = template
    plain = OwnTemplate(tokenizer, "the model")

    def sample(template: Any, question: str) -> Any:
        return template(tokenizer, [Turn(True, question), Turn(False, "Yes")], False, 99)

    with ThreadPoolExecutor(1) as other:
        for run in (lambda *given: sample(*given), lambda *given: other.submit(sample, *given).result()):
            with pytest.raises(TemplateError, match=r"refuses the turns: it does not come to an end within 0.1 s"):
                run(made, "for ever")
            assert run(made, "Is it?") == run(plain, "Is it?")


def test_a_row_whose_text_would_not_fit_into_memory_fails(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% if messages[0].content == 'big' %}{{ 'a' * 10 ** 17 }}{% endif %}" + CHATML
    made = OwnTemplate(tokenizer, "the model")
    with pytest.raises(TemplateError, match="refuses the turns: MemoryError"):
        made(tokenizer, [Turn(True, "big"), Turn(False, "Yes")], False, 99)
