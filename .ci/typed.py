"""Fail unless every name that the wheel on PYTHONPATH exports has a complete type annotation, checked by pyright."""

import json
import subprocess
import sys

ALLOWED = {"onstep.state.TrainState"}
"""Its base class in Flax has no types."""

command = ["-m", "pyright", "--pythonpath", sys.executable, "--verifytypes", "onstep", "--ignoreexternal"]
done = subprocess.run([sys.executable, *command, "--outputjson"], capture_output=True, text=True)
exported = [symbol for symbol in json.loads(done.stdout)["typeCompleteness"]["symbols"] if symbol["isExported"]]
if not exported:
    sys.exit(f"pyright found no names of onstep: {done.stdout}")
untyped = [symbol for symbol in exported if not symbol["isTypeKnown"] and symbol["name"] not in ALLOWED]
for symbol in untyped:
    print(symbol["name"], *(note["message"] for note in symbol["diagnostics"]), sep="\n    ")
known = sum(symbol["isTypeKnown"] for symbol in exported)
print(f"{known} of {len(exported)} exported names have a known type")
sys.exit(bool(untyped))
