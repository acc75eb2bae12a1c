"""The page docs/troubleshooting.md has an entry for every error and warning, and no entry for one that is gone."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
FILES = sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])
TELL = {"warn_user", "log_user", "add_note"}
WORDS = 5
"""An entry quotes as many words of a message in a row, or all words between two values if there are fewer."""


def parts(node):
    """Return a message as text, with `\\0` for every value that is put into it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(parts(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return parts(node.left) + parts(node.right)
    return "\0"


def messages():
    """Yield the place and the text of everything that onstep raises, warns or tells."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name.endswith("Error") or name in TELL:
                    text = next((text for argument in node.args if " " in (text := parts(argument))), "")
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def phrase(text):
    """Return the words by which a message is found: the first ones of the longest constant part of its problem."""
    problem = re.split(r"[.;] |\n", text)[0]
    longest = max(problem.split("\0"), key=lambda part: len(part.split()))
    return " ".join(longest.strip(" .,:").split()[:WORDS])


FOUND = {place: key for place, text in messages() if len((key := phrase(text)).split()) >= 3}


def test_every_message_has_an_entry():
    page = " ".join(PAGE.split())
    missing = [f"{place} {key}" for place, key in FOUND.items() if key not in page]
    assert not missing, "\n".join(missing)


def texts():
    """Yield every string in the code that is not a docstring."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield " ".join(node.value.split())


def test_every_entry_is_a_message():
    entries = re.findall(r"^#### `([^`]*)`$", PAGE, flags=re.MULTILINE)
    assert len(entries) > 150
    code, keys = "\n".join(texts()), set(FOUND.values())

    def exists(entry):
        return any(key in entry for key in keys) or any(entry[n : n + 16] in code for n in range(len(entry) - 15))

    gone = [entry for entry in entries if not exists(entry)]
    assert not gone, "\n".join(gone)
