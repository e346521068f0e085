"""Chat templates of LLaVA-style models, registered with the host."""

from types import ModuleType


def register(host: ModuleType) -> None:
    """Registers the templates with the host's ``data.template`` module, leaving names it already has alone."""
    from llamafactory.data.mm_plugin import get_mm_plugin

    chatml = {
        "format_user": host.StringFormatter(
            slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]
        ),
        "format_assistant": host.StringFormatter(slots=["{{content}}<|im_end|>\n"]),
        "format_system": host.StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
        "stop_words": ["<|im_end|>"],
        "replace_eos": True,
    }
    templates = {"llava_qwen3": chatml}
    for name, settings in templates.items():
        if name not in host.TEMPLATES:
            host.register_template(name=name, mm_plugin=get_mm_plugin(name="llava", image_token="<image>"), **settings)
