"""Code that exists only because a CPU is slow, or shared with other processes."""
