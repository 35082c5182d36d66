"""Job arrays on a SLURM cluster: the commands for the login node, and the launcher that runs each job."""
