"""NIfTI pairs in, packed HDF5 volumes out, and the order in which training reads them."""
