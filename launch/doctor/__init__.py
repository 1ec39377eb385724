"""`resilient doctor`: whether a machine, and a job on it, are as the policy needs them; before anything starts.

    finding.py       what a check says
    question.py      what is asked: URL, policy, sizes
    software.py      versions
    limits.py        memory, page-locked memory, descriptors, file sizes: what the system allows
    storage.py       folders and object stores: rights, speed, room, clock
    surroundings.py  what would end the agent early or hide it: SLURM, containers, folders of sockets
    network.py       addresses, and whether other machines can be reached
    job.py           inside a job: all pairs of its nodes, and their clocks
    examine.py       all checks, each within a bounded time                         (start here)

Each check is a measurement, which returns facts, and a pure decision over them. Nothing is changed but for probes, and
these are removed.
"""
