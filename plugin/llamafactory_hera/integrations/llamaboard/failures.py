"""Why a run has failed, in front of everything that it printed."""

import re

from llamafactory.webui.locales import ALERTS

# The last lines of a traceback; torchrun puts the rank in front.
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s?)?(\w*Error: .+)$", re.MULTILINE)


def with_reason(text: str, lang: str) -> str:
    """The host's message of a failed run with the error put first; any other text as it is.

    Args:
        text: What the host shows of a run; after a failure that is a line and all that the run wrote to stderr.
        lang: Language of the page.
    """
    head, gap, rest = text.partition("\n\n")
    errors = _ERROR.findall(rest)
    if not head.startswith(ALERTS["err_failed"][lang]) or not errors:
        return text
    return f"{head}\n\n**{errors[-1]}**{gap}{rest}"
