"""Chat templates with images: a plain one, and a language model's own one that knows text only."""

# "USER: ...", "ASSISTANT: ..." on a line each; generation marks what a model is trained to say
PLAIN_CHAT = (
    "{% for message in messages %}"
    "{{ message['role'] | upper + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token | default('') }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE_TOKEN\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)

# stands before a template that prints `message['content']`: lists of parts become one text with image tokens in it
IMAGES_AS_TEXT = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set joined = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set joined.text = joined.text + 'IMAGE_TOKEN\n' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set joined.text = joined.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=joined.text)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)


def chat_template_for(own: str | dict | None, image_token: str) -> str | dict:
    """A chat template that takes images.

    Args:
        own: of the tokenizer; kept if it speaks of images, given texts with image tokens in them if not. None: the
            plain one.
    """
    if own is None:
        return PLAIN_CHAT.replace("IMAGE_TOKEN", image_token)
    if isinstance(own, dict) or "image" in own:
        return own
    return IMAGES_AS_TEXT.replace("IMAGE_TOKEN", image_token) + own
