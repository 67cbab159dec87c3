"""Chat templates in use: which characters the assistant answers, by the templates' own marks and by eye.

The templates are those that TRL ships, unchanged from the models' makers; beside most lies one of TRL's own with marks
around what the assistant generates. Families that are not among them are written here, in our words.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from icons.batch import IGNORE_INDEX
from icons.datamodules.chat.own_template import OwnTemplate
from icons.datamodules.chat.rendering import MOST_SKELETONS, SPECIAL, ChatTemplate
from icons.datamodules.chat.skeleton import IMAGE_PART, Message, TemplateError
from icons.datamodules.chat.templates import Turn

_spec = find_spec("trl")  # not imported: it brings much with it
assert _spec is not None and _spec.submodule_search_locations is not None
FOLDER = Path(_spec.submodule_search_locations[0]) / "chat_templates"
# what is learned of two answers, "Dogs run." and " Yes\n"; * : the template trims
END = "Dogs run.{0}| Yes\n{0}"
TRIMMED = "Dogs run.{0}|Yes{0}"
EYE = {
    "cohere": TRIMMED.format("<|END_OF_TURN_TOKEN|>"),
    "cohere2": END.format("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill": END.format("<｜end▁of▁sentence｜>"),
    "deepseekv3": END.format("<｜end▁of▁sentence｜>"),
    "gemma": TRIMMED.format("<end_of_turn>"),
    "gemma3": TRIMMED.format("<end_of_turn>"),
    "gemma4": TRIMMED.format("<turn|>"),
    "glm4moe": "\n<think></think>\nDogs run.|\n<think></think>\nYes",
    "gptoss": "<|channel|>final<|message|>Dogs run.<|end|>|<|channel|>final<|message|> Yes\n<|return|>",
    "idefics3": " Dogs run.<end_of_utterance>|  Yes\n<end_of_utterance>",
    "lfm2": END.format("<|im_end|>"),
    "llama3": TRIMMED.format("<|eot_id|>"),
    "llama3_1": TRIMMED.format("<|eot_id|>"),
    "llama3_2": TRIMMED.format("<|eot_id|>"),
    "llava_next": END.format("</s>"),
    "muse_glimmer": " to=user<|message|>Dogs run.<|eot|>| to=user<|message|> Yes\n<|eot|>",
    "nemotron_3_nano": "Dogs run.<|im_end|>| Yes<|im_end|>",
    "phi3": "Dogs run.<|end|>| Yes\n<|end|>\n</s>",
    "phi3_5": "Dogs run.<|end|>| Yes\n<|end|>\n</s>",
    "qwen2_5": END.format("<|im_end|>"),
    "qwen2_5_vl": END.format("<|im_end|>"),
    "qwen3": "Dogs run.<|im_end|>|<think>\n\n</think>\n\n Yes\n<|im_end|>",
    "qwen3_5_nothink": TRIMMED.format("<|im_end|>"),
    "qwen3_5_think": "Dogs run.<|im_end|>|\n</think>\n\nYes<|im_end|>",
    "qwen3_instruct_2507": END.format("<|im_end|>"),
    "qwen3_vl": END.format("<|im_end|>"),
    "smolvlm": " Dogs run.<end_of_utterance>|  Yes\n<end_of_utterance>",
}
MARKED = sorted(file.stem for file in FOLDER.glob("*_training.jinja"))
TURNS = [Turn(True, "Yes?"), Turn(False, "Dogs run."), Turn(True, " Yes "), Turn(False, " Yes\n")]


@pytest.fixture
def with_template(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A tokenizer with a template of TRL's, and the special tokens that it writes."""

    def make(name: str) -> PreTrainedTokenizerFast:
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
        special = sorted(set(SPECIAL.findall(tokenizer.chat_template)) | {"</s>"})
        tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": "</s>"})
        return tokenizer

    return make


def learned(tokenizer: Any, turns: list[Turn]) -> str:
    """The runs of supervised tokens, decoded."""
    ids, labels = OwnTemplate(tokenizer, "M")(tokenizer, turns, False, 4096)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            assert label == token
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer.decode(run) for run in runs if run)


@pytest.mark.parametrize("name", EYE)
def test_answers_and_their_ends_are_learned(name: str, with_template: Any) -> None:
    assert learned(with_template(name), TURNS) == EYE[name]


@pytest.mark.parametrize("name", MARKED)
def test_marks_of_a_template_are_taken_as_they_are(name: str, with_template: Any) -> None:
    tokenizer = with_template(name)
    template = OwnTemplate(tokenizer, "M")
    _, labels = template(tokenizer, TURNS, False, 4096)
    messages = [Message("user" if turn.human else "assistant", (turn.text,)) for turn in TURNS]
    oracle = tokenizer.apply_chat_template(
        template.template.contents(messages), return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(label != IGNORE_INDEX) for label in labels] == oracle["assistant_masks"]
    assert sum(oracle["assistant_masks"])


