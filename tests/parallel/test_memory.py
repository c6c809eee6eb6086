"""What a process is said to have held is its own."""

import subprocess
import sys

from vidgen.parallel.memory import peak_memory_bytes

ASK = "from vidgen.parallel.memory import peak_memory_bytes; print(peak_memory_bytes())"


def test_a_peak_is_this_processes_and_not_that_of_the_one_that_started_it():
    ballast = bytearray(300 * 2**20)
    ballast[:: 2**12] = bytes(len(range(0, len(ballast), 2**12)))  # every page of it
    assert peak_memory_bytes() > 300 * 2**20
    # a fork that then becomes another program, as spawned workers are
    command = [sys.executable, "-c", ASK]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 2**20 < int(child.stdout) < 300 * 2**20
