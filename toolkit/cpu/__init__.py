"""Code for CPUs only: faster versions of some computations, and care for cores that other processes use too."""
