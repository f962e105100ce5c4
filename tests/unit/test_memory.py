"""What `keep_freed_memory` does to a process that takes and frees large blocks again and again."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from weighting_contract.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
    keep_freed_memory()  # once more does nothing

def step():
    blocks = [b"x" * (1 << 23), b"x" * (1 << 26)]  # 8 and 64 MiB

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    found = subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True)
    return int(found.stdout)


def test_freed_blocks_are_taken_again_without_new_pages() -> None:
    assert 10 * page_faults("keep") < page_faults("as it is")
