"""ChatTemplate: a model's own chat template: messages -> one text, and where in it the answers stand.

A template may want a message's content as a text or as a list of parts, may trim it, write something between a role's
name and the answer, or write earlier answers otherwise than the last (a `<think>` block). So nothing is assumed of it:
a conversation with words of our own in place of its texts is rendered beside the real one, which shows what the
template writes around them, and the real one must be just that with its own texts. A text that is not there, or a
template that takes neither form, is an error, never a sample of empty questions.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from icons.datamodules.chat.endless import EndlessError, ending
from icons.datamodules.chat.skeleton import (
    IMAGE_PART,
    Message,
    Skeleton,
    Slot,
    TemplateError,
    common_prefix,
    place,
    sentinel,
    sentinels,
    skeleton_in,
    slots_of,
    whole_tokens,
)

Form = Literal["text", "parts"]
SPECIAL = re.compile(r"<[^<>\s]+>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama's own default. The day on which rows are computed must not change them.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ {'%Y-%m-%d': '2024-07-26'}.get(format, '26 Jul 2024') }}{%- endmacro -%}"
)
MOST_SKELETONS = 64
_SHORT = (Message("user", (IMAGE_PART, "?")), Message("assistant", (".",)))
# what a template written by others may raise when it runs
_FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it.

    Attributes:
        text: all of it.
        answers: `[begin, end)` of each answer in `text`: what the assistant adds to the generation prompt, with the
            token that ends it, without white space after that.
        images: `[begin, end)` of each image's mark in `text`, in their order.
    """

    text: str
    answers: list[tuple[int, int]]
    images: list[tuple[int, int]]


