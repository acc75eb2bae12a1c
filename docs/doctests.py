"""Fence the doctests in docstrings, because Markdown does not recognize them as code."""

import re

from griffe import Extension


class Doctests(Extension):
    """Adds a fence around every block of doctest lines."""

    def on_object(self, *, obj, **kwargs):
        """Change the text of the docstring before it is parsed."""
        if obj.docstring:
            fenced = re.sub(r"(?m)^(>>>.*(?:\n(?!\s*$).+)*)", r"```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = fenced
