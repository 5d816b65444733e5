import subprocess
import sys

PROGRAM = """
import sys
for name in ("lightning", "pytorch_lightning", "vllm", "peft", "transformers"):
    sys.modules[name] = None  # importing it now raises ImportError
import appo_lightning.algorithm as algorithm
missing = [name for name in algorithm.__all__ if not hasattr(algorithm, name)]
assert not missing, missing
ours = {name for name in sys.modules if name.startswith("appo_lightning.")}
known = {"appo_lightning.types", "appo_lightning.errors"}
assert all(name in known or name.startswith("appo_lightning.algorithm") for name in ours), ours
"""


def test_the_algorithm_needs_torch_only():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
