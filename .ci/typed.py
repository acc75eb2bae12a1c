"""Fails unless pyright knows the type of everything that the wheel on PYTHONPATH exports, from annotations alone."""

import json
import subprocess
import sys

ALLOWED = {"onstep.state.TrainState"}
"""Its base class, Flax's, comes without types."""

command = ["-m", "pyright", "--pythonpath", sys.executable, "--verifytypes", "onstep", "--ignoreexternal"]
done = subprocess.run([sys.executable, *command, "--outputjson"], capture_output=True, text=True)
exported = [symbol for symbol in json.loads(done.stdout)["typeCompleteness"]["symbols"] if symbol["isExported"]]
if not exported:
    sys.exit(f"pyright found nothing of onstep: {done.stdout}")
wrong = [symbol for symbol in exported if not symbol["isTypeKnown"] and symbol["name"] not in ALLOWED]
for symbol in wrong:
    print(symbol["name"], *(note["message"] for note in symbol["diagnostics"]), sep="\n    ")
known = sum(symbol["isTypeKnown"] for symbol in exported)
print(f"{known} of {len(exported)} exported names have a known type")
sys.exit(bool(wrong))
