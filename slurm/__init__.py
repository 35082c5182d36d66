"""Arrays of jobs on a SLURM cluster: what runs on the login node, and the launcher beside each job."""
