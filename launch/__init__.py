"""What starts ranks: the command line and the cluster executors."""
