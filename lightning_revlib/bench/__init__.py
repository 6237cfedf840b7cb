"""The benchmark beside other libraries, `revlib bench`.

workloads.py    what is run        contestants.py, peers.py    who runs it
measure.py      what is measured   timing.py                   in turns, and compared
cell.py         of one stack       sweep.py                    along ten budgets
tables.py       how it is shown    command.py, machine.py      the command; what it was run on, with
                                   allocator.py                an allocator that is fixed before
"""
