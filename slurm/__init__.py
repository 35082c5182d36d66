"""What happens on the login node: arrays of jobs. It needs the spec and nothing else of the job."""
