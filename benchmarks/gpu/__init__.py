"""`make gpu`: build, test and measure hgfast on a machine with a CUDA GPU (docs/gpu.md).

__main__.py   the command: steps, the clock, what a signal leaves behind
journal.py    what is finished, one JSON line each; the rest is made from it
machine.py    what the machine is
steps.py      building and testing, as other processes
measure.py    the measuring process: items by priority, candidates in turns
cases.py      what is measured: ops, networks, and the candidates for each
device.py     clocks, caches and graphs: of a GPU, or of a rehearsal on the CPU
report.py     the JSON, the table and the plot
"""
