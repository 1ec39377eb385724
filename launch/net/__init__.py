"""`resilient net`: what is known of the network, what a collective would do in it, and what lanes do right now.

planned   a collective's steps on a topology: pieces, loads and what no plan can beat; pure
watching  the files that ranks write of their lanes, and rates from two looks at them
written   a topology file from SLURM's description, or from probes
"""
