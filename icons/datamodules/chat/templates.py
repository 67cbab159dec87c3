"""Conversation templates: a record's turns -> token ids and labels, masked exactly as the original code masks them.

Ids hold IMAGE_PLACE once for each image; the dataset expands it. Labels are the ids where the model is trained to
answer, -100 elsewhere. Source: LLaVA's `llava/train/train.py` and `llava/conversation.py`; xtuner's `llama3_chat`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from icons.batch import IGNORE_INDEX
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.conversation import IMAGE

IMAGE_PLACE = -200


class Turn(NamedTuple):
    """One message: `human` is True for the user's."""

    human: bool
    text: str


class Tokens(NamedTuple):
    """Ids and labels of one conversation, of equal length."""

    ids: list[int]
    labels: list[int]


def put_image_first(text: str, several: bool = False) -> str:
    """LLaVA's `preprocess_multimodal`: all marks of a turn become one, on a line of its own in front.

    Args:
        text: the turn.
        several: keep as many marks as there are, for a record with more than one image.

    >>> put_image_first("What is it? <image>")
    '<image>\\nWhat is it?'
    """
    marks = f"{IMAGE}\n" * (text.count(IMAGE) if several else min(1, text.count(IMAGE)))
    return (marks + text.replace(IMAGE, "").strip()).strip() if marks else text


def token_ids(tokenizer: Any, text: str, image: bool) -> list[int]:
    """Ids of a text, with BOS; if `image`, the parts between marks are tokenised apart, as LLaVA does."""
    text_ids = getattr(tokenizer, "text_ids", None) or (lambda part: list(tokenizer(part).input_ids))
    if not image:
        return text_ids(text)
    parts = [text_ids(part) for part in text.split(IMAGE)]
    begins = bool(parts[0]) and parts[0][0] == tokenizer.bos_token_id
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [IMAGE_PLACE, *part[begins:]]
    return ids


@dataclass(frozen=True)
class Rounds:
    """A template whose mask is found by counting the tokens of each round on its own, as LLaVA does.

    Attributes:
        prompt: turns, and a system text in place of the template's own -> the whole text.
        rounds: the text -> its rounds.
        answer: what separates question and answer in a round.
        begin: tokens before the first round.
        own: tokens of the question, tokenised on its own, that do not count (BOS and the separator's last space).
        correction: tokens to add to every later round, from the tokenizer's `legacy`.
        close: what ends a round and is not in its text, supervised with the answer.
    """

    prompt: Callable[[Sequence[Turn], str | None], str]
    rounds: Callable[[str], list[str]]
    answer: str
    begin: int
    own: int
    correction: Callable[[bool | None], int]
    close: str = ""

    def __call__(
        self, tokenizer: Any, turns: Sequence[Turn], image: bool, max_length: int, system: str | None = None
    ) -> Tokens:
        text = self.prompt(alternating(turns), system)
        ids = token_ids(tokenizer, text, image)
        ids = ids if image else ids[:max_length]
        labels, total = list(ids), len(ids) - ids.count(tokenizer.pad_token_id)
        shift, position = self.correction(getattr(tokenizer, "legacy", None)), self.begin
        closing = len(token_ids(tokenizer, self.close, False)) if self.close else 0
        labels[:position] = [IGNORE_INDEX] * position
        for number, part in enumerate(self.rounds(text)):
            question, separator, rest = part.partition(self.answer)
            if not separator or self.answer in rest:  # also an empty round
                break
            later = shift if number else 0
            asked = len(token_ids(tokenizer, question + self.answer, image)) - self.own + later
            end = min(position + asked, len(labels))
            labels[position:end] = [IGNORE_INDEX] * (end - position)
            position += len(token_ids(tokenizer, part, image)) + later + closing
        labels[position:] = [IGNORE_INDEX] * len(labels[position:])
        if position < max_length and position != total:  # the original's "tokenization mismatch": it teaches nothing
            labels = [IGNORE_INDEX] * len(labels)
        return Tokens(ids, labels)


