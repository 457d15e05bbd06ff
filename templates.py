"""Chat templates for tokenizers that have none, and one date for those that write today's."""

import re
from datetime import date

# For tokenizers without a chat template (base models): Gemma's turns, or the Halos format of the paper.
GEMMA_TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
HALOS_TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ '\n<|' + m['role'] + '|>\n' + m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)

# For templates that write today's date: tomorrow's tokens, and so the reference's cache, are to be the same.
DAY = date(2024, 7, 26)


def dated(template: str) -> str:
    """A chat template whose calls of strftime_now(FORM) write DAY: apply_chat_template can't be given one."""
    return re.sub(r"""strftime_now\((['"])(.*?)\1\)""", lambda call: repr(DAY.strftime(call[2])), template)
