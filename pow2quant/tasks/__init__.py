"""What networks are for, one file per task: what targets look like, how results are scored, and the loss."""
