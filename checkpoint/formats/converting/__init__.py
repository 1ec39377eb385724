"""How a conversion is carried out: tasks for workers, what a task does, and the target that it all goes to."""
