"""Lanes: bytes from rank to rank over several paths at once, each path of the sender's choosing.

    wiring       what a rank knows of its paths: which address or source port leads over which
    meeting      ranks find one another through the job's store, and prove that they belong to it
    connection   one TCP flow and the frames on it (`wire`); `connections`: all of a rank's; `doors`: opening them
    schedule     which chunk goes on which lane next: pure
    window       how many bytes a lane may have on its way
    rates        how quick each path has been, and what that makes of the fabric: pure
    failing      whose fault it is, and that all ranks say the same: pure
    engine       what frames mean, run by the thread of `loop`; `opening` starts it
    status       the same for who watches

The sender alone decides the way of each byte: a chunk says which operation, tag and offset it belongs to, and goes
straight into the receiver's buffer from whatever lane it comes. So ranks need not agree on a plan, a late lane's chunks
may take another, and what a dead lane had is sent again without harm.
"""
