"""What `make docs` changes in pages and docstrings: references that mean something in the repository only."""

import re

from griffe import Extension, Object
from mkdocs.structure.pages import Page

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)(#[^)]*)?\)")
_REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")
_TYPE = re.compile(r"^( +[\w*, ]+) \((.*)\):", re.M)


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    """A link to a file outside of docs/ becomes the path of the file in the repository."""
    return _OUTSIDE.sub(_named, markdown)


def on_page_content(html: str, page: Page, **kwargs: object) -> str:
    """A link of a notebook to another page leads there; MkDocs does so for pages of Markdown alone."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="(\w+)\.md(#[\w-]+)?"', r'href="../\1/\2"', html)


def _named(link: re.Match) -> str:
    path = link[2].lstrip("./")
    return f"`{path}`" if link[1].strip("`") in path else f"{link[1]} (`{path}`)"


class PlainReferences(Extension):
    """Shows a reference of the docstrings, [`~package.name`], by its last part, and types without Markdown."""

    def on_object(self, *, obj: Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            text = _REFERENCE.sub(lambda found: f"`{found[1].rpartition('.')[2]}`", obj.docstring.value)
            obj.docstring.value = _TYPE.sub(lambda found: f"{found[1]} ({re.sub('[`*]', '', found[2])}):", text)
