"""One command that proves a GPU computes rightly and takes every single-GPU figure, in parts that fail alone."""
