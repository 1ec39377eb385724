"""Collectives over lanes: who sends what to whom, which schedule is the quickest, and carrying it out.

    schedule   the steps of one rank in each algorithm: pure
    choice     which algorithm, by the planner's bounds: pure, and alike on all ranks
    fold       reductions, in an order that does not depend on what arrives first
    execute    plans each step for the rates of the moment, posts it, waits, folds

Nothing here knows of torch.distributed.
"""
