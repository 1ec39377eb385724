"""`resilient run`: torchrun, with restarts that lose no step, elasticity at snapshots, and one line on what happened.

    job.py         one launcher from its arguments to its exit code                        (start here)
    options.py     the command line: torchrun's own parser and a few options of ours → Settings
    identity.py    the run's name, and the claim that keeps two launchers of one run apart on a node
    rendezvous.py  where the nodes meet, and what they tell one another there
    launcher.py    the loop: meet, start, watch, decide; an agent of torch's elastic with a loop of its own
    decide.py      what to do when workers have ended: facts → Decision, nothing else
    life.py        one life of the job as the launcher sees it, and what is remembered of those before
    workers.py     the processes of this node in one life: exit codes, signals, their end
    notice.py      signals to the launcher
    report.py      the lines for the operator, and the same as JSON

One launcher runs on each node and starts that node's ranks. It knows nothing of state: what the ranks tell it
(`checkpoint/events.py`) and how they end is all there is.
"""
