"""Rendering of templates: whatever a template prints is escaped as text, unless a filter makes it code or a link."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def _line(value: Any) -> str:
    """Any value as one line without control characters."""
    return re.sub(" +", " ", "".join(c if c.isprintable() else " " for c in str(value)))


def _text(value: Any) -> str:
    """Any value as Markdown text that holds no markup, no HTML and no link."""
    if isinstance(value, Markup):
        return value
    text = _line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$#@])", r"\\\1", text)
    return re.sub(r"(?i)\b(www)\.", r"\1\\.", text.replace("://", r":\//"))


def _code(value: Any) -> Markup:
    """Any value as inline code, also within a table."""
    text = _line(value).strip()
    if "|" in text:  # a bar ends a table's cell within backticks too, and outside of tables nothing escapes it there
        return Markup(f"<code>{_text(text)}</code>")
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markup(f"{ticks}{pad}{text}{pad}{ticks}") if text else Markup("")


def _fence(value: Any, language: str) -> Markup:
    """Any value as a block of code."""
    text = str(value).strip("\n")
    ticks = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return Markup(f"{ticks}{language}\n{text}\n{ticks}")


def _url(value: Any) -> Markup:
    """The address of a Markdown link: an http or https address, or `#` in the place of anything else."""
    text = _line(value).strip()
    return Markup(quote(text, safe=":/?#@!$&'*+,;=%~") if re.match("https?://", text) else "#")


def readable_bytes(value: int) -> str:
    """A size in bytes with three digits and a unit."""
    power = min((len(str(value)) - 1) // 3, 3)
    return f"{value / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"


def render_template(template: str, **variables: Any) -> str:
    """Render a template of this package.

    Args:
        template (`str`): File name in the folder `templates`.
        **variables: What the template names. A missing variable is an error, and a value is printed as text.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        finalize=_text,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "fence": _fence, "bytes": readable_bytes, "url": _url}
    return environment.get_template(template).render(**variables)
