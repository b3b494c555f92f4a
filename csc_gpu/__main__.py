"""python -m csc_gpu"""

from csc_gpu.cli import cli

cli(prog_name="csc-gpu")
