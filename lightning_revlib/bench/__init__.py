"""The benchmark beside other libraries, `revlib bench`.

workloads.py                stacks of several kinds of blocks
contestants.py, peers.py    ways to execute a stack: this library, torch's own and other libraries
measure.py, timing.py       gradients, bytes and FLOPs of a contestant; step times of several in turns
cell.py, sweep.py           one stack; one stack under ten memory budgets
largest.py                  the largest model that fits in a number of bytes
tables.py, machine.py       Markdown, CSV and pictures; versions, machine and date of a run
command.py, allocator.py    the command; the allocator that it fixes before torch is imported
studies/                    questions of their own: `revlib bench study=NAME`
"""