def alternating(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Without a leading answer; raises if the rest does not alternate."""
    turns = turns if not turns or turns[0].human else turns[1:]
    if not turns:
        raise TemplateError("the conversation has no question")
    for number, turn in enumerate(turns):
        if turn.human != (number % 2 == 0):
            raise TemplateError(f"turn {number + 1} is a second {'question' if turn.human else 'answer'} in a row")
    return turns


CHAT = "A chat between a curious user and an artificial intelligence assistant. "
CHAT += "The assistant gives helpful, detailed, and polite answers to the user's questions."
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
)
_LLAMA_2 += "provides, and assist the user with a variety of tasks using natural language."
MPT = "A conversation between a user and an LLM-based AI assistant. "
MPT += "The assistant gives helpful and honest answers."


def _v1_prompt(turns: Sequence[Turn], system: str | None = None) -> str:
    parts = [f"{CHAT if system is None else system} "]
    for turn in turns:
        role, end = ("USER", " ") if turn.human else ("ASSISTANT", "</s>")
        parts.append(f"{role}: {turn.text}{end}" if turn.text else f"{role}:")
    return "".join(parts)


def _llama_2_prompt(turns: Sequence[Turn], system: str | None = None) -> str:
    parts = []
    first = _LLAMA_2 if system is None else system
    for number, (human, text) in enumerate(turns):
        if not text and number:
            continue
        if human:
            text = f"<<SYS>>\n{first}\n<</SYS>>\n\n{text}" if number == 0 else text
            parts.append(f"<s>[INST] {text} [/INST]")
        else:
            parts.append(f" {text} </s>")
    return "".join(parts).lstrip("<s>")


def _mpt_prompt(turns: Sequence[Turn], system: str | None = None) -> str:
    parts = [f"<|im_start|>system\n{MPT if system is None else system}<|im_end|>"]
    for turn in turns:
        role = "<|im_start|>user\n" if turn.human else "<|im_start|>assistant\n"
        parts.append(f"{role}{turn.text}<|im_end|>" if turn.text else role)
    return "".join(parts)


def _mpt_rounds(text: str) -> list[str]:
    parts = text.split("<|im_end|>")
    pairs = [parts[:3], *(parts[start : start + 2] for start in range(3, len(parts), 2))]
    return ["<|im_end|>".join(pair) for pair in pairs]


def _by_eos(text: str) -> list[str]:
    return text.split("</s>")


def plain(tokenizer: Any, turns: Sequence[Turn], image: bool, max_length: int, system: str | None = None) -> Tokens:
    """Pre-training on captions: the image, then the caption; the question is dropped."""
    if system is not None:
        raise TemplateError("the plain template has no place for a system text")
    if len(turns) != 2 or IMAGE not in turns[0].text:
        raise TemplateError("the plain template needs two turns, the first with <image>")
    ids = token_ids(tokenizer, f"{IMAGE}{turns[1].text}\n", True)
    asked = len(token_ids(tokenizer, IMAGE, True))
    return Tokens(ids, [IGNORE_INDEX] * asked + ids[asked:])


def llama_3(tokenizer: Any, turns: Sequence[Turn], image: bool, max_length: int, system: str | None = None) -> Tokens:
    """xtuner's convention: no system prompt of its own, one BOS, the answer and `<|eot_id|>` supervised."""
    ids = [tokenizer.bos_token_id]
    if system is not None:
        ids += encode(tokenizer, f"<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>")
    begin = len(ids)
    labels = [IGNORE_INDEX] * begin
    asked = ""
    for number, turn in enumerate(turns):
        if turn.human:
            if turn.text.count(IMAGE) > 1:
                raise TemplateError(f"turn {number + 1} has more than one <image>; the llama_3 template takes one")
            asked += turn.text
        elif asked:
            head = f"<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|>"
            head += "<|start_header_id|>assistant<|end_header_id|>\n\n"
            for index, part in enumerate(head.split(IMAGE) if image else [head]):
                ids += [IMAGE_PLACE] * (index > 0) + encode(tokenizer, part)
            answer = encode(tokenizer, turn.text + "<|eot_id|>")
            labels += [IGNORE_INDEX] * (len(ids) - len(labels)) + answer
            ids += answer
            asked = ""
        elif len(ids) > begin:
            raise TemplateError(f"turn {number + 1} is a second answer in a row")
    return Tokens(ids, labels)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


Template = Callable[[Any, Sequence[Turn], bool, int, str | None], Tokens]
TEMPLATES: dict[str, Template] = {
    "v1": Rounds(_v1_prompt, _by_eos, " ASSISTANT: ", 1, 2, lambda legacy: -1 if legacy is False else 0),
    "llama_2": Rounds(_llama_2_prompt, _by_eos, "[/INST] ", 1, 2, lambda legacy: 0),
    # as LLaVA-MPT was trained (llava/train/train.py up to v1.1.3); from v1.2 on the original leaves each round's end
    # out of its count, so that every sample is a "mismatch" and none is supervised
    "mpt": Rounds(
        _mpt_prompt, _mpt_rounds, "<|im_end|><|im_start|>assistant\n", 0, 0, lambda legacy: 0, close="<|im_end|>"
    ),
    "plain": plain,
    "llama_3": llama_3,
}
CHAT_TEMPLATE = "chat"  # the model's own, see own_template.py
NAMES = (*TEMPLATES, CHAT_TEMPLATE)
_SPECIAL_TOKENS = {
    "v1": ["</s>"],
    "llama_2": ["<s>", "</s>"],
    "mpt": ["<|im_start|>", "<|im_end|>"],
    "llama_3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "plain": [],
}


def check_fits(name: str, tokenizer: Any, what: str) -> None:
    """Checks that each special token that a template writes is one token of the tokenizer.

    Otherwise it would be read, and learned, as plain text.

    Raises:
        ValueError: one is not.
    """
    for token in _SPECIAL_TOKENS[name]:
        number, ids = tokenizer.convert_tokens_to_ids(token), encode(tokenizer, token)
        if number is None or number == tokenizer.unk_token_id or ids[-1:] != [number] or len(ids) > 2:
            raise ValueError(
                f"template {name}: writes {token}, which {what} has no token for (it reads it as {len(ids)} tokens); "
                f"expected a template that this model was trained with: name another --template ({', '.join(NAMES)})"
            )
    if name == "llama_3" and tokenizer.bos_token_id is None:
        raise ValueError(f"template {name}: begins with BOS, and {what} has none; name another --template")
