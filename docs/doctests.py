"""Docstrings show their examples as doctests; Markdown wants a fence around them."""

import re

from griffe import Extension


class Doctests(Extension):
    """Puts a fence around the doctests that end a docstring's paragraph."""

    def on_object(self, *, obj, **kwargs):
        """Changes the docstring's text before it is parsed."""
        if obj.docstring:
            fenced = re.sub(r"(?m)^(>>>.*(?:\n(?!\s*$).+)*)", r"```pycon\n\1\n```", obj.docstring.value)
            obj.docstring.value = fenced
