# SPDX-License-Identifier: Apache-2.0
"""What the options about the fields of a row mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpopt.finetune.record_files import RecordFormat


def record_form(text_field: str | None, template: str | None, prompt: str | None) -> RecordFormat | None:
    """What the options of text and prompt say of the fields of a row; None where they say nothing."""
    from dpopt.finetune.record_files import InputError, RecordFormat, Template

    if text_field is not None and template is not None:
        raise InputError("expected --text-field or --template; got both; leave one out")
    if text_field is None and template is None and prompt is None:
        return None
    text = Template(template) if template is not None else Template("{" + (text_field or "text") + "}")
    return RecordFormat(text, None if prompt is None else Template(prompt))
