"""Fails where pyright knows no type for what the wheel on PYTHONPATH exports: an argument, a result, a base."""

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
inferred = [symbol for symbol in exported if symbol["isTypeAmbiguous"]]  # an attribute without an annotation is in it
unknown = [symbol for symbol in exported if not symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]]
wrong = [symbol for symbol in unknown if symbol["name"] not in ALLOWED]
for symbol in wrong:
    print(symbol["name"], *(note["message"] for note in symbol["diagnostics"]), sep="\n    ")
print(f"{len(exported)} names are exported: of {len(inferred)} types are partly inferred, of {len(unknown)} unknown")
sys.exit(bool(wrong))
