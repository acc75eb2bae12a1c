"""Docstrings for the reference: fence the doctests, because Markdown does not recognize them, and link names."""

import re
from pathlib import Path

from griffe import Extension

TEST = re.compile(r"(?m)^(>>>.*(?:\n(?!\s*$).+)*)")
NAMED = r"(?m)^::: (onstep[\w.]*\.([A-Z]\w+))"
PAGES = sorted((Path(__file__).parent / "reference").glob("*.md"))
CLASSES = {name: path for page in PAGES for path, name in re.findall(NAMED, page.read_text())}
"""The full name of each class of the reference by its short name."""


class Docstrings(Extension):
    """Changes the text of docstrings before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Fence every block of doctest lines, and link every full name, class and page in the text around them."""
        if obj.docstring is None:
            return

        def link(match):
            path = CLASSES.get(match[1], match[1])
            if obj.path.startswith(path) or not path.startswith("onstep."):
                return match[0]
            return f'<autoref identifier="{path}" optional><code>{match[1]}</code></autoref>'

        parts = TEST.split(obj.docstring.value)
        parts[::2] = [re.sub(r"`([A-Za-z][\w.]+)`", link, text) for text in parts[::2]]
        parts[::2] = [re.sub(r"docs/(\w+)\.md", r'<a href="../\1.html">\1</a>', text) for text in parts[::2]]
        parts[1::2] = [f"```pycon\n{test}\n```" for test in parts[1::2]]
        obj.docstring.value = "".join(parts)