# Families that TRL has no file of, in our words: what their makers' templates write.
IMAGES_FIRST = (
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}"
)
OWN = {
    # LLaVA-1.5 of llava-hf: parts alone, marks around the answer without an end token
    "llava_hf": (
        "{% for m in messages %}{{ m['role'].upper() }}: " + IMAGES_FIRST + "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}{% else %}{{ p['text'] + ' ' }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        "Dogs run. | Yes\n ",
    ),
    # LLaVA-OneVision's first: what the template writes before an answer is not its generation prompt
    "llava_onevision": (
        "{% for m in messages %}<|im_start|>{{ m['role'] + ' ' }}" + IMAGES_FIRST + "{{ '\n' + p['text'] }}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "Dogs run.<|im_end|>| Yes\n<|im_end|>",
    ),
    # InternVL: images where they stand
    "internvl": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
        "{{ p['text'] if p['type'] == 'text' else '<image>\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "Dogs run.<|im_end|>| Yes\n<|im_end|>",
    ),
    # Mistral and Pixtral: no generation prompt at all
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{% if m['content'] is string %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}[INST]{% for p in m['content'] %}"
        "{{ p['text'] if p['type'] == 'text' else '<image>' }}{% endfor %}[/INST]{% endif %}{% else %}"
        "{{ ' ' + (m['content'] if m['content'] is string else m['content'][0]['text']) + eos_token }}"
        "{% endif %}{% endfor %}",
        "Dogs run.<|im_end|>| Yes\n<|im_end|>",
    ),
    # Zephyr, TinyLlama: role names that are no special tokens
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        "Dogs run.<|im_end|>| Yes\n<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_other_families_learn_the_answers_too(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template, expected = OWN[name]
    assert learned(tokenizer, TURNS) == expected


@pytest.mark.parametrize("name", ["llava_hf", "llava_onevision", "internvl", "mistral"])
def test_images_are_found_where_the_template_puts_them(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template, _ = OWN[name]
    messages = [Message("user", ("a <image> ", IMAGE_PART, "b")), Message("assistant", ("c",))]
    found = ChatTemplate(tokenizer, "M", ["<other>", "<image>"])(messages)
    (begin, end), first = found.images[0], found.text.find("a <image> ")
    assert len(found.images) == 1 and found.text[begin:end] == "<image>" and "b" in found.text
    assert not first <= begin < first + len("a <image> "), "the word in the text is a word"


def test_different_texts_never_give_equal_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that takes parts alone writes nothing of a content that is a text."""
    tokenizer.chat_template, _ = OWN["llava_hf"]
    template = ChatTemplate(tokenizer, "M")
    texts = {template([Message("user", (f"{n}?",)), Message("assistant", (f"{n}.",))]).text for n in range(6)}
    assert len(texts) == 6 and template.form == "parts"


def test_what_an_answer_thought_may_be_left_out_of_earlier_turns(with_template: Any) -> None:
    tokenizer = with_template("qwen3")
    thought = "<think>\nhm\n</think>\n\nYes"
    turns = [Turn(True, "a"), Turn(False, thought), Turn(True, "b"), Turn(False, thought)]
    assert learned(tokenizer, turns) == f"Yes<|im_end|>|{thought}<|im_end|>"


def test_the_day_does_not_change_a_prompt(with_template: Any) -> None:
    text = ChatTemplate(with_template("llama3_2"), "M")([Message("user", ("a",)), Message("assistant", ("b",))]).text
    assert "Today Date: 26 Jul 2024" in text
    gptoss = ChatTemplate(with_template("gptoss"), "M")([Message("user", ("a",)), Message("assistant", ("b",))]).text
    assert "Current date: 2024-07-26" in gptoss


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}<{{ m.role }}>{% endfor %}", r"leaves out the text of message 1 \(user\)"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes twice the text of message 1"),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "writes the texts in another order"),
        ("{{ raise_exception('no such turns') }}", "refuses the turns: no such turns"),
        ("{{ messages[0].content.nothing.more }}", "refuses the turns: 'str object' has no attribute 'nothing'"),
        (
            "{% for m in messages %}{{ m.content if m.content is not string }}{% endfor %}",
            "writes the content's list of parts as it stands in Python",
        ),
    ],
)
def test_a_template_that_does_not_hold_question_and_answer_is_refused(
    template: str, text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=f"M: its chat template writes no conversation .*{text}"):
        ChatTemplate(tokenizer, "M")


def test_a_template_without_a_place_for_images_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m.content if p.text %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="0 times '<image>' for one image"):
        ChatTemplate(tokenizer, "M", ["<image>"])


def test_without_a_chat_template_one_is_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"M: brings no chat template .* or a --template"):
        ChatTemplate(tokenizer, "M")


def test_of_several_templates_the_default_is_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ 'tools' }}"}
    assert learned(tokenizer, TURNS) == "Dogs run.<|im_end|>| Yes\n<|im_end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{% for m in messages %}{{ m.content | replace('b', 'c') }}{% endfor %}",
            "does not hold their texts as they are",
        ),
        (
            "{% for m in messages %}{{ m.content if m.content != 'b' }}{% endfor %}",
            "does not hold their texts as they are",
        ),
        ("{{ raise_exception('five') if messages | length == 4 }}" + OWN["zephyr"][0], "refuses the turns: five"),
    ],
)
def test_a_conversation_whose_texts_are_not_there_is_refused(
    template: str, text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.chat_template = template
    messages = [
        Message("user", ("a",)),
        Message("assistant", ("b",)),
        Message("user", ("c",)),
        Message("assistant", ("d",)),
    ]
    with pytest.raises(TemplateError, match=text):
        ChatTemplate(tokenizer, "M")(messages)


def test_forms_of_conversations_are_not_kept_without_end(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, "M")
    for length in range(1, 2 * MOST_SKELETONS):
        template([Message("user", ("a",) * length), Message("assistant", ("b",))])
    assert len(template.skeletons) == MOST_SKELETONS
