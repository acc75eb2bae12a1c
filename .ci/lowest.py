"""Print the lowest versions that pyproject.toml allows for the dependencies, as constraints for pip."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for requirement in [*project["dependencies"], *extras["config"], *extras["demo"], *extras["examples"]]:
    if ">=" in requirement:  # skips extras that name another extra
        print(re.sub(r"\[.*?\]", "", requirement).replace(">=", "=="))
