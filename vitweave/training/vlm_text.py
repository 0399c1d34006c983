"""Conversations as token ids and labels: what the assistant says is learnt, everything else is only read."""

from collections.abc import Mapping, Sequence

from transformers.utils import logging

from vitweave.processing.image_placeholders import check_placeholders

logger = logging.get_logger(__name__)

IGNORED = -100  # a label the loss does not look at
PROMPT = "Describe the image."


def caption_messages(prompt: str, num_images: int, caption: str | None = None) -> list[dict]:
    """A conversation that asks about images, with the answer where there is one."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}] * bool(prompt)
    answer = [] if caption is None else [{"role": "assistant", "content": [{"type": "text", "text": caption}]}]
    return [{"role": "user", "content": content}, *answer]


def parts_of(content: str | Sequence[Mapping], image_token: str) -> list[dict]:
    """The content of a message as parts; in a string every image token is an image."""
    if not isinstance(content, str):
        return [dict(part) for part in content]
    parts = []
    for index, text in enumerate(content.split(image_token)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text.strip("\n")}] if text.strip() else []
    return parts


def normal_messages(messages: Sequence[Mapping], num_images: int, image_token: str) -> list[dict]:
    """Messages whose content is a list of parts; images nobody speaks of stand before the first user's text."""
    found = [{"role": one["role"], "content": parts_of(one["content"], image_token)} for one in messages]
    mentioned = sum(part["type"] == "image" for message in found for part in message["content"])
    first = next((message for message in found if message["role"] == "user"), None)
    if not mentioned and first is not None:
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    return found


def joined_content(message: Mapping, image_token: str) -> dict:
    """The message with its content as one string, for templates of language models, which know no parts."""
    written = [f"{image_token}\n" if part["type"] == "image" else part["text"] for part in message["content"]]
    return {"role": message["role"], "content": "".join(written)}


class ConversationEncoder:
    """Conversations to `input_ids` and `labels` as a processor and its chat template write them.

    The text before every answer is tokenised as `generate` gets it, and the answer by itself, so that the model learns
    to go on from the very tokens it will see. An answer ends with the end-of-sequence token where the template has one.

    Args:
        processor: a `MultiEncoderVlmProcessor`.
        max_length: longer samples lose their end, said once; None is the processor's `token_budget`.
    """

    def __init__(self, processor, max_length: int | None = None):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length = processor.token_budget if max_length is None else max_length
        probe = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "probe"}]}]
        try:
            written = processor.apply_chat_template(probe)
        except Exception:  # jinja's own, or what the template raises
            written = ""
        self.takes_parts = written.count(processor.image_token) == 1 and "{" not in written and "probe" in written
        self.has_cut = False

    def render(self, messages: Sequence[Mapping], answer_next: bool = False) -> str:
        """The text of a conversation; with `answer_next` as far as the model is to go on."""
        if not self.takes_parts:
            messages = [joined_content(message, self.processor.image_token) for message in messages]
        return self.processor.apply_chat_template(list(messages), add_generation_prompt=answer_next)

    def adds_special_tokens(self, text: str) -> bool:
        """Whether the tokenizer is to put its special tokens around a text, or the template has done so."""
        start = self.tokenizer.bos_token
        return not (start and text.startswith(start))

    def segments(self, messages: Sequence[Mapping], name: str) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is learnt."""
        whole, pieces, done = self.render(messages), [], 0
        end = self.tokenizer.eos_token
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:index], answer_next=True), self.render(messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise ValueError(
                    f"{name}: the chat template writes earlier turns differently once an answer follows, so that the"
                    " answers cannot be told from the rest; give the processor another chat_template"
                )
            answer = after[len(before) :]
            if end and end in answer:
                answer = answer[: answer.rindex(end) + len(end)]
            pieces += [(whole[done : len(before)], False), (answer, True)]
            done = len(before) + len(answer)
        if not any(learnt and text for text, learnt in pieces):
            raise ValueError(f"{name}: expected an answer of the role 'assistant' to learn, found none")
        return pieces

    def __call__(
        self, messages: Sequence[Mapping], num_tiles: Sequence[int], image_sizes: Sequence[Sequence[int]], name: str
    ) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels` of a conversation.

        Args:
            num_tiles, image_sizes: of each image its tiles and its (height, width).
            name: what messages call the sample.
        """
        token = self.processor.image_token
        pieces = self.segments(normal_messages(messages, len(num_tiles), token), name)
        count = sum(text.count(token) for text, _ in pieces)
        try:
            check_placeholders([[None] * len(num_tiles)], [count], token)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        facts, image = {"num_tiles": num_tiles, "image_sizes": image_sizes}, 0
        ids, labels = [], []
        for text, learnt in pieces:
            written, *others = text.split(token)
            for rest in others:
                written, image = written + self.processor.replace_image_token(facts, image) + rest, image + 1
            special = not ids and self.adds_special_tokens(text)
            found = self.tokenizer(written, add_special_tokens=special, truncation=False)["input_ids"]
            ids += found
            labels += [one if learnt and one not in self.processor.image_token_ids else IGNORED for one in found]
        labels[0] = IGNORED  # nothing comes before the first token that could foretell it
        return self.cut(ids, labels, name)

    def cut(self, ids: list[int], labels: list[int], name: str) -> tuple[list[int], list[int]]:
        """At most `max_length` tokens; refused where that would cut an image, or leave nothing to learn."""
        most = self.max_length
        if most is None or len(ids) <= most:
            return ids, labels
        images = [index for index, one in enumerate(ids) if one == self.processor.image_token_id]
        if (images and images[-1] >= most) or all(label == IGNORED for label in labels[:most]):
            raise ValueError(
                f"{name}: {len(ids)} tokens, {len(images)} of them of images, are more than the {most} that fit, and"
                " what is cut off is an image or all that is to be learnt; lower max_tiles, shorten the text, or raise"
                " max_length"
            )
        if not self.has_cut:
            logger.warning(f"{name} has {len(ids)} tokens; the end of it and of others with more than {most} is cut")
            self.has_cut = True
        return ids[:most], labels[:most]
