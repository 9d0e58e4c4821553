"""How fast a subject gets from the disk to the network, ours beside what else one might use."""
