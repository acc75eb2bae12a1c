"""Prints the lowest versions that pyproject.toml allows for what onstep and its extras need, as pip's constraints."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for need in [*project["dependencies"], *extras["config"], *extras["examples"]]:
    if ">=" in need:  # not an extra that brings another
        print(re.sub(r"\[.*?\]", "", need).replace(">=", "=="))