class ChatTemplate:
    """The chat template of a tokenizer or a processor.

    Args:
        source: what has `chat_template` and `apply_chat_template`.
        what: whose it is, for messages.
        marks: what may stand for an image in a text, the likeliest first; none for a model without images.

    Attributes:
        form: how the template wants a message's content, found by trying: the first form in which question, answer and
            image all appear in what it writes.
        mark: the one of the marks that stands for an image.

    Raises:
        ValueError: in neither form they do, or it does not come to an end.
    """

    def __init__(self, source: Any, what: str, marks: Sequence[str] = ()) -> None:
        self.source, self.mark = source, ""
        self.template = _with_fixed_date(own_template(source, what))
        self.skeletons: dict[Any, Skeleton] = {}
        reasons: dict[Form, str] = {}
        forms: tuple[Form, Form] = ("parts", "text") if marks else ("text", "parts")
        for form in forms:
            for mark in marks or ("",):
                self.form, self.mark = form, mark
                self.skeletons.clear()
                try:
                    problem = self.problem()
                except EndlessError as error:
                    raise ValueError(
                        f"{what}: its chat template is endless: {error} for two short turns; expected one that ends: "
                        "mend chat_template.jinja, or name a --template"
                    ) from None
                if problem is None:
                    return
                reasons.setdefault(form, problem)
        raise ValueError(
            f"{what}: its chat template writes no conversation that holds its question and answer (content as a text: "
            f"{reasons['text']}; as a list of parts: {reasons['parts']}); expected both: mend chat_template.jinja, or "
            "name a --template"
        )

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """One text and the places of its answers.

        Where the template marks what the assistant generates (`{% generation %}`), those marks are taken as they are.

        Raises:
            TemplateError: the template refuses the messages, leaves a text out, or writes them otherwise than it does
                others of the same form, so that answers cannot be told apart.
        """
        slots = slots_of(messages, self.knows_thoughts)
        skeleton = self.skeleton(messages, slots)
        text = self.render(self.contents(messages))
        begins = place(text, skeleton, slots)
        if begins is None:
            raise TemplateError(
                "the chat template rewrites these turns: what it writes does not hold their texts as they are, so "
                "answers cannot be told apart"
            )
        images = list(self.image_marks(skeleton, begins))
        if _GENERATION.search(self.template):
            return Rendered(text, self.generated(messages, text), images)
        return Rendered(text, self.answers(skeleton, slots, begins), images)

    def problem(self) -> str | None:
        """What is wrong with the present form and mark, seen on short conversations; None: nothing."""
        try:
            self([Message("user", ("?",)), Message("assistant", (".",))])
            if self.mark and (count := len(self(_SHORT).images)) != 1:
                return f"{count} times {self.mark!r} for one image"
        except TemplateError as error:
            if isinstance(error.__cause__, EndlessError):
                raise error.__cause__ from None
            return str(error)
        return None

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        """What the template makes of messages; with `ask`, up to where the assistant answers.

        Raises:
            TemplateError: it refuses them.
        """
        with _refusals(self.template):
            text: str = self.source.apply_chat_template(
                list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=ask
            )
        return text

    def contents(self, messages: Sequence[Message], texts: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Messages in the template's form; `texts`, in their order, in place of their own."""
        others = iter(texts or [])
        contents = []
        for message in messages:
            parts = [next(others) if texts and isinstance(part, str) else part for part in message.parts]
            content: Any = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts
            ]
            if self.form == "text":
                content = "".join(part if isinstance(part, str) else self.mark for part in parts)
            contents.append({"role": message.role, "content": content})
        return contents

    def skeleton(self, messages: Sequence[Message], slots: Sequence[Slot]) -> Skeleton:
        """What the template writes around the texts of such messages; found once for each form of conversation.

        Raises:
            TemplateError: a text is left out or written twice.
        """
        thoughtful = [not slot.required for slot in slots]
        form = (*((message.role, *map(type, message.parts)) for message in messages), *thoughtful)
        if form not in self.skeletons:
            rendered = self.render(self.contents(messages, sentinels(slots)))
            self.skeletons[form] = skeleton_in(rendered, messages, slots)
            if len(self.skeletons) > MOST_SKELETONS:
                del self.skeletons[next(iter(self.skeletons))]
        return self.skeletons[form]

    def answers(
        self, skeleton: Skeleton, slots: Sequence[Slot], begins: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Each answer from the end of the generation prompt, where it has one, to the end of its end token."""
        spans: dict[int, tuple[int, int]] = {}
        for number, (begin, end) in enumerate(begins):
            slot = slots[skeleton.slots[number]]
            if not slot.answer:
                continue
            if slot.message in spans:  # further parts of the same answer
                begin = spans[slot.message][0]
            else:
                before = skeleton.literals[number]
                at = before.rfind(self.generation_prompt) if self.generation_prompt else -1
                begin -= len(before) - at - len(self.generation_prompt) if at >= 0 else 0
            after = skeleton.literals[number + 1]
            closing = after.rstrip() if number + 1 == len(begins) else self.closing(after)
            spans[slot.message] = (begin, end + len(closing))
        return list(spans.values())

    def closing(self, after: str) -> str:
        """The end token of an answer that is not the last: what the last one has too, or what the next role's name
        comes after."""
        common = whole_tokens(common_prefix(after, self.tail))
        first = SPECIAL.match(self.generation_prompt)
        if common or not first or not SPECIAL.match(after):
            return common
        return after[: max(0, after.find(first[0]))].rstrip()

    def generated(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """What stands between the template's generation marks."""
        tokenizer = getattr(self.source, "tokenizer", self.source)
        with _refusals(self.template):
            output: Any = render_jinja_template(
                [self.contents(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        (rendered,), (spans,) = output
        assert rendered == text, "marks write nothing"
        return [(begin, end) for begin, end in spans if end > begin]

    def image_marks(self, skeleton: Skeleton, begins: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Marks that the template, or we, wrote: those in the texts are text."""
        marks = []
        starts = [0, *(end for _, end in begins)]
        for start, literal in zip(starts, skeleton.literals, strict=True):
            for match in re.finditer(re.escape(self.mark), literal) if self.mark else ():
                marks.append((start + match.start(), start + match.end()))
        return marks

    @property
    def knows_thoughts(self) -> bool:
        return "</think>" in self.template

    @cached_property
    def tail(self) -> str:
        """What follows the last answer."""
        messages = [Message("user", ("?",)), Message("assistant", (".",))]
        return self.skeleton(messages, slots_of(messages, False)).literals[-1]

    @cached_property
    def generation_prompt(self) -> str:
        """What the template writes where the assistant is to answer; empty if it cannot tell."""
        messages = self.contents([Message("user", (sentinel(0),))])
        try:
            without, asked = self.render(messages), self.render(messages, ask=True)
        except TemplateError:  # no conversation without an answer
            return ""
        common = common_prefix(without, asked)
        return asked[len(common if common == without else whole_tokens(common, strip=False)) :]


@contextmanager
def _refusals(template: str) -> Iterator[None]:
    """What the template raises, or that it takes too long, as a TemplateError."""
    try:
        with ending(template):
            yield
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(f"the chat template refuses the turns: {reason}") from error


def own_template(source: Any, what: str) -> str:
    """The template's text.

    Raises:
        ValueError: there is none.
    """
    for owner in (source, getattr(source, "tokenizer", None)):
        template = getattr(owner, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        if template:
            return str(template)
    raise ValueError(
        f"{what}: brings no chat template (chat_template.jinja); expected one, or a --template: name the one that the "
        "model was trained with"
    )


def _with_fixed_date(template: str) -> str:
    return _FIXED_DATE + template if "strftime_now" in template else template
