"""`torch.distributed.checkpoint` over our levels: for programs written for DCP (torchtitan, NeMo) one argument more.

    writer = ResilientWriter("s3://bucket/run", policy)
    dcp.save(state_dict, storage_writer=writer, checkpoint_id=step)
    dcp.async_save(state_dict, storage_writer=writer, checkpoint_id=step)
    dcp.load(state_dict, storage_reader=ResilientReader("s3://bucket/run"))

DCP's planner says which rank writes which box, to files. Our plan says it too, balances it better and lets the agent
write: so DCP's plan is made, checked by it, and otherwise not used. What a rank has of the state dict is the state of a
Checkpointer. The reader opens any snapshot or checkpoint that we read; docs/integrations.md is for users.
"""

from resilient.launch.dcp.reader import ResilientReader
from resilient.launch.dcp.writer import ResilientWriter

__all__ = ["ResilientReader", "ResilientWriter"]
